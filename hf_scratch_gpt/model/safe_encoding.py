"""Encoding in which a user's text stays plain text: only a chat template writes control tokens. Any fast tokenizer."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

_Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, and the characters (start, end) of each


class EncodedConversation(TypedDict):
    """Token ids, and 1 for each token that the assistant wrote, its end token included."""

    input_ids: list[int]
    assistant_masks: list[int]


class PlainEncoder:
    """Encodes text with a copy of a tokenizer that knows no control token, so that none can come out.

    A control token is any added token but the runs of white space that some tokenizers add.

    Args:
        backend (`Tokenizer`): The copy.
        control_ids (`dict[str, int]`): The control tokens.
        renumber (`dict[int, int]`): Ids of the copy that the tokenizer numbers otherwise.
        unknown_id (`int`, *optional*): The token of letters that the vocabulary lacks, which text may give.
    """

    def __init__(
        self,
        backend: Tokenizer,
        control_ids: dict[str, int],
        renumber: dict[int, int],
        unknown_id: int | None = None,
    ):
        self.backend, self.control_ids, self.renumber = backend, control_ids, renumber
        self.unknown_id = unknown_id
        self._continuing = _without_first_space(backend)
        self.forbidden = frozenset(self.control_ids.values()) - {unknown_id}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "PlainEncoder":
        """The encoder of a fast tokenizer."""
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        spaces = [token for token in settings["added_tokens"] if token["content"].isspace()]
        settings.update(added_tokens=spaces, post_processor=None, truncation=None, padding=None)
        backend = Tokenizer.from_str(json.dumps(settings))
        # Added tokens outside the model's vocabulary are numbered anew in the copy.
        numbers = {backend.token_to_id(token["content"]): token["id"] for token in spaces}
        renumber = {here: there for here, there in numbers.items() if here is not None and here != there}
        control_ids = {token: i for token, i in added.items() if not token.isspace()}
        return cls(backend, control_ids, renumber, _unknown_id(tokenizer, settings["model"]))

    def encode(self, text: str, continues: bool = False) -> _Encoded:
        """Token ids of plain text, and the characters (start, end) of each.

        `continues` says that other text stands before it: some tokenizers put a space before the first word only.
        """
        backend = self._continuing if continues else self.backend
        encoding = backend.encode(text, add_special_tokens=False)
        ids = self._checked(encoding.ids)
        if ids is not None:
            return ids, encoding.offsets
        return self._encode_apart(text, continues)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts at once, on all cores."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        checked = (self._checked(encoding.ids) for encoding in encodings)
        return [self.encode(text)[0] if ids is None else ids for text, ids in zip(texts, checked, strict=True)]

    def _checked(self, ids: list[int]) -> list[int] | None:
        if self.renumber:
            ids = [self.renumber.get(i, i) for i in ids]
        return ids if self.forbidden.isdisjoint(ids) else None

    def _encode_apart(self, text: str, continues: bool) -> _Encoded:
        """A model that has control tokens as whole words (Unigram) gives them for their letters: cut those in two.

        Also for letters that the normalizer makes of others, as NFKC does of full-width ones.
        """
        all_ids: list[int] = []
        all_offsets: list[tuple[int, int]] = []
        spans = [(0, len(text))]  # still to be encoded, the next one last
        while spans:
            start, end = spans.pop()
            backend = self._continuing if continues or start else self.backend
            encoding = backend.encode(text[start:end], add_special_tokens=False)
            ids = [self.renumber.get(i, i) for i in encoding.ids]
            place = next((place for place, token in enumerate(ids) if token in self.forbidden), None)
            if place is None:
                all_ids += ids
                all_offsets += [(start + first, start + last) for first, last in encoding.offsets]
                continue
            first, last = encoding.offsets[place]
            if last - first < 2:
                raise ValueError(f"this tokenizer gives a control token for the plain text {text[start:end]!r}")
            spans += [(start + first + 1, end), (start, start + first + 1)]
        return all_ids, all_offsets


def _without_first_space(backend: Tokenizer) -> Tokenizer:
    """The tokenizer for text that other text precedes; the same one if it makes no difference."""
    settings = json.loads(backend.to_str())
    steps = [settings["pre_tokenizer"] or {}, *(settings["pre_tokenizer"] or {}).get("pretokenizers", [])]
    first_only = [step for step in steps if step.get("prepend_scheme") == "first"]
    for step in first_only:
        step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(settings)) if first_only else backend


def _unknown_id(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any]) -> int | None:
    """The id of the token of unknown letters, unless it also says something else, as GPT-2's ends a text."""
    token = model.get("unk_token")
    if model.get("unk_id") is not None:
        token = model["vocab"][model["unk_id"]][0]
    told = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.sep_token, tokenizer.cls_token)
    return None if token is None or token in told else tokenizer.convert_tokens_to_ids(token)


_PLAIN_ENCODERS: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, PlainEncoder]]" = WeakKeyDictionary()


def _plain_encoder(tokenizer: PreTrainedTokenizerBase) -> PlainEncoder:
    size, encoder = _PLAIN_ENCODERS.get(tokenizer, (0, None))
    if encoder is None or size != len(tokenizer):
        encoder = PlainEncoder.from_tokenizer(tokenizer)
        _PLAIN_ENCODERS[tokenizer] = len(tokenizer), encoder
    return encoder


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a user's text, in which control tokens are plain text. Nothing is added at either end."""
    return _plain_encoder(tokenizer).encode(text)[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """`encode_text` of many texts at once, on all cores."""
    return _plain_encoder(tokenizer).encode_batch(texts)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any] | Callable] | None = None,
) -> EncodedConversation:
    """Token ids of a conversation in which only the chat template writes control tokens, never a message.

    Where no message holds (part of) a control token this is `tokenizer.apply_chat_template`, but that no token reaches
    across the beginning of an answer, as it would where one begins with a line break after the template's own: a
    prompt's tokens are always those that the model answers to. `assistant_masks` is 1 for what stands between the
    template's `{% generation %}` marks, and 0 everywhere if it has none.

    Raises:
        ValueError: if the conversation is empty, holds other values than JSON's, or the template refuses it; the
            message says why.
    """
    if not messages:
        raise ValueError("the conversation is empty; it needs at least one message")
    encoder = _plain_encoder(tokenizer)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    tools = [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools] if tools else None
    text, spans = _render(tokenizer, messages, tools, add_generation_prompt)
    disguise = _Disguise(encoder, text, tokenizer.get_chat_template(tools=tools))
    hidden, hidden_spans = _render(tokenizer, disguise.put_on(messages), disguise.put_on(tools), add_generation_prompt)
    ids, offsets = _encode_rendered(tokenizer, text)
    if disguise.saw_control_token or not _is_by_template(encoder, text, hidden, (ids, offsets)):
        spans = hidden_spans
        ids, offsets = _encode_in_pieces(encoder, hidden, [start for start, _ in spans], disguise.original)
    elif _crossed([start for start, _ in spans], offsets):
        ids, offsets = _encode_in_pieces(encoder, text, [start for start, _ in spans], {})
    written = [int(any(first <= start < last for first, last in spans) and end > start) for start, end in offsets]
    return {"input_ids": ids, "assistant_masks": written}


# What templates compare a message's role and a part's or a schema's type with; others stand in the template itself.
_KNOWN_NAMES = {
    *("system", "user", "assistant", "tool", "developer", "function", "ipython", "model"),
    *("text", "string", "number", "integer", "boolean", "array", "object", "null"),
}
# Below these keys stand names that a user chose, not those of a format.
_KEYS_OF_OBJECTS, _KEYS_OF_ALL = {"properties", "$defs", "definitions"}, {"arguments"}


class _Disguise:
    """Rewrites user strings so that no character of theirs can be part of a control token in the rendered text.

    Each character that occurs in a control token is exchanged for one of private use that does not occur in the text,
    so a control token found after rendering was written by the template alone, and lengths stay. Left as they are the
    names of fields, and roles and types that templates know: a template may well write `<|{{ message.role }}|>`.
    """

    def __init__(self, encoder: PlainEncoder, text: str, template: str):
        self.pattern = encoder.pattern
        self.template = template
        self.saw_control_token = False
        in_text = set(text)
        free = (code for code in range(0xF0000, 0xFFFFD) if chr(code) not in in_text)
        self.table = {ord(character): next(free) for character in set("".join(encoder.control_ids))}
        self.original = {hidden: chr(character) for character, hidden in self.table.items()}

    def put_on(self, value: Any, key: str = "", below_arguments: bool = False) -> Any:
        """The same messages or tools with every string disguised, but for names that templates compare with.

        Raises:
            ValueError: for a value that JSON has not: it might be rendered as any text.
        """
        if isinstance(value, str):
            if key in ("role", "type") and not below_arguments and self._is_known(value):
                return value
            self.saw_control_token = self.saw_control_token or bool(self.pattern.search(value))
            return value.translate(self.table)
        if isinstance(value, Mapping):
            below_arguments = below_arguments or key in _KEYS_OF_ALL
            chosen_by_user = below_arguments or key in _KEYS_OF_OBJECTS
            return {
                self._name(name, chosen_by_user): self.put_on(item, "" if chosen_by_user else name, below_arguments)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.put_on(item, key, below_arguments) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise ValueError(f"a message or tool holds {type(value).__name__}, expected text, numbers, lists and objects")

    def _name(self, name: Any, chosen_by_user: bool) -> Any:
        """The key of an object: kept where it is a field's name, or a user's that the template reads."""
        if not isinstance(name, str):
            return name
        is_plain = name.isidentifier() and not self.pattern.search(name)
        return name if is_plain and (not chosen_by_user or self._is_read(name)) else self.put_on(name)

    def _is_known(self, name: str) -> bool:
        return name in _KNOWN_NAMES or (name.isidentifier() and self._is_read(name))

    def _is_read(self, name: str) -> bool:
        return re.search(rf"(['\"]){re.escape(name)}\1|\.{re.escape(name)}\b", self.template) is not None


def _is_by_template(encoder: PlainEncoder, text: str, hidden: str, encoded: _Encoded) -> bool:
    """Whether all control tokens in the encoding of `text` are those that the template wrote, as `hidden` shows.

    Those that a normalizer makes of other letters, or breaks, are not.
    """
    written = [(match.group(), match.span()) for match in encoder.pattern.finditer(text)]
    by_template = [(match.group(), match.span()) for match in encoder.pattern.finditer(hidden)]
    # JSON and filters may lengthen or shorten what users wrote.
    same_length = len(text) == len(hidden)
    if written != by_template if same_length else [one for one, _ in written] != [one for one, _ in by_template]:
        return False
    expected = [(encoder.control_ids[token], span) for token, span in written]
    expected = [(token, span) for token, span in expected if token in encoder.forbidden]
    found = [(token, span) for token, span in zip(*encoded, strict=True) if token in encoder.forbidden]
    return len(found) == len(expected) and all(
        token == other and first <= start and end <= last
        for (token, (first, last)), (other, (start, end)) in zip(found, expected, strict=True)
    )


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> _Encoded:
    """Ids and character offsets of a rendered conversation, its control tokens read as such."""
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def _crossed(marks: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """The marks that a token reaches across."""
    return [mark for mark in marks if any(first < mark < last for first, last in offsets)]


def _encode_in_pieces(encoder: PlainEncoder, text: str, marks: list[int], original: dict[int, str]) -> _Encoded:
    """Ids and character offsets: control tokens where `text` has them, all between them as plain text.

    Plain text is cut where a token would reach across one of `marks`; `original` tells letters from their disguise.
    """
    table = str.maketrans(original)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for match in [*encoder.pattern.finditer(text), None]:
        end = match.start() if match else len(text)
        plain = text[position:end].translate(table)
        inside = [mark - position for mark in marks if position < mark < end]
        cuts = _crossed(inside, encoder.encode(plain, position > 0)[1]) if inside else []
        for start, stop in pairwise([0, *cuts, len(plain)]):
            at = position + start
            plain_ids, plain_offsets = encoder.encode(plain[start:stop], at > 0)
            ids += plain_ids
            offsets += [(at + first, at + last) for first, last in plain_offsets]
        if match:
            ids.append(encoder.control_ids[match.group()])
            offsets.append(match.span())
            position = match.end()
    return ids, offsets


def _render(tokenizer, messages, tools, add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the characters (start, end) of each passage that the assistant wrote."""
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError) as error:  # the latter where text is joined to a number or an object
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], spans[0]
