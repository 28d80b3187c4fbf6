"""Texts with labels, for classification: two-column files, files with named columns, and `datasets` ids.

Read are local .tsv, .csv, .jsonl, .json and .parquet files (compressed ones too), folders that `datasets` can read,
and `datasets` ids. Which columns hold label and text is told by their names, or, of two columns, by what is in them;
settings overrule both. A .csv or .tsv without a header line has the columns "1", "2", …
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.compressed import content_suffix
from hf_scratch_gpt.data.rows import ROW_SUFFIXES, missing_column, read_rows

logger = logging.getLogger(__name__)

# Names that columns commonly have, in the order in which they are looked for.
LABEL_NAMES = ("label", "labels", "gold_label", "class", "category", "target", "sentiment", "intent")
TEXT_NAMES = ("text", "sentence", "sentence1", "premise", "message", "content", "review", "tweet", "document")
REJECTED_SHARE = 0.01  # more unusable rows than this is a mistake in the data or in the settings, not a tail
_FEWEST_ROWS_TO_DOUBT = 10  # in fewer, a label that occurs once is no sign of a header line
_COLUMNS = "label_column and text_column"


@dataclasses.dataclass
class Labelled:
    """Texts with their labels, row by row.

    Args:
        source (`str`): What was read.
        texts (`list[str]`): The texts.
        pairs (`list[str]`): The second text of each row, or `None` for single texts.
        labels (`list[str]`): The label of each.
        places (`list[str]`): Where each stands, such as "line 12".
        rejected (`list[dict]`): `place` and `reason` of each row that has no text or no label.
        columns (`dict[str, str]`): Which column was read as `label`, `text` and, if there is one, `text_pair`.
    """

    source: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    places: list[str]
    rejected: list[dict[str, str]]
    columns: dict[str, str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> "Labelled":
        """These rows alone; what was rejected stays with the whole."""

        def pick(values: list[str]) -> list[str]:
            return [values[index] for index in indices]

        pairs = None if self.pairs is None else pick(self.pairs)
        return dataclasses.replace(
            self,
            texts=pick(self.texts),
            pairs=pairs,
            labels=pick(self.labels),
            places=pick(self.places),
            rejected=[],
        )

    def keys(self) -> list[tuple[str, ...]]:
        """For each row what makes it the same text as another: its words, without case and kinds of white space."""
        pairs = self.pairs or [""] * len(self)
        return [
            tuple(" ".join(part.casefold().split()) for part in both) for both in zip(self.texts, pairs, strict=True)
        ]


def load_labelled(
    source: str | Path,
    split: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    allow_rejected: bool = False,
) -> Labelled:
    """Load texts and their labels.

    Args:
        source (`str` or `Path`): A local file, a folder that `datasets` can read, or a `datasets` id, `owner/name` or
            `owner/name:configuration`.
        split (`str`, *optional*, defaults to `"train"`): Split of a folder or id; a file has none.
        label_column, text_column, text_pair_column (`str`, *optional*): Columns by name, or by number where a file has
            no header line. Unset, label and text are found, and texts are single.
        allow_rejected (`bool`, *optional*, defaults to `False`): Go on when more than 1% of the rows are unusable.

    Raises:
        FileNotFoundError: if a local source is missing.
        OSError: if a data set cannot be read.
        ValueError: for a malformed file, a column that does not exist or cannot be told from others, and where too
            many rows, or all, have no text or label.
    """
    asked = {"label": label_column, "text": text_column, "text_pair": text_pair_column}
    rows, names = _open(source, split, asked)
    if not rows:
        raise ValueError(f"{source}: no rows; found an empty file")
    columns = _find_columns(str(source), rows, asked)
    _doubt_first_row(str(source), rows, columns, asked)
    return _collect(str(source), rows, columns, names.get(columns["label"]), allow_rejected)


def _open(
    source: str | Path, split: str | None, asked: dict[str, str | None]
) -> tuple[list[tuple[str, dict]], dict[str, list[str]]]:
    """All rows as `(place, row)`, and the names of integer labels by column, which only `datasets` knows."""
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        if split not in (None, "train"):
            raise ValueError(f"{path}: a file has no split '{split}'; name the file that holds it")
        has_header = content_suffix(path) not in (".csv", ".tsv") or _has_header(path, asked)
        return list(read_rows(path, has_header)), {}
    if not path.is_dir():
        is_path = path.is_absolute() or text.startswith((".", "~")) or len(path.parts) > 2
        if not text or is_path or content_suffix(path) in ROW_SUFFIXES:
            raise FileNotFoundError(f"no such file or folder: '{source}'")
    return _read_data_set(str(path) if path.is_dir() else text, split or "train")


def _read_data_set(source: str, split: str) -> tuple[list[tuple[str, dict]], dict[str, list[str]]]:
    import datasets

    is_folder = Path(source).is_dir()
    name, configuration = (source, "") if is_folder else (source.partition(":")[0], source.partition(":")[2])
    try:
        data = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = "a folder with no data that `datasets` can read" if is_folder else "no local file, nor a data set id"
        raise OSError(f"'{source}' is {told} (split '{split}'): {str(error).splitlines()[0]}") from error
    names = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "names")}
    return [(f"row {number}", row) for number, row in enumerate(data, start=1)], names


def _has_header(path: Path, asked: dict[str, str | None]) -> bool:
    """Whether the first line of a .csv or .tsv names its columns: those asked for, or common ones."""
    first = next(iter(read_rows(path, header=False)), None)
    if first is None:
        return False
    fields = [field.strip() for field in first[1].values()]
    given = [name for name in asked.values() if name is not None]
    if given:
        return not all(name.isdecimal() and name not in fields for name in given)
    return any(field.casefold() in (*LABEL_NAMES, *TEXT_NAMES) for field in fields)


def _find_columns(source: str, rows: list[tuple[str, dict]], asked: dict[str, str | None]) -> dict[str, str]:
    """The columns for `label`, `text` and perhaps `text_pair`: as asked, by common names, or by content."""
    names = list(rows[0][1])
    for kind, name in asked.items():
        if name is not None and name not in names:
            raise missing_column(name, names, f"{source}, {rows[0][0]}", f"{kind}_column")
    found = {kind: name for kind, name in asked.items() if name is not None}
    for kind, common in (("label", LABEL_NAMES), ("text", TEXT_NAMES)):
        if kind not in found:
            named = {name.strip().casefold(): name for name in names if name not in found.values()}
            known = next((named[name] for name in common if name in named), None)
            found |= {} if known is None else {kind: known}
    rest = [name for name in names if name not in found.values()]
    missing = [kind for kind in ("label", "text") if kind not in found]
    if len(missing) == 1 and len(rest) == 1:
        found[missing[0]] = rest[0]
    elif len(missing) == 2 and len(rest) == 2:
        found["label"], found["text"] = _by_content(source, rows, rest)
    elif missing:
        listed = ", ".join(f"'{name if len(name) <= 40 else name[:37] + '...'}'" for name in names[:12])
        raise ValueError(f"{source}: cannot tell {' and '.join(missing)} among the columns {listed}; set {_COLUMNS}")
    if len(set(found.values())) < len(found):
        raise ValueError(f"{source}: label and text would be read from one column; check {_COLUMNS}")
    return {kind: found[kind] for kind in ("label", "text", "text_pair") if kind in found}


def _by_content(source: str, rows: list[tuple[str, dict]], names: list[str]) -> tuple[str, str]:
    """Of two columns the label's is that in which the same few values come again and again."""
    different = {name: len({str(row[name]).strip() for _, row in rows}) for name in names}
    label, text = sorted(names, key=lambda name: different[name])
    if different[label] == different[text] or 2 * different[label] > len(rows):
        told = " and ".join(f"{count} in '{name}'" for name, count in different.items())
        raise ValueError(
            f"{source}: cannot tell which column is the label (of {len(rows)} values there are {told} different ones);"
            f" set {_COLUMNS}"
        )
    return label, text


def _doubt_first_row(
    source: str, rows: list[tuple[str, dict]], columns: dict[str, str], asked: dict[str, str | None]
) -> None:
    """Refuse a first row that looks like a header line with names that we do not know."""
    if columns["label"] not in ("1", "2") or any(asked.values()) or len(rows) < _FEWEST_ROWS_TO_DOUBT:
        return
    place, row = rows[0]
    counts = Counter(str(row[columns["label"]]).strip() for _, row in rows)
    first = str(row[columns["label"]]).strip()
    if counts[first] == 1 and all(count > 1 for label, count in counts.items() if label != first):
        raise ValueError(
            f"{source}, {place}: '{first}' looks like the name of a column, as no other row has this label; "
            f"set {_COLUMNS}, by name, or by number (1, 2) if it is a label"
        )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _read_text(value: Any) -> str:
    if _is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty")
    if not isinstance(value, str):
        raise ValueError(f"holds {type(value).__name__}, expected text")
    return value


def _read_label(value: Any, names: list[str] | None) -> str:
    """A label as text: integers by their names, if they have any."""
    if _is_missing(value) or (isinstance(value, str) and value.strip().casefold() in ("", "nan")):
        raise ValueError("is empty")
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"holds {type(value).__name__}, expected one label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as pandas writes integers beside missing values
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise ValueError(f"holds {value}, which marks rows without a label")
        return names[value]
    return str(value).strip()


def _collect(
    source: str, rows: list[tuple[str, dict]], columns: dict[str, str], names: list[str] | None, allow_rejected: bool
) -> Labelled:
    readers: dict[str, Callable[[Any], str]] = dict.fromkeys(columns, _read_text)
    readers["label"] = lambda value: _read_label(value, names)
    kept: dict[str, list[str]] = {kind: [] for kind in columns}
    places, rejected = [], []
    for place, row in rows:
        read = {}
        for kind, column in columns.items():
            try:
                read[kind] = readers[kind](row.get(column))
            except ValueError as error:
                rejected.append({"place": place, "reason": f"'{column}' {error}"})
                break
        else:
            places.append(place)
            for kind, value in read.items():
                kept[kind].append(value)
    _judge_rejected(source, len(rows), rejected, allow_rejected)
    return Labelled(source, kept["text"], kept.get("text_pair"), kept["label"], places, rejected, columns)


def _judge_rejected(source: str, total: int, rejected: list[dict[str, str]], allow: bool) -> None:
    if not rejected:
        return
    first = f"{rejected[0]['place']}: {rejected[0]['reason']}"
    if len(rejected) == total:
        raise ValueError(f"{source}: none of {total} rows can be used ({first}); check {_COLUMNS}")
    if len(rejected) > REJECTED_SHARE * total and not allow:
        raise ValueError(
            f"{source}: {len(rejected)} of {total} rows cannot be used ({first}); mend them, or set "
            "allow_dropped_rows to leave them out"
        )
    logger.warning("%s: leaving out %d of %d rows (%s)", source, len(rejected), total, first)


def split_rows(labels: Sequence[str], fraction: float, seed: int, stratify: bool) -> tuple[list[int], list[int]]:
    """Indices of training and held-out rows, both in order: at random, as a function of `seed`.

    Args:
        labels (`Sequence[str]`): The label of each row.
        fraction (`float`): Share to hold out, above 0 and below 1; at least one row on either side.
        seed (`int`): Seed.
        stratify (`bool`): Hold out this share of each label's rows, at least one being left to train on.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label if stratify else "", []).append(index)
    heldout: list[int] = []
    for _, members in sorted(groups.items()):
        count = min(max(round(fraction * len(members)), 0 if stratify else 1), len(members) - 1)
        heldout += generator.permutation(members)[:count].tolist()
    chosen = set(heldout)
    return [index for index in range(len(labels)) if index not in chosen], sorted(heldout)
