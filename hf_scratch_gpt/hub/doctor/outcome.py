"""What a check is and what comes out of it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

# Largest difference of two ways of computing the same logits, as a share of the logits' spread. In fp32 they differ by
# 1e-7 to 1e-5 of it; each fault that the tests plant shows as more than 1e-2.
TOLERANCE = 1e-3


class Skipped(Exception):
    """A check does not apply; the text says why, from something that the model or tokenizer declares."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check measured, and whether that is as it should be."""

    passed: bool
    measured: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One line of the report."""

    name: str
    status: Literal["pass", "fail", "skip"]
    measured: str
    expected: str
    remedy: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Check:
    """A named question about a model (`function` of a `Subject`), what it should find, and what to do if not."""

    name: str
    function: Callable[[Any], Finding]
    expected: str
    remedy: str

    def run(self, subject: Any) -> Outcome:
        """Ask the question; whatever the model's code raises on the way is a failure of this check."""
        start = time.perf_counter()
        status: Literal["pass", "fail", "skip"]
        try:
            finding = self.function(subject)
            status, measured = "pass" if finding.passed else "fail", finding.measured
        except Skipped as reason:
            status, measured = "skip", str(reason)
        except Exception as error:
            status, measured = "fail", in_one_line(error)
        seconds = time.perf_counter() - start
        return Outcome(self.name, status, measured, self.expected, self.remedy, round(seconds, 3))


class Checks(list[Check]):
    """The checks of one file, in the order in which they are written."""

    def add(self, name: str, expected: str, remedy: str) -> Callable:
        """Register the decorated function as the check `name`."""

        def register(function: Callable[[Any], Finding]) -> Callable[[Any], Finding]:
            self.append(Check(name, function, expected, remedy))
            return function

        return register


def in_one_line(error: BaseException, longest: int = 200) -> str:
    """An error's class and the first line of its text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


def compare(
    actual: Any, expected: Any, spread: float, tolerance: float = TOLERANCE, what: str = "logits", unit: str = "spread"
) -> Finding:
    """Whether two tensors agree up to `tolerance` x `spread` in every place.

    Args:
        actual, expected (`torch.Tensor`): Of any, equal, shape.
        spread (`float`): Scale of the values, such as the logits' standard deviation.
        tolerance (`float`, *optional*, defaults to `1e-3`): As a share of `spread`.
        what, unit (`str`, *optional*, defaults to `"logits"` and `"spread"`): Names of values and scale in the report.
    """
    if actual.shape != expected.shape:
        return Finding(False, f"{what} of shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not actual.isfinite().all():
        return Finding(False, f"{what} that are not finite")
    difference = (actual.float() - expected.float()).abs().max().item() / spread
    return Finding(difference <= tolerance, f"{what} differ by {difference:.1g} of their {unit}")


def all_of(*findings: Finding) -> Finding:
    """The first finding that failed, or the last where all passed."""
    return next((finding for finding in findings if not finding.passed), findings[-1])
