"""The one place that loads conversations: every common format becomes TRL's conversational `prompt`/`completion`,
`prompt`/`chosen`/`rejected` or `prompt`/`completions`/`ranks`, lists of `{"role", "content"}` messages.

Read are local .jsonl, .json, .csv, .tsv and .parquet files, a folder of the stage `prepare` (its tasks), and
`datasets` ids. `hf_scratch_gpt.data.formats` says which formats a row may have, and tells them apart.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.formats import (
    READ_COLUMNS,
    TeachesNothing,
    read_conversations,
    read_preferences,
    read_rankings,
)
from hf_scratch_gpt.data.manifest import find_file
from hf_scratch_gpt.data.rejected import RejectedRows
from hf_scratch_gpt.data.rows import ROW_SUFFIXES, MalformedHandler, read_rows

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Convert = Callable[[Row], Iterator[Row]]

FILE, PLACE = "source_file", "source_row"
_MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "completions")
_FILES = {
    ("conversations", "train"): "train.jsonl",
    ("conversations", "heldout"): "heldout.jsonl",
    ("preferences", "train"): "preferences_train.jsonl",
    ("preferences", "heldout"): "preferences_heldout.jsonl",
}


def load_conversations(
    source: str | Path,
    split: str | None = None,
    streaming: bool = False,
    keep_columns: bool = False,
    rejected: RejectedRows | None = None,
) -> Any:
    """Load questions with their answers as a `datasets.Dataset` with the columns `prompt` and `completion`.

    A row that offers functions keeps them as `tools`; none of the others has that column.

    Args:
        source (`str` or `Path`): A local file, a `prepare` folder (its tasks), or a `datasets` id, `owner/name` or
            `owner/name:configuration`.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"heldout"` of a `prepare` folder, or any split
            of a `datasets` id; a file has none.
        streaming (`bool`, *optional*, defaults to `False`): Return an `IterableDataset` that reads as it is read.
        keep_columns (`bool`, *optional*, defaults to `False`): Keep the row's other columns (`family`, `answer`, ...).
        rejected (`RejectedRows`, *optional*): Collects malformed rows and rows that teach nothing, instead of raising
            at the first malformed one; the file and the row that each example comes from then stand in the columns
            `source_file` and `source_row`.

    Raises:
        FileNotFoundError: if a local source is missing.
        OSError: if a data set cannot be read.
        ValueError: for text that is not UTF-8, a malformed row or a row of an unknown format (naming file and row;
            with `rejected`, where these are too many), and where no row is left.
    """
    return _load(source, split, streaming, keep_columns, rejected, "conversations", read_conversations)


def load_preferences(
    source: str | Path,
    split: str | None = None,
    streaming: bool = False,
    keep_columns: bool = False,
    rejected: RejectedRows | None = None,
) -> Any:
    """Load preferences as a `datasets.Dataset` with the columns `prompt`, `chosen` and `rejected`.

    Arguments and errors are those of `load_conversations`. A ranking gives one row for each two answers of different
    rank. Pairs whose two answers are the same are left out, since they prefer nothing; a warning says how many.
    """
    return _load(source, split, streaming, keep_columns, rejected, "preferences", read_preferences)


def load_rankings(
    source: str | Path,
    split: str | None = None,
    streaming: bool = False,
    keep_columns: bool = False,
    rejected: RejectedRows | None = None,
) -> Any:
    """Load rankings as a `datasets.Dataset` with the columns `prompt`, `completions` and `ranks`, one row a prompt.

    `completions` are answers (each a list of messages) from the best to the worst, `ranks` their ranks from 1; answers
    that are equally good share one. Preferences are rankings of two. Arguments and errors are those of
    `load_conversations`.
    """
    return _load(source, split, streaming, keep_columns, rejected, "preferences", read_rankings)


def _load(
    source: str | Path,
    split: str | None,
    streaming: bool,
    keep_columns: bool,
    rejected: RejectedRows | None,
    kind: str,
    convert: Convert,
) -> Any:
    from datasets import IterableDataset

    def converted() -> Iterator[Row]:
        file, rows = _open(source, split, streaming, kind, rejected)
        return _convert(file, rows, convert, keep_columns, rejected)

    if not streaming:
        return _as_data_set(list(converted()))
    _open(source, split, streaming, kind, rejected)  # a missing file or split shows now, not at the first row
    return IterableDataset.from_generator(converted)


def _open(
    source: str | Path, split: str | None, streaming: bool, kind: str, rejected: RejectedRows | None
) -> tuple[str, Iterator[tuple[str, Row]]]:
    """The file or data set that a source is, and its raw rows as `(place, row)`."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_of_folder(path, split or "train", kind)
    elif path.is_file() and split not in (None, "train"):
        raise ValueError(f"{path}: a file has no split '{split}'; name the file that holds it")
    if path.is_file():
        file = str(path)
        if rejected is None:
            return file, read_rows(path)
        return file, read_rows(path, on_malformed=_noting(rejected, file))
    text = str(source)
    is_path = path.is_absolute() or text.startswith((".", "~")) or len(path.parts) > 2
    if not text or is_path or path.suffix.lower() in ROW_SUFFIXES:
        raise FileNotFoundError(f"no such file or folder: '{source}'")
    return f"data set {text}", _read_data_set(text, split or "train", streaming)


def _noting(rejected: RejectedRows, file: str) -> MalformedHandler:
    """What notes a row that cannot even be read as one."""
    return lambda place, reason, content: rejected.add(file, "malformed", place, reason, content, was_read=False)


def _file_of_folder(folder: Path, split: str, kind: str) -> Path:
    if (kind, split) not in _FILES:
        raise ValueError(f"{folder}: no split '{split}'; a prepare folder has 'train' and 'heldout'")
    name = _FILES[kind, split]
    for place in (f"tasks/{name}", name):
        path = find_file(folder, place)
        if path is not None:
            return path
    raise FileNotFoundError(
        f"{folder}: holds no tasks/{name}; make it by the stage 'prepare' with tasks, or name a file"
    )


def _read_data_set(source: str, split: str, streaming: bool) -> Iterator[tuple[str, Row]]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"'{source}' is no local file or folder, and cannot be read as a data set id: {error}"
        ) from error


def _convert(
    file: str,
    rows: Iterable[tuple[str, Row]],
    convert: Convert,
    keep_columns: bool,
    rejected: RejectedRows | None,
) -> Iterator[Row]:
    """Convert rows; those that teach nothing are left out and counted, malformed ones are rejected or raise."""
    left_out = RejectedRows() if rejected is None else rejected
    before = len(left_out.rows)
    read = kept = 0
    for place, row in rows:
        read += 1
        try:
            made = list(convert(row))
        except TeachesNothing as reason:
            left_out.add(file, "useless", place, str(reason), row)
            continue
        except (ValueError, RecursionError) as error:
            reason_text = str(error) if isinstance(error, ValueError) else "nested too deeply"
            if rejected is None:
                raise ValueError(f"{file}, {place}: {reason_text}") from None
            rejected.add(file, "malformed", place, reason_text, row, was_read=True)
            continue
        kept += len(made)
        beside = {name: value for name, value in row.items() if name not in READ_COLUMNS} if keep_columns else {}
        where = {} if rejected is None else {FILE: file, PLACE: place}
        yield from ({**beside, **new, **where} for new in made)
    _judge(file, left_out, before, read, kept)


def _judge(file: str, left_out: RejectedRows, before: int, read: int, kept: int) -> None:
    """Warn of the rows of a file that were left out, or stop where they are too many, or no others are there.

    Raises:
        ValueError: if that is so, naming the first malformed rows.
    """
    new = left_out.rows[before:]
    total = read + sum(not row.was_read for row in new)
    left_out.judge(new, total)
    reasons = Counter(row.reason for row in new if row.kind == "useless")
    told = [f"{count} with {reason}" for reason, count in reasons.items()]
    malformed = sum(row.kind == "malformed" for row in new)
    told += [f"{malformed} malformed"] if malformed else []
    if not kept:
        found = f"{total} rows, {', '.join(told)}" if total else "an empty file"
        raise ValueError(f"{file}: no usable rows; found {found}")
    if new:
        logger.warning("%s: leaving out %d of %d rows: %s", file, len(new), total, ", ".join(told))


def _as_data_set(rows: list[Row]) -> Any:
    """The rows as a `datasets.Dataset`; tool calls and tools as JSON: Arrow would give each the fields of all."""
    from datasets import Dataset, Features, Json, List, Value

    columns = [name for name in _MESSAGE_COLUMNS if any(name in row for row in rows)]
    if not any("tools" in row or any(map(_is_about_tools, row.values())) for row in rows):
        return Dataset.from_list(rows)
    message = {name: Value("string") for name in ("role", "content", "name", "tool_call_id")}
    messages = List({**message, "tool_calls": Json()})
    known = {name: List(messages) if name == "completions" else messages for name in columns}
    known |= {"tools": Json()} if any("tools" in row for row in rows) else {}
    others = [{name: value for name, value in row.items() if name not in known} for row in rows]
    features = {**(Dataset.from_list(others).features if any(others) else {}), **known}
    return Dataset.from_list(rows, features=Features(features))


def _is_about_tools(value: Any) -> bool:
    """Whether a value is, or holds, messages of which one has more than a role and a text."""
    if not isinstance(value, list):
        return False
    return any(
        len(item) > 2 and "role" in item
        if isinstance(item, dict)
        else isinstance(item, list) and _is_about_tools(item)
        for item in value
    )
