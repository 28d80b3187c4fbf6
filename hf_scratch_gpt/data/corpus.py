"""The corpus of a run: sources, cleaned and split. `tokenizer` and `prepare` read it with the same settings."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from hf_scratch_gpt.data.cleaning import Cleaner
from hf_scratch_gpt.data.documents import Document, is_heldout
from hf_scratch_gpt.data.sources import PYTHON_DOCS, read_documents
from hf_scratch_gpt.runs import StageArguments


@dataclasses.dataclass
class CorpusArguments(StageArguments):
    """What text a stage reads and how it is split.

    Args:
        sources (`list[str]`, *optional*, defaults to `["python-docs"]`): Files, folders, `datasets` ids, or
            `"python-docs"`.
        text_column (`str`, *optional*, defaults to `"text"`): Column of tables that holds the text.
        dataset_split (`str`, *optional*, defaults to `"train"`): Split of `datasets` ids.
        heldout_fraction (`float`, *optional*, defaults to `0.03`): Share of the documents that is held out, chosen by
            a hash of `seed` and the document's group.
    """

    sources: list[str] = dataclasses.field(
        default_factory=lambda: [PYTHON_DOCS],
        metadata={"help": "Files, folders, data set ids (owner/name or owner/name:configuration), or python-docs."},
    )
    text_column: str = dataclasses.field(
        default="text",
        metadata={"help": "Column of tables that holds the text; a number for .csv and .tsv without a header line."},
    )
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "Split of data set ids."})
    heldout_fraction: float = dataclasses.field(
        default=0.03, metadata={"help": "Share of documents held out; give tokenizer and prepare the same."}
    )

    def split_settings(self) -> dict[str, object]:
        """What decides which documents are held out."""
        return {"seed": self.seed, "heldout_fraction": self.heldout_fraction}


class Corpus:
    """Cleaned documents with their split, streamed; iterate once.

    Attributes:
        removed (`Counter`): What each filter removed so far (see `Cleaner.removed`), and `derived_heldout_documents`:
            pages that repeat held-out text and are therefore in no split.
        documents (`Counter`): Documents so far in `"train"` and `"heldout"`.

    Raises:
        ValueError: if a source is unreadable, nothing is left after cleaning, or a split is empty in the end.
    """

    def __init__(self, arguments: CorpusArguments):
        if not arguments.sources:
            raise ValueError("'sources' is empty: name a file, a folder, a data set id, or python-docs")
        if not 0 < arguments.heldout_fraction < 1:
            raise ValueError(f"'heldout_fraction' is {arguments.heldout_fraction}, expected a number between 0 and 1")
        self.arguments = arguments
        self.documents: Counter[str] = Counter(train=0, heldout=0)
        self._cleaner = Cleaner()
        self.removed = self._cleaner.removed
        self.removed["derived_heldout_documents"] = 0

    def _read(self) -> Iterator[Document]:
        for source in self.arguments.sources:
            yield from read_documents(source, self.arguments.text_column, self.arguments.dataset_split)

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        for document in self._cleaner.clean(self._read()):
            heldout = is_heldout(document.split_group, self.arguments.seed, self.arguments.heldout_fraction)
            if heldout and document.derived:
                self.removed["derived_heldout_documents"] += 1
                continue
            split = "heldout" if heldout else "train"
            self.documents[split] += 1
            yield split, document
        self._check()

    def _check(self) -> None:
        total = self.documents.total()
        if not total:
            raise ValueError(f"no document is left of {', '.join(self.arguments.sources)}: {dict(self.removed)}")
        fraction = self.arguments.heldout_fraction
        for split, count in self.documents.items():
            if not count:
                wanted = "a larger" if split == "heldout" else "a smaller"
                raise ValueError(
                    f"none of {total} documents fell into the {split} part at heldout_fraction {fraction}; use "
                    f"{wanted} one (for {total} documents about {min(0.5, 4 / total):.2g}), or more text"
                )
