"""The plot of a scaling ladder: loss over size, both axes logarithmic, where a plain power law is a straight line."""

import math
from html import escape
from typing import Any

from hf_scratch_gpt.pretraining.ladder import short_size
from hf_scratch_gpt.pretraining.scaling import PowerLaw
from hf_scratch_gpt.reporting.charts import nice_ticks

_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 18, 50
_CURVE = 24  # pieces of the law's curve
_MARGIN = 0.06  # of each axis's length, beyond the outermost points


class _LogAxes:
    """Maps sizes and losses to pixels."""

    def __init__(self, sizes: list[float], losses: list[float]):
        self.x_range, self.y_range = _padded(sizes), _padded(losses)

    def x(self, size: float) -> float:
        low, high = self.x_range
        return _LEFT + (math.log(size) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, loss: float) -> float:
        low, high = self.y_range
        return _HEIGHT - _BOTTOM - (math.log(loss) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def size_at(self, share: float) -> float:
        low, high = self.x_range
        return math.exp(low + share * (high - low))

    def svg(self, sizes: list[float], y_label: str, x_label: str) -> str:
        parts = []
        for tick in nice_ticks(math.exp(self.y_range[0]), math.exp(self.y_range[1]), 5):
            if self.y_range[0] <= math.log(max(tick, 1e-12)) <= self.y_range[1]:
                y = self.y(tick)
                parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
                parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y + 3.5:.1f}">{tick:g}</text>')
        for size in sizes:
            x = self.x(size)
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{_HEIGHT - 30}">{short_size(size)}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(f'<text class="axis middle" x="{middle}" y="{_HEIGHT - 8}">{escape(x_label)}</text>')
        parts.append(f'<text class="axis" x="4" y="12">{escape(y_label)}</text>')
        return "".join(parts)


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = math.log(min(values)), math.log(max(values))
    margin = _MARGIN * (high - low) or 0.1
    return low - margin, high + margin


def law_chart(record: dict[str, Any]) -> str:
    """Every run of the ladder, the law through them, the prediction with its interval, and the check run's outcome.

    Args:
        record (`dict`): The content of `scaling.json`.
    """
    runs, check, prediction = record["runs"], record["check"], record["prediction"]
    law = PowerLaw(*(prediction["law"][name] for name in ("coefficient", "exponent", "ceiling")))
    predicted = [prediction["check"], prediction["target"]]
    predicted = [told for told in predicted if told is not None]
    sizes = [run["size"] for run in [*runs, *predicted]]
    losses = [run["bits_per_byte"] for run in [*runs, check]]
    losses += [told[end] for told in predicted for end in ("low", "high")]
    axes = _LogAxes(sizes, losses)
    largest = max(run["size"] for run in runs)

    def law_path(begin: float, end: float) -> str:
        sizes = [begin * (end / begin) ** (number / _CURVE) for number in range(_CURVE + 1)]
        return "M" + "L".join(f"{axes.x(size):.1f},{axes.y(law.loss(size)):.1f}" for size in sizes)

    parts = [
        axes.svg(sorted(set(sizes)), "bits per byte", f"{record['plan']['count']} parameters"),
        f'<path class="line" style="stroke:var(--c1)" d="{law_path(min(sizes), largest)}"/>',
        f'<path class="line" style="stroke:var(--c1);stroke-dasharray:5 5" d="{law_path(largest, max(sizes))}"/>',
    ]
    for told in predicted:
        x = axes.x(told["size"])
        parts.append(
            f'<line class="whisker after" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(told["low"]):.1f}" '
            f'y2="{axes.y(told["high"]):.1f}"/>'
            + _dot(x, axes.y(told["bits_per_byte"]), "dot before", f"predicted {told['bits_per_byte']:.4f}")
        )
    for run in runs:
        title = f"{short_size(run['size'])}, seed {run['seed']}: {run['bits_per_byte']:.4f}"
        parts.append(_dot(axes.x(run["size"]), axes.y(run["bits_per_byte"]), "dot after", title))
    outcome = f"check run: {check['bits_per_byte']:.4f}"
    parts.append(_dot(axes.x(check["size"]), axes.y(check["bits_per_byte"]), "dot check", outcome))
    return (
        f'<svg class="chart law" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>Loss over size</title>'
        f"{''.join(parts)}</svg>"
    )


def _dot(x: float, y: float, kind: str, title: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(title)}</title></circle>'
