"""What a worker does to a chunk of documents: clean, split, encode.

It is a pure function of the chunk, so that the result is the same whichever of how many workers did it.

What needs the whole corpus, the removal of duplicates, is left to the process that takes the chunks in their order: a
worker only makes the signatures by which a duplicate is known.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from hf_scratch_gpt.data.documents import DERIVED, Document, split_of
from hf_scratch_gpt.data.encoding import DocumentEncoder, EncoderSettings
from hf_scratch_gpt.data.filters import CleaningSettings, FilterChain, Tally
from hf_scratch_gpt.data.statistics import EXCERPT_CHARACTERS


@dataclasses.dataclass(frozen=True)
class ProcessorSettings:
    """All that makes a `Processor`, to be sent to another process.

    Args:
        cleaning (`CleaningSettings`): Which filters.
        encoder (`EncoderSettings`): Of the tokenizer.
        separator_id (`int`): Id that follows each document.
        seed, heldout_fraction: What decides the split.
    """

    cleaning: CleaningSettings
    encoder: EncoderSettings
    separator_id: int
    seed: int
    heldout_fraction: float


@dataclasses.dataclass
class ProcessedChunk:
    """What remains of a chunk, in its order.

    Args:
        documents (`list[Document]`): The cleaned documents, each with the first `EXCERPT_CHARACTERS` of its text.
        splits (`list[str]`): Of each document, `"train"`, `"heldout"` or `DERIVED`.
        sizes, characters (`np.ndarray`): Bytes and characters of each document's whole cleaned text, int64.
        signatures (`list[tuple]`): Of each document, for `DuplicateChain`.
        lengths (`np.ndarray`): Tokens of each document with its separator, int64; 0 for a derived one.
        tokens (`np.ndarray`): The tokens of all of them, each document followed by the separator.
        rows (`list[str]`): For each document its line of the held-out file; empty for those of training.
        tallies (`dict[str, Tally]`): What each filter did.
    """

    documents: list[Document]
    splits: list[str]
    sizes: np.ndarray
    characters: np.ndarray
    signatures: list[tuple[Any, ...]]
    lengths: np.ndarray
    tokens: np.ndarray
    rows: list[str]
    tallies: dict[str, Tally]


class Processor:
    """Turns chunks of documents into what is written of them.

    Args:
        settings (`ProcessorSettings`): See there.

    Raises:
        ValueError, FileNotFoundError: as `filters.build_filters`.
    """

    def __init__(self, settings: ProcessorSettings):
        self._settings = settings
        self._chain = FilterChain(settings.cleaning)
        self._encoder = DocumentEncoder(settings.encoder)
        self._separator = np.array([settings.separator_id], settings.encoder.dtype)

    def process(self, documents: list[Document]) -> ProcessedChunk:
        """Clean, split and encode `documents`.

        Raises:
            ValueError: for a tokenizer that gives a control token for plain text.
        """
        cleaned = map(self._chain, map(_with_writable_id, documents))
        kept = [document for document in cleaned if document is not None]
        seed, fraction = self._settings.seed, self._settings.heldout_fraction
        splits = [split_of(document, seed, fraction) for document in kept]
        texts = [document.text for document, split in zip(kept, splits, strict=True) if split != DERIVED]
        encoded = iter(self._encoder.encode(texts))
        parts: list[np.ndarray] = []
        lengths = np.zeros(len(kept), np.int64)
        for number, split in enumerate(splits):
            if split != DERIVED:
                ids = next(encoded)
                parts += [ids, self._separator]
                lengths[number] = len(ids) + 1
        rows = [_row(document) if split == "heldout" else "" for document, split in zip(kept, splits, strict=True)]
        return ProcessedChunk(
            [dataclasses.replace(document, text=document.text[:EXCERPT_CHARACTERS]) for document in kept],
            splits,
            np.array([len(document.text.encode()) for document in kept], np.int64),
            np.array([len(document.text) for document in kept], np.int64),
            [self._chain.signatures(document) for document in kept],
            lengths,
            np.concatenate([self._separator[:0], *parts]),
            rows,
            self._chain.take_tallies(),
        )


def _with_writable_id(document: Document) -> Document:
    """The document, in the same split, with an id that UTF-8 can write: names of files may be any bytes."""
    written = document.id.encode("utf-8", "backslashreplace").decode()
    if written == document.id:
        return document
    return dataclasses.replace(document, id=written, group=document.split_group)


def _row(document: Document) -> str:
    row: dict[str, Any] = {"text": document.text, "source": document.source, "id": document.id}
    return json.dumps(row, ensure_ascii=False) + "\n"
