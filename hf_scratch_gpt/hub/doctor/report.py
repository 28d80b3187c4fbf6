"""Tells what the checks found: one line a check for people, JSON for machines."""

import dataclasses
from collections import Counter
from typing import Any

from hf_scratch_gpt.hub.doctor.outcome import Outcome

_MARKS = {"pass": "pass", "fail": "FAIL", "skip": "skip"}


def as_json(model: str, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """The report as plain values: the model, counts by status, seconds, and every check."""
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "model": model,
        "seconds": round(seconds, 2),
        **{status: counts[status] for status in ("pass", "fail", "skip")},
        "checks": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def as_table(model: str, outcomes: list[Outcome], seconds: float) -> str:
    """One line a check: its name, the result, what was measured, what was expected, and for a failure the remedy."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{_MARKS[outcome.status]}  {outcome.name:{width}}  {_told(outcome)}" for outcome in outcomes]
    counts = Counter(outcome.status for outcome in outcomes)
    summary = f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped in {seconds:.0f} s"
    return "\n".join([*lines, f"{model}: {summary}"])


def _told(outcome: Outcome) -> str:
    if outcome.status == "skip":
        return f"skipped: {outcome.measured}"
    told = f"{outcome.measured} (expected: {outcome.expected})"
    return f"{told}. Remedy: {outcome.remedy}" if outcome.status == "fail" else told
