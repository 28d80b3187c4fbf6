"""What a PPO run remembers of itself: a row for each rollout, sums since the last log line, sample completions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.runs import read_json, write_json, write_text


class Records:
    """Rows and sums that survive in a checkpoint, so that a resumed run logs what an uninterrupted one would.

    Args:
        completions_path (`Path`): File that sample completions are written to.
        reduce (`Callable`): Sums a tensor over all processes.

    Attributes:
        rollouts (`list[dict]`): One row for each rollout: its step and the means of its episodes.
    """

    def __init__(self, completions_path: Path, reduce: Callable[[Tensor], Tensor] = lambda total: total):
        self._reduce = reduce
        self.rollouts: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        self._pending: list[tuple[dict[str, Tensor], Tensor]] = []
        self._completions_path = completions_path
        self._has_written = False

    def add_rollout(self, step: int, row: dict[str, float]) -> None:
        """Add a rollout that was sampled after `step` optimizer steps."""
        self.rollouts.append({"step": step, **row})

    def add_step(self, sums: dict[str, Tensor], tokens: Tensor) -> None:
        """Add a micro-batch's sums over tokens; read from the device only when something is logged or saved."""
        self._pending.append((sums, tokens))

    def drain(self) -> None:
        """Add up what is pending, over all processes: each of them has to call it."""
        if not self._pending:
            return
        names = [*self._pending[0][0], "tokens"]
        sums = torch.stack([torch.stack([*sums.values(), tokens]) for sums, tokens in self._pending]).cpu().double()
        for row in self._reduce(sums).tolist():  # one by one: so it does not matter how often this is called
            for name, number in zip(names, row, strict=True):
                self._sums[name] = self._sums.get(name, 0.0) + number
        self._pending.clear()

    def take(self, since_step: int) -> dict[str, float]:
        """Means over the tokens since the last call, and over the rollouts from `since_step` on, or the last one."""
        self.drain()
        tokens = self._sums.pop("tokens", 0.0)
        means = {name: value / max(tokens, 1.0) for name, value in self._sums.items()}
        self._sums.clear()
        rows = [row for row in self.rollouts if row["step"] >= since_step] or self.rollouts[-1:]
        for name in rows[0] if rows else ():
            if name != "step":
                means[name] = sum(row[name] for row in rows) / len(rows)
        if rows:
            means["episodes"] = rows[-1]["episodes"]
        return means

    def write_completions(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append samples as JSON lines; lines that a resumed run is about to write again are dropped first."""
        path = self._completions_path
        if not self._has_written:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(path) if _step_of(line) < step]
            write_text(path, "".join(f"{line}\n" for line in kept))
            self._has_written = True
        with open(path, "a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step, **sample}, ensure_ascii=False, default=str) + "\n")

    def save(self, path: Path, **values: Any) -> None:
        """Write everything but the completions, and `values`, to `path`; after `drain`."""
        write_json(path, {**values, "rollouts": self.rollouts, "sums": self._sums})

    def write_rollouts(self, path: Path) -> None:
        """Write the rows of all rollouts as JSON lines: reward against KL, and all else that a rollout has."""
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in self.rollouts))

    def load(self, path: Path) -> dict[str, Any]:
        """Read what `save` wrote and return it."""
        state = read_json(path)
        self.rollouts, self._sums = state["rollouts"], state["sums"]
        self._pending, self._has_written = [], False
        return state


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a kill cut the line short
        return float("inf")
