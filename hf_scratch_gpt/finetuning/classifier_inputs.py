"""Texts as a classifier reads them: plain text between control tokens that no text can contain.

A causal model reads `text <extract>` or `text <delimiter> text <extract>` and is scored at the last token, as in GPT-1
(Radford et al. 2018, section 3.3, https://openai.com/index/language-unsupervised/). A tokenizer that frames its texts
itself, as BERT's does by `[CLS]` and `[SEP]`, keeps its own frame. The saved tokenizer makes the very same ids, so
that `pipeline("text-classification")` reads what was trained.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from hf_scratch_gpt.finetuning.models import check_model_source
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_texts
from hf_scratch_gpt.runs.loading import loading

logger = logging.getLogger(__name__)

_DOCUMENT_END, _NEW_PAD = "<|endoftext|>", "<|pad|>"
_PROBE = "a"


def load_classifier_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, made fit for classification: framing its texts, and safe against what they say.

    Called with a text it gives the ids that are trained on; control tokens in it stay text, tool tokens included.
    Without a padding token of its own it gets one (the caller gives it a row in the embedding). Its chat template is
    left out: control tokens are never read from text any more.

    Raises:
        OSError, ValueError: if it cannot be loaded, or has no token that could end a text.
    """
    check_model_source(source)
    with loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{source}: has no fast tokenizer (no tokenizer.json)")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # A classifier is read at the last token that is not padding, which must not be the one that ends the text.
        logger.warning("%s: its tokenizer pads with no token of its own; %s is added", source, _NEW_PAD)
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
    if tokenizer.num_special_tokens_to_add() == 0:
        _frame_texts(source, tokenizer)
    _read_no_control_tokens(tokenizer)
    tokenizer.chat_template = None
    tokenizer.padding_side = "right"
    return tokenizer


def _frame_texts(source: str, tokenizer: Any) -> None:
    """Let the tokenizer put an extract token after the text, and a delimiter between two."""
    extract = _DOCUMENT_END if _DOCUMENT_END in tokenizer.get_vocab() else tokenizer.eos_token
    if extract is None:
        raise ValueError(f"{source}: its tokenizer has no end token (eos_token), which a classifier is read at")
    delimiter = tokenizer.eos_token or extract
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {extract}",
        pair=f"$A {delimiter} $B {extract}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {extract, delimiter}],
    )


def _read_no_control_tokens(tokenizer: Any) -> None:
    """Split all added tokens that stand in a text, here and after the tokenizer was saved.

    `split_special_tokens` splits special ones only, so all but runs of white space become special.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = not token["content"].isspace()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True


@dataclasses.dataclass(frozen=True)
class Frame:
    """The control tokens before, between and after texts, and the `token_type_ids` of the parts, if there are any."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[int, ...] | None

    @classmethod
    def of(cls, tokenizer: Any, pairs: bool) -> "Frame":
        """What a tokenizer puts around a text, or around and between two, found by encoding one."""
        texts = (_PROBE, _PROBE) if pairs else (_PROBE,)
        encoded = tokenizer(*texts, return_special_tokens_mask=True)
        parts: list[list[int]] = [[]]
        types: list[int] = []
        previous = 1
        for position, (token, special) in enumerate(
            zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ):
            if special:
                parts[-1].append(token)
            elif previous:
                parts.append([])
            if (special or previous) and "token_type_ids" in encoded:
                types.append(encoded["token_type_ids"][position])
            previous = special
        if len(parts) != len(texts) + 1:
            raise ValueError("the tokenizer puts nothing between two texts; give it a template for pairs")
        between = tuple(parts[1]) if pairs else ()
        return cls(tuple(parts[0]), between, tuple(parts[-1]), tuple(types) if types else None)

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


@dataclasses.dataclass
class EncodedTexts:
    """Rows of token ids as a classifier reads them; `token_type_ids` where the model has them; how many were cut."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    truncated: int


def encode_for_classifier(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, max_length: int | None
) -> EncodedTexts:
    """Encode texts, or pairs of texts; what is longer than `max_length` tokens loses its end (of the longer text).

    Raises:
        ValueError: if the control tokens alone leave no room for text.
    """
    frame = Frame.of(tokenizer, pairs is not None)
    room = None if max_length is None else max_length - len(frame)
    if room is not None and room < (1 if pairs is None else 2):
        raise ValueError(f"'max_length' is {max_length}, of which control tokens take {len(frame)}: no room for text")
    rows, truncated = [], 0
    columns = [encode_texts(tokenizer, texts)] + ([] if pairs is None else [encode_texts(tokenizer, pairs)])
    for parts in zip(*columns, strict=True):
        cut = _cut(parts, room)
        truncated += any(len(part) < len(whole) for part, whole in zip(cut, parts, strict=True))
        rows.append(cut)
    between = list(frame.between)
    ids = [[*frame.before, *row[0], *(between + row[1] if len(row) > 1 else []), *frame.after] for row in rows]
    types = None if frame.types is None else [_types(frame, row) for row in rows]
    return EncodedTexts(ids, types, truncated)


def _cut(parts: Sequence[list[int]], room: int | None) -> list[list[int]]:
    """Two texts share the room: the shorter keeps up to half of it, the longer has the rest (the longest first)."""
    if room is None or sum(map(len, parts)) <= room:
        return list(parts)
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = parts
    half = room // 2
    kept = min(len(first), max(room - half, room - len(second)))
    return [first[:kept], second[: room - kept]]


def _types(frame: Frame, row: list[list[int]]) -> list[int]:
    assert frame.types is not None
    sizes = [1] * len(frame.before) + [len(row[0])] + [1] * len(frame.between)
    sizes += ([len(row[1])] if len(row) > 1 else []) + [1] * len(frame.after)
    return [kind for kind, size in zip(frame.types, sizes, strict=True) for _ in range(size)]
