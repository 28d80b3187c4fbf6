"""The clock of a row: seconds of training without those of evaluation, the steps' times, and the curve."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass
class Watch:
    """Decides when a row is done, and notes what it did.

    Args:
        steps (`int`): Train for so many steps; unless there are
        seconds (`float`): seconds of training to train for, compiling included and evaluation not.
        interval (`float`): Seconds of training between two points of the curve.
        evaluate: Bits per byte of the model now; `None` for no curve.

    Attributes:
        step_seconds (`list[float]`): Of each step.
        curve (`list[tuple[float, float]]`): Seconds of training, and bits per byte then.
    """

    steps: int = 0
    seconds: float = 0.0
    interval: float = 10.0
    evaluate: Callable[[], float] | None = None
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    _begin: float | None = None
    _paused: float = 0.0
    _last: float = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._begin, self._last = time.monotonic(), 0.0

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return 0.0 if self._begin is None else time.monotonic() - self._begin - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here does not count."""
        begin = time.monotonic()
        try:
            yield
        finally:
            if self._begin is not None:
                self._paused += time.monotonic() - begin

    def due(self) -> bool:
        """Whether the curve should have another point."""
        return self.elapsed() >= (self.curve[-1][0] if self.curve else 0.0) + self.interval

    def note_point(self) -> None:
        """Evaluate, off the clock, and add the point to the curve."""
        assert self.evaluate is not None
        with self.paused():
            self.curve.append((sum(self.step_seconds), self.evaluate()))

    def note_step(self) -> None:
        """A step is over; evaluates if a point is due."""
        now = self.elapsed()
        self.step_seconds.append(now - self._last)
        self._last = now
        if self.evaluate is not None and not self.finished and self.due():
            self.note_point()

    @property
    def progress(self) -> float:
        """Share of the budget that is gone, 0 to 1."""
        if self.seconds:
            return min(1.0, self.elapsed() / self.seconds)
        return min(1.0, len(self.step_seconds) / self.steps)

    @property
    def finished(self) -> bool:
        """Whether another step would go beyond the budget."""
        if self.seconds:
            recent = sorted(self.step_seconds[1:][-5:])  # the first one may have compiled
            return self.elapsed() + (recent[len(recent) // 2] if recent else 0.0) > self.seconds
        return len(self.step_seconds) >= self.steps


def time_to(curve: list[tuple[float, float]], target: float) -> float | None:
    """Seconds at which a curve first comes down to `target`, on the line between two points; `None` if it never does.

    A curve that is below from its first point on gives that point's seconds.
    """
    before = None
    for seconds, value in curve:
        if value <= target:
            if before is None or before[1] <= target:
                return seconds
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    return None
