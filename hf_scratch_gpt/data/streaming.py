"""Training text straight from its sources, encoded while it is trained on: no shards, and what that costs.

The documents come in the order of the sources, once, each followed by the separator; windows are cut one after the
other without regard to where documents end, as from shards that were read in order. So there is no shuffling, no
mixture and no second epoch. Filters are those of the prepared folder, but for duplicates, which need the corpus
before them; documents of its held-out text are left out.

A batch is the next piece of one order, so a process that wants an earlier one, or begins anew, reads the stream again
from its start and passes over what comes before. A digest of all tokens up to a batch tells whether it is the same
stream; of several processes each reads all of it and takes its rows.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.data.documents import Document
from hf_scratch_gpt.data.encoding import DocumentEncoder, encoder_settings
from hf_scratch_gpt.data.filters import CleaningSettings, FilterChain, removed_counts
from hf_scratch_gpt.data.filters.duplicates import content_hash
from hf_scratch_gpt.data.loader import document_positions
from hf_scratch_gpt.data.shards import separator_id
from hf_scratch_gpt.data.sources import read_documents

logger = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 200_000  # that are encoded at a time
_DIGEST_BYTES = 16
_BATCHES_WORTH_A_WORD = 1000

# Batches read so far, and the digest of their tokens.
StreamPosition = tuple[int, str]


def stream_cleaning(manifest: dict[str, Any], folder: Any) -> CleaningSettings:
    """The filters that made a prepared folder, from its manifest.

    Raises:
        ValueError: if the manifest does not tell them.
    """
    cleaning = manifest.get("cleaning")
    if not isinstance(cleaning, dict) or not isinstance(cleaning.get("filters"), list):
        raise ValueError(f"{folder}: does not tell its filters, which a stream needs; run the stage 'prepare' again")
    sets, words = cleaning.get("evaluation_sets", []), cleaning.get("toxic_words")
    return CleaningSettings(tuple(cleaning["filters"]), tuple(sets), words, cleaning.get("seed", 42))


class StreamWindows:
    """Consecutive windows of what the sources give.

    Args:
        sources (`list[str]`): Read one after the other (see `read_documents`).
        tokenizer: Of the prepared folder.
        cleaning (`CleaningSettings`): Its filters; those that find duplicates are passed over.
        heldout (`list[str]`): Texts that must not be trained on.
        context_length (`int`): Tokens of a window.
        batch_size (`int`): Windows of a batch, over all processes.
        text_column, split (`str`): See `read_documents`.

    Raises:
        ValueError, FileNotFoundError: for filters that cannot be built, as `filters.build_filters`.
    """

    def __init__(
        self,
        sources: list[str],
        tokenizer: Any,
        cleaning: CleaningSettings,
        heldout: list[str],
        context_length: int,
        batch_size: int,
        text_column: str = "text",
        split: str = "train",
    ):
        self.name = "stream " + ", ".join(sources)
        self.context_length, self.batch_size = context_length, batch_size
        self._sources, self._columns, self._cleaning = sources, (text_column, split), cleaning
        self._heldout = frozenset(map(content_hash, heldout))
        settings = encoder_settings(tokenizer)
        self._encoder, self._dtype = DocumentEncoder(settings), np.dtype(settings.dtype)
        self._separator = np.array([separator_id(tokenizer)], self._dtype)
        self._restart()

    def _restart(self) -> None:
        self._filters = FilterChain(self._cleaning)
        self._left_out: Counter[str] = Counter()
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._read = 0
        self._batch = np.empty((0, 0), self._dtype)
        self._rest = np.empty(0, self._dtype)
        self._chunks = self._encode()

    @property
    def position(self) -> StreamPosition:
        """Behind the last batch that was read."""
        return self._read, self._digest.hexdigest()

    @property
    def removed(self) -> Counter[str]:
        """What the filters removed of what was read so far (see `removed_counts`); `heldout_documents`, and
        `derived_documents` that repeat parts of others."""
        return removed_counts(self._filters.tallies) + self._left_out

    def batch(
        self, number: int, rank: int = 0, world_size: int = 1, known: StreamPosition | None = None
    ) -> dict[str, torch.Tensor]:
        """The rows of a rank of batch `number`, from 0; as `batch_windows` gives them.

        Args:
            number (`int`): Of the batch. One before the last that was read costs reading all before it again.
            rank, world_size (`int`, *optional*, defaults to `0` and `1`): This process among all.
            known (`tuple`, *optional*): A `position` at which training stood; checked where the reading comes by.

        Returns:
            `dict`: `input_ids` and `position_ids`, int64 of shape (batch_size / world_size, context_length).

        Raises:
            ValueError: if the stream ends before the batch does, or is not the one that `known` is of.
            FileNotFoundError, OSError: for a source that cannot be read.
        """
        if number < self._read - 1:
            self._restart()
        if number - self._read > _BATCHES_WORTH_A_WORD:
            logger.warning("%s: passing over %d batches that were trained on", self.name, number - self._read)
        while self._read <= number:
            self._advance(known)
            self._check(known)
        rows = self.batch_size // world_size
        input_ids = self._batch[rank * rows : (rank + 1) * rows].astype(np.int64)
        positions = document_positions(input_ids, int(self._separator[0]))
        return {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(positions)}

    def _check(self, known: StreamPosition | None) -> None:
        if known is not None and known[0] == self._read and known[1] != self._digest.hexdigest():
            raise self._changed(known, "are others")

    def _changed(self, known: StreamPosition, how: str) -> ValueError:
        tokens = known[0] * self.batch_size * self.context_length
        return ValueError(
            f"{self.name}: has changed: the first {tokens} tokens, which were trained on, {how} now; bring the same "
            "text back, or train anew in another output_dir"
        )

    def _advance(self, known: StreamPosition | None) -> None:
        """Read the next batch."""
        wanted = self.batch_size * self.context_length
        parts, size = [self._rest], len(self._rest)
        while size < wanted:
            chunk = next(self._chunks, None)
            if chunk is None:
                if known is not None and self._read < known[0]:
                    raise self._changed(known, "are fewer")
                raise ValueError(
                    f"{self.name}: ends after {self._read * wanted + size} tokens, {self._read} batches of {wanted}, "
                    "before the run does; add text at its end and start again, which goes on from the last "
                    "checkpoint, or let `scratch-gpt prepare` write shards, which are read more than once"
                )
            parts.append(chunk)
            size += len(chunk)
        tokens = np.concatenate(parts)
        self._rest = tokens[wanted:]
        self._batch = tokens[:wanted].reshape(self.batch_size, self.context_length)
        self._digest.update(self._batch.tobytes())
        self._read += 1

    def _encode(self) -> Iterator[np.ndarray]:
        """The stream's tokens, in chunks of some documents."""
        texts: list[str] = []
        size = 0
        for document in self._documents():
            texts.append(document.text)
            size += len(document.text)
            if size >= _CHUNK_CHARACTERS:
                yield self._join(texts)
                texts, size = [], 0
        if texts:
            yield self._join(texts)

    def _join(self, texts: list[str]) -> np.ndarray:
        return np.concatenate([part for ids in self._encoder.encode(texts) for part in (ids, self._separator)])

    def _documents(self) -> Iterator[Document]:
        documents = chain.from_iterable(read_documents(source, *self._columns) for source in self._sources)
        for document in documents:
            if document.derived:
                self._left_out["derived_documents"] += 1
                continue
            cleaned = self._filters(document)
            if cleaned is None:
                continue
            if content_hash(cleaned.text) in self._heldout:
                self._left_out["heldout_documents"] += 1
                continue
            yield cleaned
