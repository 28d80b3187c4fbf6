"""`data_report.html`: what cleaning removed, with samples, and what text is left, from a folder of `prepare`.

    scratch-gpt data-report runs/quickstart/prepare

`scratch-gpt prepare` and `scratch-gpt run` write the page themselves. No request leaves it, and all text is escaped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.data_report import DATA_REPORT
from hf_scratch_gpt.data.manifest import check_file, read_manifest
from hf_scratch_gpt.reporting import charts
from hf_scratch_gpt.runs import read_json, read_metrics, write_text
from hf_scratch_gpt.runs.command_line import CommandParser

PAGE = "data_report.html"
_OCCUPATIONS_SHOWN = 15


def binary_number(size: int) -> str:
    """A power of two in few characters: `512`, `4k`, `1M`."""
    for power, unit in ((20, "M"), (10, "k")):
        if size >= 1 << power:
            return f"{size >> power}{unit}"
    return str(size)


def size_chart(sizes: dict[str, Any], unit: str, colour: str) -> str:
    """Histogram of documents by size, in powers of two."""
    counts = [(binary_number(first), float(count)) for first, count in sizes["histogram"]]
    return charts.histogram(counts, f"{unit} a document, from (k = 1,024)", colour)


def cluster_bins(sizes: dict[str, int]) -> list[tuple[str, float]]:
    """Clusters by their number of documents; large ones in powers of two."""
    bins: dict[str, float] = {}
    for size, clusters in sorted((int(size), clusters) for size, clusters in sizes.items()):
        low = size if size < 8 else 1 << (size.bit_length() - 1)
        label = str(low) if low < 8 else f"{low}–{2 * low - 1}"
        bins[label] = bins.get(label, 0) + clusters
    return list(bins.items())


def shares(counts: dict[str, int], total: int | None = None) -> list[dict[str, Any]]:
    """Rows of a table: name, count, and its share of `total` (of the counts' sum if not given)."""
    whole = sum(counts.values()) if total is None else total
    return [{"name": name, "count": count, "share": count / whole if whole else 0.0} for name, count in counts.items()]


def make_page(folder: Path, report: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The page as text.

    Args:
        folder (`Path`): For its title.
        report (`dict`): The content of `data_report.json`.
        metrics (`dict`): The metrics of the run of `prepare`.
    """
    from hf_scratch_gpt.reporting.html import page_environment

    kept, filters = report["kept"], report["filters"]
    read = filters[0]["documents"] if filters else kept["documents"]
    sizes = kept["sizes"]
    clusters = {
        name: {**told, "svg": charts.histogram(cluster_bins(told["sizes"]), "documents of a cluster", "var(--c4)")}
        for name, told in report["clusters"].items()
    }
    return (
        page_environment()
        .get_template("data_report.html.jinja")
        .render(
            folder=folder,
            metrics=metrics,
            kept=kept,
            read=read,
            filters=filters,
            other_removals={name: count for name, count in report["other_removals"].items() if count},
            sources=sorted({source for entry in filters for source in entry["by_source"]}),
            size_charts=[
                ("Characters", sizes["characters"], size_chart(sizes["characters"], "characters", "var(--c0)")),
                ("Tokens", sizes["tokens"], size_chart(sizes["tokens"], "tokens", "var(--c1)")),
            ],
            languages=None if kept["languages"] is None else shares(kept["languages"]),
            groups={kind: shares(counts) for kind, counts in kept["words"]["groups"].items()},
            occupations=list(kept["words"]["occupations"].items())[:_OCCUPATIONS_SHOWN],
            clusters=clusters,
        )
    )


def write_data_report(folder: str | Path) -> Path:
    """Write the page into a folder of `prepare`, atomically; returns its path.

    Raises:
        FileNotFoundError: if the folder is no finished run of `prepare`.
        ValueError: if its files are damaged, or of another stage.
        OSError: if the page cannot be written.
    """
    folder = Path(folder)
    run = read_metrics(folder)
    if run.get("stage") != "prepare":
        raise ValueError(f"{folder}: a folder of the stage '{run.get('stage')}', expected one of 'prepare'")
    path = check_file(folder, read_manifest(folder), DATA_REPORT)
    return write_text(folder / PAGE, make_page(folder, read_json(path), run["metrics"]))


def main(arguments: Sequence[str]) -> int:
    """Entry point of `scratch-gpt data-report`.

    Raises:
        OSError, ValueError: as `write_data_report`.
    """
    parser = CommandParser(
        prog="scratch-gpt data-report", description="Write data_report.html into a folder of prepare."
    )
    parser.add_argument("folder", metavar="DIR", help="the folder that `prepare` wrote")
    print(write_data_report(parser.parse_args(arguments).folder))
    return 0
