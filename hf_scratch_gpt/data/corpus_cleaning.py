"""The part of cleaning that needs the whole corpus: duplicates, and what the data report tells.

It runs in one process, which gets the documents in their order as workers cleaned them (see `processing`). Its state
goes into the journal of `tokenised` and the signatures of documents into a file, so that an interrupted run that goes
on ends with the same report.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_scratch_gpt.data.data_report import make_data_report
from hf_scratch_gpt.data.documents import DERIVED
from hf_scratch_gpt.data.filters import (
    CleaningSettings,
    DuplicateChain,
    Filter,
    Tally,
    merge_tallies,
    removed_counts,
)
from hf_scratch_gpt.data.processing import ProcessedChunk
from hf_scratch_gpt.data.seen import RecordFile
from hf_scratch_gpt.data.statistics import CorpusStatistics

SIGNATURES = ".signatures.bin"


class CorpusCleaning:
    """Removes duplicates from processed chunks, in their order, and adds up what all filters did.

    Args:
        settings (`CleaningSettings`): Those of the workers.
        filters (`Sequence[Filter]`): Those of `FilterChain(settings)`.
        folder (`Path`): Where the file of signatures is.
        state (`Mapping`, *optional*): What `to_state` gave, to go on from there.

    Raises:
        ValueError, OSError, KeyError, TypeError: for a state or a file of signatures that is damaged.
    """

    def __init__(
        self,
        settings: CleaningSettings,
        filters: Sequence[Filter],
        folder: Path,
        state: Mapping[str, Any] | None = None,
    ):
        self._filters, self._tallies = filters, {filter_.name: Tally() for filter_ in filters}
        self._duplicates = DuplicateChain(settings)
        self._statistics = CorpusStatistics()
        self._derived_heldout_documents = 0
        count = state["signatures"] if state else 0
        self._signatures = RecordFile(folder / SIGNATURES, self._duplicates.signature_bytes, count)
        if state:
            self._duplicates.restore(state["duplicates"], map(self._duplicates.unpack, self._signatures))
            self._tallies = {name: Tally.from_state(state["tallies"][name]) for name in self._tallies}
            self._statistics = CorpusStatistics.from_state(state["statistics"])
            self._derived_heldout_documents = state["derived_heldout_documents"]

    def add(self, chunk: ProcessedChunk) -> np.ndarray:
        """Take the next chunk; returns which of its documents repeat none before them, bool, one for each."""
        merge_tallies(self._tallies, chunk.tallies)
        keep = np.zeros(len(chunk.documents), bool)
        sizes, characters, lengths = (each.tolist() for each in (chunk.sizes, chunk.characters, chunk.lengths))
        for number, (document, split) in enumerate(zip(chunk.documents, chunk.splits, strict=True)):
            signatures = chunk.signatures[number]
            self._signatures.append(self._duplicates.pack(signatures))
            keep[number] = self._duplicates.keep(document, signatures, sizes[number])
            if not keep[number]:
                continue
            if split == DERIVED:
                self._derived_heldout_documents += 1
                continue
            # The separator behind a document is none of its tokens.
            self._statistics.add(document.id, document.source, document.text, characters[number], lengths[number] - 1)
        return keep

    @property
    def removed(self) -> Counter[str]:
        """What was removed so far (see `filters.removed_counts`), and `derived_heldout_documents`."""
        removed = removed_counts(self._tallies | self._duplicates.tallies)
        removed["derived_heldout_documents"] = self._derived_heldout_documents
        return removed

    def data_report(self) -> dict[str, Any]:
        """What the filters did and what is left: see `data_report.make_data_report`."""
        return make_data_report(
            [*self._filters, *self._duplicates.filters],
            self._tallies | self._duplicates.tallies,
            self._duplicates.describe_clusters(),
            self._statistics,
            {"derived_heldout_documents": self._derived_heldout_documents},
        )

    def to_state(self) -> dict[str, Any]:
        """JSON values to go on from; the signatures are on the disk when it returns."""
        self._signatures.flush()
        return {
            "signatures": len(self._signatures),
            "duplicates": self._duplicates.to_state(),
            "tallies": {name: tally.to_state() for name, tally in self._tallies.items()},
            "statistics": self._statistics.to_state(),
            "derived_heldout_documents": self._derived_heldout_documents,
        }

    def close(self) -> None:
        """Close the file of signatures."""
        self._signatures.close()
