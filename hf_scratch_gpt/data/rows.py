"""Rows of .jsonl, .json, .csv, .tsv and .parquet files, streamed; every error names the file and the place in it."""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hf_scratch_gpt.data.compressed import content_suffix, open_binary_file, open_text_file
from hf_scratch_gpt.runs.values import nearest

Row = dict[str, Any]
MalformedHandler = Callable[[str, str, Any], None]
_FIELD_LIMIT = 2**31 - 1  # the csv module refuses fields above 128 kB unless told otherwise


class _Malformed(Exception):
    """One row that cannot be read, while the rows after it can: why, and what stands there."""

    def __init__(self, reason: str, content: Any):
        super().__init__(reason)
        self.reason, self.content = reason, content


def first_bad_byte(path: Path) -> int | None:
    """Offset of the first byte of `path` that is not UTF-8, or `None` if all of it is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_binary_file(path) as file:
        while True:
            block = file.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return offset - pending + error.start
            if not block:
                return None
            offset += len(block)


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open `path`, compressed or not, as UTF-8 text, with or without a byte order mark.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: when what is read turns out not to be UTF-8, with the byte offset, or is damaged.
    """
    try:
        with open_text_file(path, newline) as file:
            yield file
    except UnicodeDecodeError:
        offset = first_bad_byte(path) or 0
        raise ValueError(
            f"{path}: not UTF-8 at byte {offset} (line {_line_of_byte(path, offset)}); convert it, for example "
            f"`iconv -f latin1 -t utf-8 {path.name}`"
        ) from None


def _line_of_byte(path: Path, offset: int) -> int:
    with open_binary_file(path) as file:
        return 1 + file.read(offset).count(b"\n")


def _as_row(value: Any) -> Row | _Malformed:
    if isinstance(value, dict):
        return value
    return _Malformed(f"expected an object with named columns, found {type(value).__name__}", value)


def _read_json_lines(path: Path) -> Iterator[tuple[str, Row | _Malformed]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = _as_row(json.loads(line))
            except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
                reason = f"not valid JSON ({_json_complaint(error)}); a .jsonl file holds one object a line"
                row = _Malformed(reason, line)
            yield f"line {number}", row


def _json_complaint(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _read_json(path: Path) -> Iterator[tuple[str, Row | _Malformed]]:
    with open_text(path) as file:
        try:
            values = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise ValueError(f"{path}: not valid JSON ({_json_complaint(error)})") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a list of objects, found {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        yield f"row {number}", _as_row(value)


def _read_separated(path: Path, header: bool) -> Iterator[tuple[str, Row | _Malformed]]:
    """Rows of a .csv (quotes as Excel writes them) or a .tsv (no quoting: a quote is a character like any other)."""
    csv.field_size_limit(_FIELD_LIMIT)
    with open_text(path, newline="") as file:
        if content_suffix(path) == ".tsv":
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(file)
        names: list[str] | None = None
        try:
            for fields in reader:
                if not fields:
                    continue
                if names is None:
                    names = fields if header else [str(number) for number in range(1, len(fields) + 1)]
                    if header:
                        continue
                place = f"line {reader.line_num}"
                if len(fields) != len(names):
                    reason = f"{len(fields)} columns, expected {len(names)} as in the first line"
                    yield place, _Malformed(reason, fields)
                else:
                    yield place, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: not valid {content_suffix(path)[1:]} ({error})"
            ) from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | _Malformed]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, not of the file's content
            raise
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None


ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(
    path: str | Path, header: bool = True, on_malformed: MalformedHandler | None = None
) -> Iterator[tuple[str, Row]]:
    """Stream the rows of a table file as `(place, row)`, where place is such as "line 12" for messages.

    Args:
        path (`str` or `Path`): A .jsonl, .json (a list of objects), .csv, .tsv or .parquet file; all but the last
            also compressed (.gz, .bz2, .xz, .zst).
        header (`bool`, *optional*, defaults to `True`): Whether the first line of a .csv or .tsv names the columns;
            without it they are named "1", "2", ...
        on_malformed (`Callable`, *optional*): Called with place, reason and content for a row that cannot be read
            while those after it can, instead of raising.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: for an unsupported extension, text that is not UTF-8, or a malformed row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = content_suffix(path)
    if suffix in (".csv", ".tsv"):
        return _well_formed(path, _read_separated(path, header), on_malformed)
    if suffix not in ROW_SUFFIXES:
        raise ValueError(f"{path}: cannot read rows of '{suffix}' files; supported are {', '.join(ROW_SUFFIXES)}")
    read = {".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}[suffix]
    return _well_formed(path, read(path), on_malformed)


def _well_formed(
    path: Path, rows: Iterator[tuple[str, Row | _Malformed]], on_malformed: MalformedHandler | None
) -> Iterator[tuple[str, Row]]:
    for place, row in rows:
        if not isinstance(row, _Malformed):
            yield place, row
        elif on_malformed is None:
            raise ValueError(f"{path}, {place}: {row.reason}")
        else:
            on_malformed(place, row.reason, row.content)


def missing_column(column: str, columns: Iterable[str], origin: str, setting: str = "text_column") -> ValueError:
    """The error for a column that a file or data set does not have; names the nearest one and the setting."""
    known = [str(name) for name in columns]
    shown = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in known[:12])
    hint = (
        "; a file without a header line takes a column number" if origin.split(",")[0].endswith(("csv", "tsv")) else ""
    )
    return ValueError(
        f"{origin}: no column '{column}'{nearest(column, known)}; it has {shown}; name one with {setting}{hint}"
    )
