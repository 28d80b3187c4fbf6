"""The folder that `prepare` fills, as something that can be left at any moment and taken up again.

All that is written only grows: token shards, the held-out file, the signatures of documents. `.journal.json` says how
long each was when the reading stood at a certain document; it is replaced after each finished shard and every few
seconds. After a kill what lies beyond the journal is cut off, and the reading goes on from its document.
"""

import dataclasses
import logging
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hf_scratch_gpt.data.corpus import Position
from hf_scratch_gpt.data.corpus_cleaning import SIGNATURES, CorpusCleaning
from hf_scratch_gpt.data.data_report import DATA_REPORT
from hf_scratch_gpt.data.filters import CleaningSettings, FilterChain
from hf_scratch_gpt.data.manifest import MANIFEST
from hf_scratch_gpt.data.processing import ProcessedChunk
from hf_scratch_gpt.data.shards import SPLITS, ShardWriter
from hf_scratch_gpt.runs import read_json, write_json

logger = logging.getLogger(__name__)

HELDOUT = "heldout.jsonl"
_JOURNAL = ".journal.json"
_SECONDS_BETWEEN_NOTES = 5.0
_GREATEST_SHARE_OF_NOTES = 0.05  # of the time: the journal of a large corpus has some megabytes
_COUNTED = ("documents", "tokens", "bytes")


class TokenisedFolder:
    """Takes processed chunks in their order, removes duplicates, and writes what remains.

    Args:
        folder (`Path`): The run's folder.
        dtype (`np.dtype`): Type of a token on disk.
        separator_id (`int`): Id that follows each document.
        shard_tokens (`int`): Tokens of a shard.
        sources (`list[str]`): The sources in their order.
        cleaning_settings (`CleaningSettings`): Those of the workers.
        resume (`bool`): Go on from the journal, if there is a sound one; else begin anew.

    Attributes:
        position (`Position`): How far the corpus was read.
        cleaning (`CorpusCleaning`): Finds the duplicates, and knows what was removed so far.
        by_source (`dict[str, Counter]`): For each source `train_documents`, `train_tokens` and so on.
        reused_shards (`int`): Finished shards of an earlier try that were verified and kept.

    Raises:
        ValueError, FileNotFoundError: for filters that cannot be built, as `filters.build_filters`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        separator_id: int,
        shard_tokens: int,
        sources: list[str],
        cleaning_settings: CleaningSettings,
        resume: bool,
    ):
        self.folder, self.position = folder, Position()
        self.by_source: dict[str, Counter[str]] = {source: Counter() for source in sources}
        self.reused_shards = 0
        self._settings, self._cleaning_settings = (dtype, separator_id, shard_tokens), cleaning_settings
        self._filters = FilterChain(cleaning_settings).filters  # a wrong setting is no reason to begin anew
        self._due_at, self._noted_shards = time.monotonic() + _SECONDS_BETWEEN_NOTES, 0
        if not (resume and self._take_up()):
            self._begin()

    def _open(self, entries: dict[str, Any], heldout_bytes: int, cleaning: dict[str, Any] | None) -> None:
        self._writers = {
            split: ShardWriter(self.folder / split, *self._settings, entries.get(split)) for split in SPLITS
        }
        self.cleaning = CorpusCleaning(self._cleaning_settings, self._filters, self.folder, cleaning)
        path = self.folder / HELDOUT
        self._heldout = open(path, "r+b" if heldout_bytes else "wb")  # noqa: SIM115  # closed by `close`
        if os.fstat(self._heldout.fileno()).st_size < heldout_bytes:
            raise ValueError(f"{path}: shorter than the {heldout_bytes} bytes that were written")
        self._heldout.truncate(heldout_bytes)
        self._heldout.seek(heldout_bytes)

    def _begin(self) -> None:
        for name in (MANIFEST, DATA_REPORT, _JOURNAL, SIGNATURES, HELDOUT):
            (self.folder / name).unlink(missing_ok=True)
        for name in (*SPLITS, "tasks"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._open({}, 0, None)

    def _take_up(self) -> bool:
        path = self.folder / _JOURNAL
        if not path.is_file():
            return False
        (self.folder / MANIFEST).unlink(missing_ok=True)
        try:
            journal = read_json(path)
            self._open(journal["splits"], journal["heldout_bytes"], journal["cleaning"])
            self.position = Position(**journal["position"])
            by_source = journal["by_source"]
            self.by_source = {source: Counter(by_source[source]) for source in self.by_source}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("cannot go on from an interrupted try, so it is made anew: %s", error)
            return False
        self.reused_shards = self._noted_shards = self._finished_shards()
        return True

    def _finished_shards(self) -> int:
        return sum(writer.finished_shards for writer in self._writers.values())

    @property
    def documents(self) -> Counter[str]:
        """Documents so far in `"train"` and `"heldout"`."""
        return Counter({split: writer.documents for split, writer in self._writers.items()})

    @property
    def tokens(self) -> int:
        """Tokens so far, of both splits."""
        return sum(writer.tokens for writer in self._writers.values())

    def add(self, chunk: ProcessedChunk, position: Position) -> None:
        """Write what remains of the next chunk, and note the `position` behind it if it is time to."""
        new, splits = self.cleaning.add(chunk), np.array(chunk.splits)
        for split in SPLITS:
            self._add_split(chunk, split, new & (splits == split))
        for row, kept in zip(chunk.rows, new.tolist(), strict=True):
            if row and kept:
                self._heldout.write(row.encode())
        self.position = position
        if time.monotonic() > self._due_at or self._finished_shards() > self._noted_shards:
            self.note()

    def _add_split(self, chunk: ProcessedChunk, split: str, chosen: np.ndarray) -> None:
        tokens = chunk.tokens[np.repeat(chosen, chunk.lengths)]
        self._writers[split].extend(tokens, int(chosen.sum()), int(chunk.sizes[chosen].sum()))
        sources = np.array([document.source for document in chunk.documents])
        for source in dict.fromkeys(sources.tolist()):
            mine = chosen & (sources == source)
            sizes = (mine.sum(), chunk.lengths[mine].sum(), chunk.sizes[mine].sum())
            self.by_source[source].update(
                {f"{split}_{name}": int(size) for name, size in zip(_COUNTED, sizes, strict=True)}
            )

    def note(self) -> None:
        """Bring everything to the disk and the journal up to it."""
        begin = time.monotonic()
        self._heldout.flush()
        os.fsync(self._heldout.fileno())
        journal = {
            "splits": {split: writer.flush() for split, writer in self._writers.items()},
            "heldout_bytes": self._heldout.tell(),
            "cleaning": self.cleaning.to_state(),
            "position": dataclasses.asdict(self.position),
            "by_source": {source: dict(sizes) for source, sizes in self.by_source.items()},
        }
        write_json(self.folder / _JOURNAL, journal)
        end = time.monotonic()
        self._due_at = end + max(_SECONDS_BETWEEN_NOTES, (end - begin) / _GREATEST_SHARE_OF_NOTES)
        self._noted_shards = self._finished_shards()

    def close(self) -> dict[str, Any]:
        """Finish the last shards; returns the manifest's `splits`, in which each source has its range of tokens."""
        splits = {split: writer.close() for split, writer in self._writers.items()}
        self.note()
        self._heldout.close()
        self.cleaning.close()
        for split, entry in splits.items():
            entry["sources"] = []
            start = 0
            for source, sizes in self.by_source.items():
                counts = {name: sizes[f"{split}_{name}"] for name in _COUNTED}
                entry["sources"].append({"source": source, "start": start, **counts})
                start += counts["tokens"]
        return splits

    def remove_journal(self) -> None:
        """Remove what only served to go on; call it when the manifest is written."""
        for name in (_JOURNAL, SIGNATURES):
            (self.folder / name).unlink(missing_ok=True)
