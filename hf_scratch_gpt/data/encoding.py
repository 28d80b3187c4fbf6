"""Token ids of many documents, for a process of its own: needs `tokenizers` but neither transformers nor torch.

The library splits a text with a regular expression and looks its pieces up one by one: 3.5 MB/s a core on code, of
which the splitting is the larger half. For our own splitting pattern the same pieces come five to ten times as fast
from `re` (text in ASCII) or `regex` (other text), and a table remembers the ids of a piece that was seen before:
17 MB/s. The first text of each batch is encoded both ways.
"""

import dataclasses
import json
import re
from typing import Any

import numpy as np

# What `SPLIT_PATTERN` of `tokenization_scratch_gpt` is on text in ASCII; `re` reads that twice as fast as `regex`.
_ASCII_PATTERN = re.compile(
    r"[^\r\nA-Za-z0-9']?[A-Za-z]+|[0-9]|'(?i:s|t|re|ve|m|ll|d)|'[A-Za-z]+| ?[^\t-\r A-Za-z0-9]+[\r\n]*"
    r"|[\t-\r ]*[\r\n]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
_CLASSES = (r"\p{L}", r"\p{N}", r"\s")
_MAX_REMEMBERED = 300_000  # pieces, some 40 MB
_MAX_PIECE = 48  # characters; longer ones hardly come again
_CHECKED_CHARACTERS = 5_000


@dataclasses.dataclass(frozen=True)
class EncoderSettings:
    """All that makes a `DocumentEncoder`, to be sent to another process.

    Args:
        backend (`str`): The tokenizer without its control tokens, as the library writes it.
        dtype (`str`): Type of a token: `"<u2"` or `"<u4"`.
        control_ids (`dict[str, int]`): The control tokens, which no text may give.
        renumber (`dict[int, int]`): Ids of `backend` that the tokenizer numbers otherwise.
        split_pattern (`str`): Our own splitting pattern.
        unknown_id (`int`, *optional*): The token of letters that the vocabulary lacks, which text may give.
    """

    backend: str
    dtype: str
    control_ids: dict[str, int]
    renumber: dict[int, int]
    split_pattern: str
    unknown_id: int | None = None


def encoder_settings(tokenizer: Any) -> EncoderSettings:
    """The settings of the encoder that gives the ids of `encode_texts(tokenizer, ...)`."""
    from hf_scratch_gpt.data.shards import token_dtype
    from hf_scratch_gpt.model.tokenization_scratch_gpt import SPLIT_PATTERN, PlainEncoder

    plain = PlainEncoder.from_tokenizer(tokenizer)
    dtype = token_dtype(len(tokenizer)).str
    return EncoderSettings(
        plain.backend.to_str(), dtype, plain.control_ids, plain.renumber, SPLIT_PATTERN, plain.unknown_id
    )


class _ControlToken(Exception):
    """A piece of plain text has the id of a control token."""


class _PieceTable(dict):
    """The ids of pieces as bytes, looked up once."""

    def __init__(self, backend: Any, dtype: np.dtype, forbidden: frozenset[int]):
        super().__init__()
        self._backend, self._dtype, self._forbidden = backend, dtype, forbidden

    def __missing__(self, piece: str) -> bytes:
        ids = self._backend.encode(piece, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(ids):
            raise _ControlToken
        content = np.array(ids, self._dtype).tobytes()
        if len(piece) <= _MAX_PIECE:
            if len(self) >= _MAX_REMEMBERED:
                self.clear()
            self[piece] = content
        return content


class _FastSplitter:
    """Pieces of a text under our splitting pattern, where `re` and `regex` are known to agree with the library."""

    def __init__(self, pattern: str):
        import regex
        from tokenizers import Regex, pre_tokenizers

        self._pattern = regex.compile(pattern)
        self._classes = [(regex.compile(name), pre_tokenizers.Split(Regex(name), "removed")) for name in _CLASSES]
        self._agreed: set[str] = set(map(chr, range(128)))
        self._disputed: set[str] = set()

    def split(self, text: str) -> list[str] | None:
        """The pieces, or `None` if the text has a character that the two Unicode tables may class differently."""
        if text.isascii():
            return _ASCII_PATTERN.findall(text)
        unknown = set(text) - self._agreed
        if unknown:
            self._check(sorted(unknown - self._disputed))
            if not unknown <= self._agreed:
                return None
        return self._pattern.findall(text)

    def _check(self, characters: list[str]) -> None:
        for character in characters:
            same = all(
                bool(ours.match(character)) == (not theirs.pre_tokenize_str(character))
                for ours, theirs in self._classes
            )
            # The pattern ignores case after an apostrophe: the long s is an s.
            folds = character.casefold() in set("stremvld")
            (self._agreed if same and not folds else self._disputed).add(character)


class DocumentEncoder:
    """Encodes texts in which control tokens are plain text, on one core, equal to the library id by id.

    Attributes:
        fast (`bool`): The tokenizer splits as ours does, so that the table of pieces is used.
    """

    def __init__(self, settings: EncoderSettings):
        from tokenizers import Tokenizer

        self._settings = settings
        self._dtype = np.dtype(settings.dtype)
        self._forbidden = frozenset(settings.control_ids.values()) - {settings.unknown_id}
        self._backend = Tokenizer.from_str(settings.backend)
        self.fast = _splits_like(json.loads(settings.backend), settings.split_pattern) and not settings.renumber
        if self.fast:
            self._splitter = _FastSplitter(settings.split_pattern)
            self._table = _PieceTable(_without_split(settings.backend), self._dtype, self._forbidden)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, each of shape (tokens,) and the settings' type.

        Raises:
            ValueError: for a tokenizer that gives a control token for plain text.
        """
        if not self.fast:
            return self._encode_plainly(texts)
        encoded = [self._encode_fast(text) for text in texts]
        if texts:  # cheap insurance: another version of a library might split in another way
            text = texts[0][:_CHECKED_CHARACTERS]
            again = self._encode_plainly([text])[0]
            assert np.array_equal(self._encode_fast(text), again), f"two encoders differ on {text[:200]!r}"
        return encoded

    def _encode_plainly(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._checked(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def _checked(self, text: str, ids: list[int]) -> np.ndarray:
        renumber = self._settings.renumber
        if renumber:
            ids = [renumber.get(i, i) for i in ids]
        if not self._forbidden.isdisjoint(ids):  # rare, and what mends it brings transformers and torch with it
            from hf_scratch_gpt.model.tokenization_scratch_gpt import PlainEncoder

            settings = self._settings
            ids = PlainEncoder(self._backend, settings.control_ids, renumber, settings.unknown_id).encode(text)[0]
        return np.array(ids, self._dtype)

    def _encode_fast(self, text: str) -> np.ndarray:
        pieces = self._splitter.split(text)
        if pieces is not None:
            try:
                return np.frombuffer(b"".join(map(self._table.__getitem__, pieces)), self._dtype)
            except _ControlToken:
                pass
        return self._encode_plainly([text])[0]


def _splits_like(backend: dict[str, Any], pattern: str) -> bool:
    """Whether the tokenizer does nothing but split by `pattern` and encode the bytes of each piece."""
    expected = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    steps = (backend["pre_tokenizer"] or {}).get("pretokenizers", [])
    steps = [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]
    simple = not backend["added_tokens"] and backend["normalizer"] is None and not backend["model"].get("dropout")
    return simple and steps == expected


def _without_split(backend: str) -> Any:
    from tokenizers import Tokenizer, pre_tokenizers

    copy = Tokenizer.from_str(backend)
    copy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return copy
