"""95% intervals: Wilson's for proportions, percentile bootstrap for means, ratios and paired differences.

A metric without its sample size and interval is a rumour: everything that `evaluate` reports goes through here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_Z_95 = 1.959963984540054  # the normal distribution's 97.5% point
_RESAMPLES = 2000
_VALUES_AT_ONCE = 1 << 22  # draws held in memory at a time, some 32 MB


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Args:
        mean (`float`): The estimate.
        low (`float`): Lower end of the 95% interval.
        high (`float`): Upper end of the 95% interval.
        n (`int`): Number of independent items that the estimate rests on.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval: for a difference, whether it is significant at 5%."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def wilson(successes: int, total: int) -> Interval:
    """The share `successes / total` with Wilson's score interval (Wilson, 1927), which is sound near 0 and 1.

    Raises:
        ValueError: if `total` is not positive or `successes` is not within 0..total.
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"expected 0 <= successes <= total and total > 0, found {successes} of {total}")
    share = successes / total
    denominator = 1 + _Z_95**2 / total
    centre = (share + _Z_95**2 / (2 * total)) / denominator
    half = _Z_95 / denominator * math.sqrt(share * (1 - share) / total + _Z_95**2 / (4 * total**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Interval(share, low, high, total)


def _resampled_means(columns: np.ndarray, seed: int) -> np.ndarray:
    """Means of `columns` (items x k) over bootstrap resamples of the items: resamples x k."""
    generator = np.random.default_rng(seed)
    items = len(columns)
    at_once = max(1, _VALUES_AT_ONCE // items)
    parts = []
    for start in range(0, _RESAMPLES, at_once):
        chosen = generator.integers(0, items, size=(min(at_once, _RESAMPLES - start), items))
        parts.append(columns[chosen].mean(axis=1))
    return np.concatenate(parts)


def _check(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"'{name}': expected a non-empty list of numbers, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"'{name}': item {int(np.argmin(np.isfinite(array)))} is not a finite number")
    return array


def _ends(estimates: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(estimates, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of `values` with a percentile bootstrap interval (Efron, 1979; 2,000 resamples, a function of `seed`).

    Raises:
        ValueError: if `values` is empty or holds a number that is not finite.
    """
    array = _check(values, "values")
    low, high = _ends(_resampled_means(array[:, None], seed)[:, 0])
    return Interval(float(array.mean()), low, high, array.size)


def bootstrap_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """`sum(numerators) / sum(denominators)` with an interval by resampling the items that carry both.

    Bits per byte is such a ratio: documents are resampled, not tokens, since tokens of a document are not independent.

    Raises:
        ValueError: if the lists are empty, of different lengths, or a denominator is not positive.
    """
    above, below = _check(numerators, "numerators"), _check(denominators, "denominators")
    if above.size != below.size:
        raise ValueError(f"expected as many denominators as numerators, found {below.size} and {above.size}")
    if (below <= 0).any():
        raise ValueError(f"denominator {int(np.argmax(below <= 0))} is not positive")
    means = _resampled_means(np.stack([above, below], axis=1), seed)
    low, high = _ends(means[:, 0] / means[:, 1])
    return Interval(float(above.sum() / below.sum()), low, high, above.size)


def paired_difference(values: Sequence[float], reference: Sequence[float], seed: int = 0) -> Interval:
    """Mean of `values - reference`, item by item, with a bootstrap interval over the items.

    Both lists are about the same items (prompts), so that what makes an item easy or hard cancels out.

    Raises:
        ValueError: if the lists are empty or of different lengths.
    """
    ours, theirs = _check(values, "values"), _check(reference, "reference")
    if ours.size != theirs.size:
        raise ValueError(f"expected paired lists, found {ours.size} values and {theirs.size} of the reference")
    return bootstrap_mean(list(ours - theirs), seed)
