"""Stopping on request: a signal only sets a flag, and the training loop stops at the end of its step."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run stopped on a signal after it had saved its state; the same command continues it."""


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a flag; a second SIGINT interrupts at once.

    Use as `with StopRequest() as stop: ... if stop.requested: save and raise Interrupted`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def is_requested(self) -> bool:
        """Whether a signal has come."""
        return self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
