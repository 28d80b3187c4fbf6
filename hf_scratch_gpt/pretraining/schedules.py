"""Learning-rate schedules as pure functions, over a budget that counts steps or seconds."""

import dataclasses
import math

SCHEDULES = ("wsd", "cosine", "linear")


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear warm-up: the share of the full rate at `step` (the first is 0); never zero, 1 from `warmup_steps` on."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def decay_factor(progress: float, schedule: str, decay_fraction: float = 1.0, final_fraction: float = 0.0) -> float:
    """Share of the full rate at `progress` (0 at the start, 1 at the end of the budget), without warm-up.

    Args:
        progress: Share of the budget that is used up; values outside 0..1 are taken as the nearest end.
        schedule: `"wsd"` stays at 1 and falls linearly over the last `decay_fraction` (warmup-stable-decay, MiniCPM,
            arXiv:2404.06395); `"cosine"` falls as half a cosine (arXiv:1608.03983), `"linear"` as a line, both from
            the start.
        decay_fraction: Share of the budget that `"wsd"` decays over.
        final_fraction: What is left of the rate at the end.
    """
    progress = min(1.0, max(0.0, progress))
    if schedule == "wsd":
        remaining = min(1.0, (1 - progress) / decay_fraction) if decay_fraction > 0 else 1.0
    elif schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    elif schedule == "linear":
        remaining = 1 - progress
    else:
        raise ValueError(f"unknown schedule '{schedule}': expected one of {', '.join(SCHEDULES)}")
    return final_fraction + (1 - final_fraction) * remaining


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run may spend: so many optimizer steps, or so many seconds; the other one is `None`.

    Args:
        steps (`int`, *optional*): Number of optimizer steps.
        seconds (`float`, *optional*): Stage time, from the start of the stage to the end of the last step.
    """

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, elapsed: float, started: float = 0.0) -> float:
        """Share that is spent before optimizer step `step`, in 0..1.

        Args:
            step: Number of steps taken so far.
            elapsed: Seconds of the stage so far.
            started: `elapsed` when the first step began; what came before (loading, compiling) is no progress.
        """
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, max(0.0, elapsed - started) / max(1e-9, self.seconds - started))

    def spent(self, step: int, elapsed: float, step_seconds: float) -> bool:
        """Whether the run is over: the steps are done, or another step of `step_seconds` would pass the time."""
        if self.steps is not None:
            return step >= self.steps
        assert self.seconds is not None
        return step > 0 and elapsed + step_seconds > self.seconds
