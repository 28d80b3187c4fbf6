"""Where text comes from: local files and folders, this Python's own documentation, or a `datasets` id, streamed."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.compressed import COMPRESSED_SUFFIXES, content_suffix
from hf_scratch_gpt.data.documents import Document
from hf_scratch_gpt.data.rows import ROW_SUFFIXES, missing_column, open_text, read_rows
from hf_scratch_gpt.runs.values import nearest

logger = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs"
# Under what terms a source may be used, where we know: the SPDX identifier, where it can be read (that page also names
# the terms of software that Python incorporates), and the languages that the source is in (ISO 639, or "code").
KNOWN_TERMS: dict[str, dict[str, Any]] = {
    PYTHON_DOCS: {
        "license": "PSF-2.0",
        "license_link": "https://docs.python.org/3/license.html",
        "language": ["en", "code"],
    }
}
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
_SUPPORTED = f"{', '.join(SUFFIXES)}, and all but .parquet compressed ({', '.join(COMPRESSED_SUFFIXES)})"
# A file, data set or other piece of a source: its documents from the given number on.
Part = Callable[[int], Iterator[Document]]

# A text file above this many characters is split at paragraph ends. A single file as the whole source is split
# finer, into about 200 documents, since a held-out split by document needs many of them.
MAX_DOCUMENT_CHARACTERS = 16_000
_MIN_DOCUMENT_CHARACTERS = 1_000
_DOCUMENTS_OF_A_SINGLE_FILE = 200


def split_paragraphs(file: Any, limit: int) -> Iterator[str]:
    """Split a text file into pieces of at most `limit` characters that end where a paragraph does, if one does.

    Joined, the pieces are the file's text. A paragraph above the limit is split at line ends, a longer line anywhere.
    """
    piece: list[str] = []
    size = paragraph_start = paragraph_offset = 0  # of the last paragraph in `piece`: its index, the characters before
    while line := file.readline(limit):
        if piece and piece[-1].isspace() and not line.isspace():
            paragraph_start, paragraph_offset = len(piece), size
        if size + len(line) > limit:
            cut = paragraph_start or len(piece)
            yield "".join(piece[:cut])
            size -= paragraph_offset if paragraph_start else size
            piece, paragraph_start, paragraph_offset = piece[cut:], 0, 0
            if size + len(line) > limit:
                yield "".join(piece)
                piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)


def _read_text(path: Path, name: str, source: str, limit: int) -> Iterator[Document]:
    with open_text(path) as file:
        pieces = split_paragraphs(file, limit)
        first, second = next(pieces, ""), next(pieces, None)
        if second is None:
            yield Document(name, first, source)
            return
        yield Document(f"{name}#0", first, source)
        yield Document(f"{name}#1", second, source)
        for number, piece in enumerate(pieces, start=2):
            yield Document(f"{name}#{number}", piece, source)


def _text_of(row: dict[str, Any], column: str, origin: str, setting: str = "text_column") -> str:
    if column not in row:
        raise missing_column(column, row, origin, setting)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{origin}: column '{column}' holds {type(text).__name__}, expected text")
    return text


def _group_of(row: dict[str, Any], column: str, origin: str) -> str:
    """The row's group; without a column, or where it is empty, the row stands alone."""
    return _text_of(row, column, origin, "group_column") if column else ""


def _read_table(path: Path, name: str, source: str, text_column: str, group_column: str) -> Iterator[Document]:
    for place, row in read_rows(path, header=not text_column.isdecimal()):
        origin = f"{path}, {place}"
        text, group = _text_of(row, text_column, origin), _group_of(row, group_column, origin)
        yield Document(f"{name}:{place.split()[1]}", text, source, group)


def _is_supported(path: Path) -> bool:
    suffix = content_suffix(path)
    return suffix in SUFFIXES and (suffix != ".parquet" or path.suffix.lower() == ".parquet")


def _read_file(path: Path, name: str, source: str, columns: tuple[str, str], limit: int) -> Iterator[Document]:
    if content_suffix(path) in TEXT_SUFFIXES:
        return _read_text(path, name, source, limit)
    return _read_table(path, name, source, *columns)


def _file_part(path: Path, name: str, source: str, columns: tuple[str, str], limit: int) -> Part:
    return lambda first: islice(_read_file(path, name, source, columns, limit), first, None)


def _single_file(path: Path, source: str, columns: tuple[str, str]) -> Part:
    if not _is_supported(path):
        raise ValueError(f"{path}: cannot read '{path.suffix}' files; supported are {_SUPPORTED}")
    share = path.stat().st_size // _DOCUMENTS_OF_A_SINGLE_FILE
    limit = min(max(share, _MIN_DOCUMENT_CHARACTERS), MAX_DOCUMENT_CHARACTERS)
    return _file_part(path, path.name, source, columns, limit)


def _folder_files(folder: Path, source: str, columns: tuple[str, str]) -> list[Part]:
    """The supported files of `folder` and below in the order of their names; hidden ones are left out."""
    relative = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    visible = sorted(path for path in relative if not any(part.startswith(".") for part in path.parts))
    paths = [path for path in visible if _is_supported(path)]
    ignored = Counter(path.suffix.lower() or "no extension" for path in visible if not _is_supported(path))
    listing = ", ".join(f"{count} of {suffix}" for suffix, count in ignored.most_common(5))
    if not paths:
        found = f"found {listing}" if ignored else "it is empty"
        raise ValueError(f"{folder}: no file to read ({found}); supported are {_SUPPORTED}")
    if ignored:
        logger.warning("%s: ignoring %d files that are not text or tables: %s", folder, ignored.total(), listing)
    names = [f"{folder.name}/{path.as_posix()}" for path in paths]
    return [
        _file_part(folder / path, name, source, columns, MAX_DOCUMENT_CHARACTERS)
        for path, name in zip(paths, names, strict=True)
    ]


def _read_data_set(source: str, columns: tuple[str, str], split: str, first: int) -> Iterator[Document]:
    """Stream a data set by its id, `owner/name` or `owner/name:configuration`, from its row `first` on."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows.skip(first) if first else rows, start=first):
            origin = f"data set {source}, row {number}"
            text, group = _text_of(row, columns[0], origin), _group_of(row, columns[1], origin)
            yield Document(f"{source}:{number}", text, source, group)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"'{source}' is no local file or folder, and cannot be read as a data set id: {error}"
        ) from error


def _looks_like_a_path(source: str) -> bool:
    path = Path(source)
    return path.is_absolute() or source.startswith((".", "~")) or _is_supported(path) or len(path.parts) > 2


def source_parts(
    source: str, text_column: str = "text", dataset_split: str = "train", group_column: str = ""
) -> list[Part]:
    """The pieces of one source, in an order that depends on nothing but the source.

    Args: see `read_documents`.

    Returns:
        `list`: For each piece (a file, say) a function that streams its documents from a given number on.

    Raises:
        FileNotFoundError, ValueError: as `read_documents`, for what shows before the documents are read.
    """
    path, columns = Path(source).expanduser(), (text_column, group_column)
    if not source:
        raise FileNotFoundError("no such file or folder: ''")  # Path("") would be the current folder
    if source == PYTHON_DOCS:
        from hf_scratch_gpt.data.python_docs import read_python_docs

        return [lambda first: islice(read_python_docs(), first, None)]
    if path.is_dir():
        return _folder_files(path, source, columns)
    if path.is_file():
        return [_single_file(path, source, columns)]
    if _looks_like_a_path(source):
        raise FileNotFoundError(f"no such file or folder: '{source}'")
    if "/" not in source and nearest(source, [PYTHON_DOCS]):
        raise ValueError(f"unknown source '{source}'{nearest(source, [PYTHON_DOCS])}")
    return [partial(_read_data_set, source, columns, dataset_split)]


def read_documents(
    source: str, text_column: str = "text", dataset_split: str = "train", group_column: str = ""
) -> Iterator[Document]:
    """Stream the documents of one source, in an order that depends on nothing but the source.

    Args:
        source (`str`): `"python-docs"`; a .txt, .md, .py, .jsonl, .json, .csv, .tsv or .parquet file, all but the
            last also compressed (.gz, .bz2, .xz, .zst); a folder of such files of any kinds; or a `datasets` id,
            `owner/name` or `owner/name:configuration`.
        text_column (`str`, *optional*, defaults to `"text"`): The column of a table that holds the text; a number,
            from 1, for a .csv or .tsv without a header line.
        dataset_split (`str`, *optional*, defaults to `"train"`): The split of a `datasets` id.
        group_column (`str`, *optional*): The column of a table that names a document's group (see `Document`).

    Raises:
        FileNotFoundError: if a local source is missing.
        OSError: if a data set cannot be read.
        ValueError: if the source is of no supported kind, not UTF-8, malformed, without the column, or empty.
    """
    empty = True
    for part in source_parts(source, text_column, dataset_split, group_column):
        for document in part(0):
            empty = empty and not document.text.strip()
            yield document
    if empty:
        raise no_text(source)


def no_text(source: str) -> ValueError:
    """The error for a source that was read to its end and holds nothing but white space."""
    return ValueError(f"{source}: holds no text")
