"""Rows that a stage leaves out, with the reasons: nothing is dropped in silence."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.runs.files import write_text

REJECTED_FILE = "rejected.jsonl"
REJECTED_SHARE = 0.01  # more malformed rows than this is a mistake in the data, not a slip
_LONGEST_CONTENT = 300
_NAMED_ROWS = 3


@dataclasses.dataclass(frozen=True)
class RejectedRow:
    """One row that was left out.

    Args:
        file (`str`): The file or data set that holds it.
        kind (`str`): `malformed`, `useless` (well-formed, but it teaches nothing), or `too long`.
        row (`str`): Its place there, such as "line 12".
        reason (`str`): What is wrong with it, in one line.
        content (`str`): The row itself, shortened.
        was_read (`bool`, *optional*, defaults to `True`): Whether it could be read as a row at all.
    """

    file: str
    kind: str
    row: str
    reason: str
    content: str
    was_read: bool = True


class RejectedRows:
    """Collects the rows that are left out, and stops a run that loses too many.

    Args:
        allow (`bool`, *optional*, defaults to `False`): Go on when more than 1% of the rows are malformed.
        listed_in (`Path`, *optional*): The file that will list them, to be named in the message.
    """

    def __init__(self, allow: bool = False, listed_in: Path | None = None):
        self.allow, self.listed_in = allow, listed_in
        self.rows: list[RejectedRow] = []

    def add(self, file: str, kind: str, row: str, reason: str, content: Any, was_read: bool = True) -> None:
        """Note a row that is left out; arguments as of `RejectedRow`, `content` of any type."""
        self.rows.append(RejectedRow(file, kind, row, " ".join(reason.split()), shortened(content), was_read))

    def count(self, kind: str) -> int:
        """How many rows of a kind were left out."""
        return sum(row.kind == kind for row in self.rows)

    def judge(self, rows: Sequence[RejectedRow], total: int) -> None:
        """Stop where all or too many of `total` rows are malformed; `rows` are those of them that were left out.

        Raises:
            ValueError: naming the first of them and the setting that lets the run go on.
        """
        bad = [row for row in rows if row.kind == "malformed"]
        if not bad or (len(bad) < total and (self.allow or len(bad) <= REJECTED_SHARE * total)):
            return
        told = f"{bad[0].file}, {bad[0].row}: {bad[0].reason}"
        if len(bad) == total:
            raise ValueError(told + (f" ({total} rows, and none is better)" if total > 1 else ""))
        others = "".join(f"; {row.row}: {row.reason}" for row in bad[1:_NAMED_ROWS])
        listed = f", listed in {self.listed_in}" if self.listed_in else ""
        raise ValueError(
            f"{told}{others} ({len(bad)} of {total} rows are malformed{listed}); mend them, or set "
            "allow_rejected_rows to leave them out"
        )

    def text(self) -> str:
        """The rows as lines of JSON, in the order of their reading."""
        names = [field.name for field in dataclasses.fields(RejectedRow) if field.name != "was_read"]
        records = ({name: getattr(row, name) for name in names} for row in self.rows)
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def write(self, path: Path) -> None:
        """Add the rows to a file that may list some already, as where a stage reads two data sets, or is resumed.

        Raises:
            OSError: if it cannot be written.
        """
        listed = path.read_text(encoding="utf-8") if path.is_file() else ""
        known = set(listed.split("\n"))
        new = "".join(line + "\n" for line in self.text().split("\n") if line not in known and line)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, listed + new)


def shortened(content: Any) -> str:
    """A row as JSON, or the text that should have been one, cut to 300 characters that any file can hold."""
    if isinstance(content, str):
        text = content.strip()
    else:
        try:
            text = json.dumps(content, ensure_ascii=False, default=str)
        except (ValueError, TypeError, RecursionError):
            text = "..."
    text = text if len(text) <= _LONGEST_CONTENT else text[: _LONGEST_CONTENT - 3] + "..."
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
