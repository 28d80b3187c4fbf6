"""ScratchGPTTokenizer: byte-level BPE with a ChatML template, and encoding in which user text stays plain text.

What is saved names transformers' own `PreTrainedTokenizerFast`, so `AutoTokenizer` loads it without this package and
without trusted code. The functions here work with any fast tokenizer.
"""

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END)
# Only in tokenizers for the masked objective. It takes the space before it, as RoBERTa's does: words carry theirs.
MASK = "<|mask|>"
# Not special, so that decoding for a person or a tool-call parser keeps them.
TOOL_TOKENS = ("<tool_call>", "</tool_call>")

# Exactly the split of Qwen2, one digit at a time: other runtimes know it by that name.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. Tools are announced in the system message, called by the assistant as `<tool_call>{json}</tool_call>` and
# answered in the role `tool`. A message's text is a string or a list of {"type": "text", "text": ...} parts.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- elif message.content -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set first_is_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if first_is_system -%}{{ text_of(messages[0]) + '\\n\\n' }}{%- endif -%}
{{ '# Tools\\n\\nCall a function with a JSON object {"name": ..., "arguments": {...}} between <tool_call> and \
</tool_call>. The functions:\\n' }}
{%- for tool in tools -%}{{ (tool.function if tool.function else tool) | tojson + '\\n' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{ raise_exception("role '" + message.role + "' is not one of system, user, assistant, tool") }}
{%- endif -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- generation -%}
{{ text_of(message) }}
{%- for tool_call in message.tool_calls or [] -%}
{%- set call = tool_call.function if tool_call.function else tool_call -%}
{{ ('\\n' if text_of(message) or not loop.first else '') + '<tool_call>\\n{"name": ' + call.name | tojson }}
{{- ', "arguments": ' + (call.arguments if call.arguments is string else call.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endgeneration -%}
{{ '\\n' }}
{%- elif not (tools and loop.first and first_is_system) -%}
{{ '<|im_start|>' + message.role + '\\n' + text_of(message) + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# How transformers' `parse_response` reads what the model wrote back into a message with `tool_calls`.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}


class EncodedConversation(TypedDict):
    """Token ids, and 1 for each token that the assistant wrote, its end token included."""

    input_ids: list[int]
    assistant_masks: list[int]


# No `__init__`: with one, transformers rebuilds the pre-tokenizer on loading and drops the trained one.
class ScratchGPTTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes as in GPT-2): any text round-trips exactly."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, mask_token: bool = False) -> "ScratchGPTTokenizer":
        """Train a tokenizer of `vocab_size` tokens, control tokens and the 256 bytes among them.

        A corpus too small for so many merges gives fewer: see `len(tokenizer)`.

        Args:
            texts (`Iterable[str]`): What to learn the merges from; read once.
            vocab_size (`int`): Tokens to make at most.
            mask_token (`bool`, *optional*, defaults to `False`): Add `<|mask|>`, after the other control tokens.

        Raises:
            ValueError: if `vocab_size` has no room for a merge, or if there is no text.
        """
        mask = [AddedToken(MASK, lstrip=True, special=True, normalized=False)] if mask_token else []
        control_tokens = [*SPECIAL_TOKENS, *TOOL_TOKENS, *mask]
        smallest = len(control_tokens) + 256
        if vocab_size <= smallest:
            raise ValueError(
                f"`vocab_size` is {vocab_size}; it must be above {smallest}: {len(control_tokens)} control tokens, "
                "256 bytes, and at least one merge"
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=control_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_non_empty(texts), trainer)
        return cls(
            tokenizer_object=_with_plain_tool_tokens(backend),
            eos_token=IM_END,
            pad_token=PAD,
            **({"mask_token": mask[0]} if mask else {}),
            extra_special_tokens=[END_OF_TEXT, IM_START],
            chat_template=CHAT_TEMPLATE,
            response_template=RESPONSE_TEMPLATE,
            clean_up_tokenization_spaces=False,
        )

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        """Name the plain class in the configuration just written: every environment has it."""
        config_file = Path(file_names[0])  # the template file follows
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")


def _with_plain_tool_tokens(backend: Tokenizer) -> Tokenizer:
    """The trainer makes all its control tokens special; the tool tokens should survive `skip_special_tokens`."""
    settings = json.loads(backend.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in TOOL_TOKENS
    return Tokenizer.from_str(json.dumps(settings))


class PlainEncoder:
    """Encodes text with a copy of a tokenizer that knows no control token, so that none can come out.

    A control token is any added token but the runs of white space that some tokenizers add, and the token for words
    that a tokenizer does not know, which only stands for such a word.

    Args:
        backend (`Tokenizer`): The copy.
        control_ids (`dict[str, int]`): The control tokens.
        renumber (`dict[int, int]`): Ids of the copy that the tokenizer numbers otherwise.
    """

    def __init__(self, backend: Tokenizer, control_ids: dict[str, int], renumber: dict[int, int]):
        self.backend, self.control_ids, self.renumber = backend, control_ids, renumber
        self.forbidden = frozenset(self.control_ids.values())
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
        names = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        unknown = names.pop("unk_token", None)  # GPT-2 names its end token so, which no text may give
        plain = {unknown} - set(names.values())
        return cls(
            backend, {token: i for token, i in added.items() if not token.isspace() and token not in plain}, renumber
        )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of plain text, and the characters (start, end) of each."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = self._checked(encoding.ids)
        if ids is not None:
            return ids, encoding.offsets
        return self._encode_apart(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts at once, on all cores."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        checked = (self._checked(encoding.ids) for encoding in encodings)
        return [self.encode(text)[0] if ids is None else ids for text, ids in zip(texts, checked, strict=True)]

    def _checked(self, ids: list[int]) -> list[int] | None:
        if self.renumber:
            ids = [self.renumber.get(i, i) for i in ids]
        return ids if self.forbidden.isdisjoint(ids) else None

    def _encode_apart(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """A model that has control tokens as whole words (Unigram) gives them for their letters: cut those in two."""
        cuts = [0, *(match.start() + 1 for match in self.pattern.finditer(text)), len(text)]
        all_ids: list[int] = []
        all_offsets: list[tuple[int, int]] = []
        for start, end in pairwise(cuts):
            encoding = self.backend.encode(text[start:end], add_special_tokens=False)
            ids = self._checked(encoding.ids)
            if ids is None:
                raise ValueError(f"this tokenizer gives a control token for the plain text {text[start:end]!r}")
            all_ids += ids
            all_offsets += [(start + first, start + last) for first, last in encoding.offsets]
        return all_ids, all_offsets


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
    tools: list[dict[str, Any] | Callable] | None = None,
) -> EncodedConversation:
    """Token ids of a conversation in which only the chat template writes control tokens, never a message.

    Where no message holds (part of) a control token this is `tokenizer.apply_chat_template`. `assistant_masks` is 1
    for what stands between the template's `{% generation %}` marks, and 0 everywhere if it has none. A token that
    begins before a mark, as where an answer begins with a line break after the template's own, is 0.

    Raises:
        ValueError: if the conversation is empty or the template refuses it; the message says why.
    """
    if not messages:
        raise ValueError("the conversation is empty; it needs at least one message")
    encoder = _plain_encoder(tokenizer)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    tools = tools and [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    text, spans = _render(tokenizer, messages, tools, add_generation_prompt)
    disguise = _Disguise(encoder, text)
    hidden, hidden_spans = _render(tokenizer, disguise.put_on(messages), disguise.put_on(tools), add_generation_prompt)
    if disguise.saw_control_token or encoder.pattern.findall(text) != encoder.pattern.findall(hidden):
        ids, offsets = _encode_disguised(encoder, disguise, hidden)
        spans = hidden_spans
    else:
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    written = [int(any(first <= start < last for first, last in spans) and end > start) for start, end in offsets]
    return {"input_ids": ids, "assistant_masks": written}


class _Disguise:
    """Rewrites user strings so that no character of theirs can be part of a control token in the rendered text.

    Each character that occurs in a control token is exchanged for one of private use that does not occur in the text,
    so a control token found after rendering was written by the template alone, and lengths stay.
    """

    def __init__(self, encoder: PlainEncoder, text: str):
        self.pattern = encoder.pattern
        self.saw_control_token = False
        in_text = set(text)
        free = (code for code in range(0xF0000, 0xFFFFD) if chr(code) not in in_text)
        self.table = {ord(character): next(free) for character in set("".join(encoder.control_ids))}
        self.original = {hidden: character for character, hidden in self.table.items()}

    def put_on(self, value: Any) -> Any:
        """The same messages or tools with every string disguised, but for names that templates compare with."""
        if isinstance(value, str):
            self.saw_control_token = self.saw_control_token or bool(self.pattern.search(value))
            return value.translate(self.table)
        if isinstance(value, dict):
            return {
                key if self._is_name(key) else self.put_on(key): item
                if key in ("role", "type") and self._is_name(item)
                else self.put_on(item)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.put_on(item) for item in value]
        return value

    def _is_name(self, value: Any) -> bool:
        return isinstance(value, str) and value.isidentifier() and not self.pattern.search(value)

    def take_off(self, text: str) -> str:
        return text.translate(self.original)


def _encode_disguised(encoder: PlainEncoder, disguise: _Disguise, text: str):
    """Ids and character offsets: control tokens where the template wrote them, all between them as plain text."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for match in [*encoder.pattern.finditer(text), None]:
        end = match.start() if match else len(text)
        plain_ids, plain_offsets = encoder.encode(disguise.take_off(text[position:end]))
        ids += plain_ids
        offsets += [(position + first, position + last) for first, last in plain_offsets]
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
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], spans[0]
