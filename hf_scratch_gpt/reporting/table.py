"""The stage table as plain text, for the end of a run in the terminal."""

from typing import Any

from hf_scratch_gpt.reporting.verdicts import StageRow, count, duration, stage_rows

_HEADINGS = ("stage", "time", "measure", "before", "after", "95% interval", "verdict")
_RIGHT_ALIGNED = frozenset({"time", "before", "after"})


def figure(value: float | None) -> str:
    """A measured number as the table shows it; a dash if there is none."""
    if value is None:
        return "–"
    if value >= 1000:
        return count(value)
    return f"{value:d}" if isinstance(value, int) else f"{value:.3f}"


def _cells(row: StageRow) -> tuple[str, ...]:
    interval = f"{row.interval[0]:.3f} – {row.interval[1]:.3f}" if row.interval and None not in row.interval else ""
    return (
        row.stage,
        duration(row.seconds),
        row.measure,
        figure(row.before),
        figure(row.after),
        interval,
        f"{row.verdict} ({row.evidence})" if row.evidence else row.verdict,
    )


def stage_table(report: dict[str, Any]) -> str:
    """What each stage measured before and after, as lines of text; numbers are aligned on the right."""
    rows = [_HEADINGS, *(_cells(row) for row in stage_rows(report))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if heading in _RIGHT_ALIGNED else text.ljust(width)
            for text, width, heading in zip(row, widths, _HEADINGS, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    peak = report["peak_rss_bytes"] / 2**30
    lines.append(f"whole road: {duration(report['wall_seconds'])}, peak memory {peak:.1f} GiB")
    return "\n".join(lines)
