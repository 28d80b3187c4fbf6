"""The picture of PPO: reward against KL, the learnt one beside the gold one where there is one.

Over-optimisation is seen in it: the learnt reward goes on rising with the KL while the gold one falls (Gao et al.
2022, arXiv 2210.10760). It is drawn from `rollouts.jsonl`, which the stage `ppo` and [`PPOTrainer`] write.
"""

import json
import re
from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting import charts
from hf_scratch_gpt.runs import write_text

ROLLOUTS, PICTURE = "rollouts.jsonl", "reward_kl.svg"
_X_LABEL = "KL to the reference, nats a response"
_STYLE = (
    "svg{font-family:system-ui,sans-serif;background:#fff}.grid{stroke:#dde2ea;stroke-width:1}"
    ".tick{font-size:10.5px;fill:#5b6573}.axis{font-size:11px;fill:#5b6573}.middle{text-anchor:middle}"
    ".end{text-anchor:end}.line{fill:none;stroke-width:2;stroke-linejoin:round}"
    ".heading{font-size:12.5px;font-weight:600;fill:#1c2430}"
)
_LEARNT_COLOUR, _GOLD_COLOUR = "#14805a", "#c0680f"
_PANEL_WIDTH, _PANEL_HEIGHT, _HEADING = 360, 190, 24


def read_rollouts(folder: str | Path) -> list[dict[str, Any]]:
    """The means of each rollout that a PPO folder recorded, oldest first; none if it has no such file.

    Raises:
        ValueError: for a line that is no JSON object with a KL, naming it.
    """
    path = Path(folder) / ROLLOUTS
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "kl": float(row["kl"])})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no rollout with a 'kl' ({error})") from error
    return rows


def _panels(rows: list[dict[str, Any]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Title and points of each curve: what was maximised, and the gold reward."""
    has_gold = bool(rows) and all("reward_gold" in row for row in rows)
    learnt = "reward_learnt" if has_gold else "reward"
    wanted = [(learnt, "Learnt reward, normalised" if has_gold else "Reward, normalised")]
    wanted += [("reward_gold", "Gold reward")] if has_gold else []
    return [(title, [(row["kl"], float(row[key])) for row in rows if key in row]) for key, title in wanted]


def reward_kl_charts(folder: str | Path, colour: str) -> list[dict[str, Any]]:
    """The curves as charts for a page: title, first and last reward, and the SVG."""
    told = []
    for title, points in _panels(read_rollouts(folder)):
        svg = charts.path_chart(points, title, _X_LABEL, colour)
        if svg:
            told.append({"title": f"{title}, against KL", "first": points[0][1], "last": points[-1][1], "svg": svg})
    return told


def draw_reward_kl(folder: str | Path) -> Path | None:
    """Write `reward_kl.svg`, one file that needs nothing else, beside a PPO run's `rollouts.jsonl`.

    Returns:
        `Path` or `None`: the picture, or nothing where there are fewer than two rollouts to draw.
    """
    parts: list[str] = []
    for (title, points), colour in zip(_panels(read_rollouts(folder)), (_LEARNT_COLOUR, _GOLD_COLOUR), strict=False):
        svg = charts.path_chart(points, title, _X_LABEL, colour)
        if not svg:
            return None
        inside = re.sub(r"^<svg[^>]*>|</svg>$", "", svg)
        heading = f'<text class="heading" x="50" y="{_HEADING - 8}">{title}</text>'
        left = len(parts) * _PANEL_WIDTH
        parts.append(
            f'<g transform="translate({left})">{heading}<g transform="translate(0 {_HEADING})">{inside}</g></g>'
        )
    if not parts:
        return None
    width, height = _PANEL_WIDTH * len(parts), _PANEL_HEIGHT + _HEADING
    return write_text(
        Path(folder) / PICTURE,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n",
    )
