"""What a reward model's held-out scores tell: how often it is right, how sure it may be, and whether it counts tokens.

A reward model that has learnt "longer is better" looks well on pairs whose better answer is longer, and a policy that
is optimised against it learns to ramble (Singhal et al. 2023, https://arxiv.org/abs/2310.03716). So its accuracy
stands beside that of the rules that only count tokens, and beside the difference in length.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_scratch_gpt.evaluation.intervals import Interval, bootstrap_ratio, wilson

CHANCE = 0.5
_GROUPS = 10  # deciles of length difference, and bins of confidence
# A model that agrees with a rule of length in more than two of three pairs, and no less often than with the labels.
_BY_LENGTH = 2 / 3


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """Rewards and lengths (tokens, whole conversations) of both answers of each pair; a prompt may have several pairs.

    Args:
        better (`ndarray`), worse (`ndarray`): (pairs) Rewards.
        better_length (`ndarray`), worse_length (`ndarray`): (pairs) Tokens.
        prompt (`ndarray`): (pairs) Number of the pair's prompt.
    """

    better: np.ndarray
    worse: np.ndarray
    better_length: np.ndarray
    worse_length: np.ndarray
    prompt: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """Reward of the better answer less that of the worse one: positive is right."""
        return self.better - self.worse

    @property
    def length_differences(self) -> np.ndarray:
        """Tokens of the better answer less those of the worse one."""
        return self.better_length - self.worse_length

    def share(self, holds: np.ndarray) -> Interval:
        """How often `holds` (pairs) is true, with 95% interval: Wilson's, or over prompts where one has many pairs."""
        prompts, number, counts = np.unique(self.prompt, return_inverse=True, return_counts=True)
        if len(prompts) == len(self.prompt):
            return wilson(int(holds.sum()), len(holds))
        hits = np.bincount(number, weights=holds)
        return dataclasses.replace(bootstrap_ratio(hits.tolist(), counts.tolist()), n=len(holds))


def health_metrics(pairs: ScoredPairs, rewards: Sequence[float], lengths: Sequence[int]) -> dict[str, Any]:
    """All held-out measures, for `metrics.json`; `rewards` and `lengths` hold each answer once.

    A tie of rewards counts as wrong. `length_correlation` is over answers, `length_difference_correlation` over pairs:
    in it, what makes one prompt's answers long and good cancels out.
    """
    gaps, differences = pairs.gaps, pairs.length_differences
    accuracy = pairs.share(gaps > 0)
    prompts = len(np.unique(pairs.prompt))
    return {
        "heldout_accuracy": accuracy.mean,
        "heldout_accuracy_interval": [accuracy.low, accuracy.high],
        "heldout_pairs": accuracy.n,
        **({"heldout_prompts": prompts} if prompts < accuracy.n else {}),
        "chance": CHANCE,
        "heldout_margin": float(gaps.mean()),
        "heldout_loss": float(np.logaddexp(0, -gaps).mean()),
        "heldout_ties": float((gaps == 0).mean()),
        "longer_wins_accuracy": float((differences > 0).mean()),
        "shorter_wins_accuracy": float((differences < 0).mean()),
        "equal_length_share": float((differences == 0).mean()),
        "prefers_longer": _prefers_longer(pairs),
        "length_correlation": correlation(rewards, lengths),
        "length_difference_correlation": correlation(gaps, differences),
        "length_deciles": length_deciles(pairs),
        **calibration_metrics(gaps),
    }


def _prefers_longer(pairs: ScoredPairs) -> dict[str, Any] | None:
    """How often the model gives the longer answer the higher reward, over pairs of unequal length and reward."""
    unequal = (pairs.length_differences != 0) & (pairs.gaps != 0)
    if not unequal.any():
        return None
    chosen = ScoredPairs(*(getattr(pairs, field.name)[unequal] for field in dataclasses.fields(pairs)))
    right = chosen.gaps > 0
    share = chosen.share(np.where(chosen.length_differences > 0, right, chosen.gaps < 0))
    return {
        "share": share.mean,
        "interval": [share.low, share.high],
        "pairs": share.n,
        "accuracy": float(right.mean()),
    }


def length_deciles(pairs: ScoredPairs) -> list[dict[str, Any]]:
    """Accuracy and mean reward gap in tenths of the pairs, from the better answer far shorter to far longer."""
    order = np.argsort(pairs.length_differences, kind="stable")
    groups = [group for group in np.array_split(order, _GROUPS) if len(group)]
    return [
        {
            "pairs": len(group),
            "length_difference": [
                int(pairs.length_differences[group].min()),
                int(pairs.length_differences[group].max()),
            ],
            "reward_gap": float(pairs.gaps[group].mean()),
            "accuracy": float((pairs.gaps[group] > 0).mean()),
        }
        for group in groups
    ]


def calibration_metrics(gaps: np.ndarray) -> dict[str, Any]:
    """Whether sigmoid(reward gap), the chance that Bradley-Terry gives the preferred answer, is right that often.

    `expected_calibration_error` is the mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599), with ten equal bins of confidence from 0.5 to 1; `reliability` lists the bins.
    A tie has confidence 0.5 and is half right.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    right = np.where(gaps == 0, 0.5, gaps > 0)
    bins = np.minimum(((confidence - CHANCE) / CHANCE * _GROUPS).astype(int), _GROUPS - 1)
    reliability = [
        {
            "pairs": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(right[bins == number].mean()),
        }
        for number in np.unique(bins)
    ]
    error = sum(entry["pairs"] * abs(entry["accuracy"] - entry["confidence"]) for entry in reliability) / len(gaps)
    return {"expected_calibration_error": float(error), "reliability": reliability}


def correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Pearson's correlation, or `None` where one side does not vary."""
    if np.std(first) == 0 or np.std(second) == 0:
        return None
    value = float(np.corrcoef(first, second)[0, 1])
    return value if math.isfinite(value) else None


def length_warning(metrics: dict[str, Any]) -> str | None:
    """A line that says so where the model ranks mostly by length, or where the pairs cannot tell whether it does."""
    agreement = metrics["prefers_longer"]
    if agreement is None:
        return None
    low, high = agreement["interval"]
    longer = low > _BY_LENGTH
    share = agreement["share"] if longer else 1 - agreement["share"]
    if not (longer or high < 1 - _BY_LENGTH) or share < agreement["accuracy"]:
        return None
    rule = "longer" if longer else "shorter"
    rule_accuracy = metrics[f"{rule}_wins_accuracy"]
    return (
        f"ranks by length: it prefers the {rule} answer in {share:.0%} of {agreement['pairs']} held-out pairs of "
        f"unequal length, and is right in {agreement['accuracy']:.0%}; the rule '{rule} wins' alone is right in "
        f"{rule_accuracy:.0%} of all. Add pairs whose better answer is not the {rule} one"
    )


def health_lines(metrics: dict[str, Any]) -> list[str]:
    """The measures as lines for the console."""
    low, high = metrics["heldout_accuracy_interval"]

    def number(name: str) -> str:
        return "undefined" if metrics[name] is None else f"{metrics[name]:+.2f}"

    lines = [
        f"ranks {metrics['heldout_accuracy']:.1%} ({low:.1%} to {high:.1%}) of {metrics['heldout_pairs']} held-out "
        f"pairs rightly; chance {metrics['chance']:.0%}, 'longer wins' {metrics['longer_wins_accuracy']:.1%}, "
        f"'shorter wins' {metrics['shorter_wins_accuracy']:.1%}",
        f"correlation of reward and length {number('length_correlation')}, of their differences in a pair "
        f"{number('length_difference_correlation')}; ties {metrics['heldout_ties']:.1%}; calibration error "
        f"{metrics['expected_calibration_error']:.3f}",
    ]
    deciles = metrics["length_deciles"]
    if len(deciles) == _GROUPS:
        accuracies = " ".join(f"{entry['accuracy']:.0%}" for entry in deciles)
        first, last = deciles[0]["length_difference"][0], deciles[-1]["length_difference"][1]
        lines.append(f"accuracy by decile of length difference ({first:+d} to {last:+d} tokens): {accuracies}")
    return lines
