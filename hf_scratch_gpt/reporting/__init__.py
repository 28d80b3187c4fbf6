"""Reads run folders and tells them: the stage table, `report.json` and the HTML report."""

from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting.summary import make_report
from hf_scratch_gpt.reporting.table import stage_table

__all__ = ["make_report", "stage_table", "write_report"]


def write_report(root: str | Path, wall_seconds: float) -> dict[str, Any]:
    """Write `report.json` and `report.html` for the run folders below `root`, each atomically; returns the report.

    Args:
        root (`str` or `Path`): Folder whose sub-folders are run folders.
        wall_seconds (`float`): Seconds that the whole road took.

    Raises:
        FileNotFoundError: if there is no finished run below `root`.
        ValueError: if a file of a run is damaged.
        OSError: if the disk is full; the old files are then untouched.
    """
    from hf_scratch_gpt.reporting.html import make_html
    from hf_scratch_gpt.runs import write_json, write_text

    report = make_report(root, wall_seconds)
    write_json(Path(root) / "report.json", report)
    write_text(Path(root) / "report.html", make_html(root, report))
    return report
