"""The corpus of a run: sources, cleaned and split. `tokenizer` and `prepare` read it with the same settings."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from hf_scratch_gpt.data.cleaning import Cleaner
from hf_scratch_gpt.data.documents import DERIVED, Document, split_of
from hf_scratch_gpt.data.filters import DEFAULT_FILTERS, CleaningSettings, FilterSetting
from hf_scratch_gpt.data.sources import PYTHON_DOCS, no_text, read_documents, source_parts
from hf_scratch_gpt.runs import StageArguments


@dataclasses.dataclass
class CorpusArguments(StageArguments):
    """What text a stage reads and how it is split.

    Args:
        sources (`list[str]`, *optional*, defaults to `["python-docs"]`): Files, folders, `datasets` ids, or
            `"python-docs"`.
        text_column (`str`, *optional*, defaults to `"text"`): Column of tables that holds the text.
        dataset_split (`str`, *optional*, defaults to `"train"`): Split of `datasets` ids.
        group_column (`str`, *optional*): Column of tables that names what a document is part of, such as a project or
            an author: all documents of a group go to the same split, so that what is held out is of other groups.
        heldout_fraction (`float`, *optional*, defaults to `0.03`): Share of the documents that is held out, chosen by
            a hash of `seed` and the document's group.
        filters (`list`, *optional*, defaults to control_characters, licence_headers, empty, exact_duplicates): Names
            of filters in their order, or mappings of a name to its options (see `filters.FILTERS`).
        evaluation_sets (`list[str]`, *optional*): Files, folders or `tasks`, whose questions the filter
            `decontamination` keeps out of the text.
        toxic_words (`str`, *optional*): File with a word a line, for the filter `toxic_words`.
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
    group_column: str = dataclasses.field(
        default="",
        metadata={"help": "Column of tables that names a group of documents, held out or trained on as a whole."},
    )
    heldout_fraction: float = dataclasses.field(
        default=0.03, metadata={"help": "Share of documents held out; give tokenizer and prepare the same."}
    )
    filters: list[FilterSetting] = dataclasses.field(
        default_factory=lambda: list(DEFAULT_FILTERS),  # type: ignore[arg-type]  # read ones are texts and mappings
        metadata={"help": 'Filters in their order, such as empty or "language: {keep: [en]}".'},
    )
    evaluation_sets: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Files, folders or tasks with questions that the filter decontamination keeps out."},
    )
    toxic_words: str | None = dataclasses.field(
        default=None, metadata={"help": "File with a word a line, for the filter toxic_words."}
    )

    def split_settings(self) -> dict[str, object]:
        """What decides which documents are held out."""
        grouped = {"group_column": self.group_column} if self.group_column else {}
        return {"seed": self.seed, "heldout_fraction": self.heldout_fraction, **grouped}

    def cleaning_settings(self) -> CleaningSettings:
        """What decides which documents are left, and how they are changed."""
        return CleaningSettings(tuple(self.filters), tuple(self.evaluation_sets), self.toxic_words, self.seed)


def check_corpus_arguments(arguments: CorpusArguments) -> None:
    """Check what can be checked before any text is read.

    Raises:
        ValueError: for no source or one named twice, or a `heldout_fraction` that is no fraction.
    """
    if not arguments.sources:
        raise ValueError("'sources' is empty: name a file, a folder, a data set id, or python-docs")
    twice = next((source for source in arguments.sources if arguments.sources.count(source) > 1), None)
    if twice is not None:
        raise ValueError(
            f"'sources' names {twice} twice, and the second would be removed as duplicates of the first; to see it "
            "more often give it a larger weight in 'mixture'"
        )
    if not 0 < arguments.heldout_fraction < 1:
        raise ValueError(f"'heldout_fraction' is {arguments.heldout_fraction}, expected a number between 0 and 1")


def check_splits(arguments: CorpusArguments, documents: Counter[str], removed: Counter[str]) -> None:
    """Check that a corpus that was read to its end left something to train on and something to hold out.

    Args:
        documents (`Counter`): Documents in `"train"` and `"heldout"`.
        removed (`Counter`): What the filters removed, for the message.

    Raises:
        ValueError: if a split is empty, saying what to do.
    """
    total = documents.total()
    if not total:
        raise ValueError(f"no document is left of {', '.join(arguments.sources)}: {dict(removed)}")
    fraction = arguments.heldout_fraction
    for split, count in documents.items():
        if not count:
            wanted = "a larger" if split == "heldout" else "a smaller"
            raise ValueError(
                f"none of {total} documents fell into the {split} part at heldout_fraction {fraction}; use "
                f"{wanted} one (for {total} documents about {min(0.5, 4 / total):.2g}), or more text"
            )


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the reading of a corpus has come: between two documents.

    Args:
        source, part (`int`): Numbers of the source and of its part (`source_parts`) that are being read.
        documents (`int`): Documents of that part that were read.
        has_text (`bool`): Whether the source held any text so far.
    """

    source: int = 0
    part: int = 0
    documents: int = 0
    has_text: bool = False


def read_chunks(
    arguments: CorpusArguments, characters: int, position: Position | None = None
) -> Iterator[tuple[list[Document], Position]]:
    """Read the documents of all sources, not cleaned, in chunks; each with the position behind it.

    Args:
        characters (`int`): A chunk ends with the document that brings it to so many.
        position (`Position`, *optional*): Where to begin.

    Raises:
        FileNotFoundError, OSError, ValueError: as `read_documents`.
    """
    begin = position or Position()
    chunk: list[Document] = []
    size, has_text = 0, begin.has_text
    here = begin
    for source_number in range(begin.source, len(arguments.sources)):
        source = arguments.sources[source_number]
        parts = source_parts(source, arguments.text_column, arguments.dataset_split, arguments.group_column)
        is_first = source_number == begin.source
        for part_number in range(begin.part if is_first else 0, len(parts)):
            first = begin.documents if is_first and part_number == begin.part else 0
            for number, document in enumerate(parts[part_number](first), start=first + 1):
                has_text = has_text or (not document.text.isspace() and bool(document.text))
                chunk.append(document)
                size += len(document.text)
                here = Position(source_number, part_number, number, has_text)
                if size >= characters:
                    yield chunk, here
                    chunk, size = [], 0
        if not has_text:
            raise no_text(source)
        has_text = False
    if chunk:
        yield chunk, here


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
        check_corpus_arguments(arguments)
        self.arguments = arguments
        self.documents: Counter[str] = Counter(train=0, heldout=0)
        self.cleaner = Cleaner(arguments.cleaning_settings())
        self.derived_heldout_documents = 0

    @property
    def removed(self) -> Counter[str]:
        """See the class."""
        removed = self.cleaner.removed
        removed["derived_heldout_documents"] = self.derived_heldout_documents
        return removed

    def _read(self) -> Iterator[Document]:
        for source in self.arguments.sources:
            yield from read_documents(
                source, self.arguments.text_column, self.arguments.dataset_split, self.arguments.group_column
            )

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        for document in self.cleaner.clean(self._read()):
            split = split_of(document, self.arguments.seed, self.arguments.heldout_fraction)
            if split == DERIVED:
                self.derived_heldout_documents += 1
                continue
            self.documents[split] += 1
            yield split, document
        check_splits(self.arguments, self.documents, self.removed)
