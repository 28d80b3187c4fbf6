"""The scaling law of a ladder of small models, what it predicts of a bigger one, and how surely.

The law is a power law that is bounded by the loss of guessing: 1 / loss = 1 / (a x size^-b) + 1 / ceiling, the ceiling
being that of an even guess among all tokens, ln(vocabulary) a token, which is known without training anything. Kaplan
et al. 2020 (https://arxiv.org/abs/2001.08361) found the power law; GPT-4's report (https://arxiv.org/abs/2303.08774,
section 3) predicted a model's loss by one before the model was trained. It cannot hold for the small models of a
ladder, which are trained on few tokens: towards no size and no tokens their loss goes to the ceiling, not to infinity,
so that in logarithms the curve is flat at first, and steepens. A straight line through its flat part predicts too high
a loss. BENCHMARKS.md has the measurements. Where the loss is far below the ceiling, both laws are one; without a
ceiling the fit is the plain power law.

Every model of a ladder sees the same number of tokens a parameter, so that size alone varies. An irreducible loss E
(Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556) is left out: over the factor of ten or so that a short ladder
spans, E and b trade against each other and the fit does not determine them. The price is a bias that grows with the
distance, since the true curve bends towards E: hence no prediction beyond ten times the largest model, and always a
check by a larger run.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_SIZES = 3
MAX_EXTRAPOLATION = 10.0
_RESAMPLES = 4000
_TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """1 / loss = 1 / (coefficient x size^-exponent) + 1 / ceiling.

    Args:
        coefficient (`float`): What the power law alone gives for one parameter, in the unit of the losses.
        exponent (`float`): How fast the loss falls where it is far below the ceiling; ten times the size multiply it
            by 10^-exponent there.
        ceiling (`float`, *optional*): The loss of an even guess among all tokens; none for the plain power law.
    """

    coefficient: float
    exponent: float
    ceiling: float | None = None

    def loss(self, size: float) -> float:
        """The loss of a model of `size` parameters."""
        return float(bounded(self.coefficient * size**-self.exponent, self.ceiling))


def bounded(power: Any, ceiling: float | None) -> Any:
    """The loss that a power law's value (a number or an array) means under a ceiling."""
    return power if ceiling is None else power / (1 + power / ceiling)


def unbounded(loss: Any, ceiling: float | None) -> Any:
    """The power law's value that a loss below the ceiling means: the inverse of `bounded`."""
    return loss if ceiling is None else loss / (1 - loss / ceiling)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a ladder says of one training run of a larger model; intervals are of 95%.

    Args:
        size (`float`): Parameters of that model, counted as the ladder's.
        loss (`float`): The law's loss there.
        low (`float`), high (`float`): The interval in which the loss of one run should lie if the law holds there.
        exponent_low (`float`), exponent_high (`float`): The interval of the law's exponent.
        extrapolation (`float`): `size` over the largest of the ladder.
        law (`PowerLaw`): The fit.
    """

    size: float
    loss: float
    low: float
    high: float
    exponent_low: float
    exponent_high: float
    extrapolation: float
    law: PowerLaw


class _Line:
    """Least squares of the power law's log value on log size, for many sets of values (sets x runs) at once."""

    def __init__(self, log_sizes: np.ndarray, log_losses: np.ndarray):
        self.runs = len(log_sizes)
        self.middle = log_sizes.mean()
        offsets = log_sizes - self.middle
        self.spread = float(offsets @ offsets)
        self.mean = log_losses.mean(axis=-1)
        self.slope = log_losses @ offsets / self.spread
        self.fitted = self.mean[..., None] + self.slope[..., None] * offsets
        self.residuals = log_losses - self.fitted
        self.leverages = 1 / self.runs + offsets**2 / self.spread
        self.deviation = np.sqrt((self.residuals**2).sum(axis=-1) / (self.runs - 2))

    def at(self, log_size: float) -> np.ndarray:
        return self.mean + self.slope * (log_size - self.middle)

    def new_run_factor(self, log_size: float) -> float:
        """Standard error of a new run's logarithm less the line there, in units of `deviation`."""
        return math.sqrt(1 + 1 / self.runs + (log_size - self.middle) ** 2 / self.spread)


def fit_power_law(sizes: Sequence[float], losses: Sequence[float], ceiling: float | None = None) -> PowerLaw:
    """The law through (size, loss) of each run: least squares in logarithms, every run the same weight.

    Args:
        sizes: Parameters of each run.
        losses: Loss of each run.
        ceiling (`float`, *optional*): The loss of an even guess, in the same unit; none for the plain power law.

    Raises:
        ValueError: for fewer than three different sizes, or a size or loss that is not a positive number, or a loss
            that is no better than the ceiling.
    """
    line = _Line(*_logarithms(sizes, losses, ceiling))
    return PowerLaw(coefficient=float(np.exp(line.at(0.0))), exponent=float(-line.slope), ceiling=ceiling)


def _logarithms(
    sizes: Sequence[float], losses: Sequence[float], ceiling: float | None
) -> tuple[np.ndarray, np.ndarray]:
    if len(sizes) != len(losses):
        raise ValueError(f"expected a loss for each size, found {len(sizes)} sizes and {len(losses)} losses")
    for name, values in (("size", sizes), ("loss", losses)):
        for value in values:
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a {name} of the ladder is {value}, expected a positive number")
    if len(set(sizes)) < MIN_SIZES:
        raise ValueError(
            f"the ladder has {len(set(sizes))} different sizes, expected at least {MIN_SIZES}: two points fit any law"
        )
    if ceiling is not None and not max(losses) < ceiling:
        raise ValueError(
            f"a loss of the ladder is {max(losses):.4g}, no better than an even guess among all tokens "
            f"({ceiling:.4g}): its model has learnt nothing; train it on more tokens or with another learning rate"
        )
    values = unbounded(np.asarray(losses, dtype=np.float64), ceiling)
    return np.log(np.asarray(sizes, dtype=np.float64)), np.log(values)


def check_extrapolation(largest: float, size: float) -> None:
    """Refuse a size that is further from the ladder than a law without an irreducible loss can be trusted.

    Raises:
        ValueError: if `size` is more than ten times `largest`.
    """
    if size > MAX_EXTRAPOLATION * largest:
        raise ValueError(
            f"{size:,.0f} parameters are {size / largest:.1f} times the ladder's largest model ({largest:,.0f}); a "
            f"fit is not trusted beyond {MAX_EXTRAPOLATION:g} times: add a size of at least "
            f"{math.ceil(size / MAX_EXTRAPOLATION):,} to the ladder"
        )


def predict(
    sizes: Sequence[float],
    losses: Sequence[float],
    size: float,
    ceiling: float | None = None,
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Prediction:
    """Predict the loss of one run of a model of `size` parameters from the runs of a ladder.

    The interval is a studentised bootstrap of residuals for a new observation (Davison and Hinkley, Bootstrap Methods
    and their Application, 1997, section 6.3.3). A run's residual is its seed's luck and its size's deviation from the
    law together; resampling the two seeds of a size alone would halve the variance, and leave the sizes' part out.

    Args:
        sizes: Parameters of each run; runs of several seeds repeat theirs.
        losses: Loss of each run.
        size (`float`): Parameters of the model to predict.
        ceiling (`float`, *optional*): The loss of an even guess, in the same unit; none for the plain power law.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.
        resamples (`int`, *optional*, defaults to `4000`): Resampled ladders.

    Raises:
        ValueError: as `fit_power_law` and `check_extrapolation`; or if the losses do not fall with size.
    """
    log_sizes, log_values = _logarithms(sizes, losses, ceiling)
    check_extrapolation(max(sizes), size)
    law, line = fit_power_law(sizes, losses, ceiling), _Line(log_sizes, log_values)
    if law.exponent <= 0:
        raise ValueError(
            f"the ladder's losses do not fall with size (exponent {law.exponent:.3f}), so there is nothing to "
            "extrapolate: train it on more tokens, or with a learning rate that suits its largest model"
        )
    where = math.log(size)
    draw = np.random.default_rng(seed)
    residuals = line.residuals / np.sqrt(1 - line.leverages)
    residuals -= residuals.mean()
    again = _Line(log_sizes, line.fitted + draw.choice(residuals, (resamples, len(sizes))))
    usable = again.deviation > 1e-6 * line.deviation  # the same residual everywhere tells nothing of the spread
    new_errors = line.at(where) + draw.choice(residuals, resamples) - again.at(where)
    factor = line.new_run_factor(where)
    low, high = _studentised(float(line.at(where)), float(line.deviation) * factor, new_errors, again, usable, factor)
    slope_factor = 1 / math.sqrt(line.spread)
    slope_low, slope_high = _studentised(
        float(line.slope),
        float(line.deviation) * slope_factor,
        line.slope - again.slope,
        again,
        usable,
        slope_factor,
    )
    return Prediction(
        size=size,
        loss=law.loss(size),
        low=bounded(math.exp(low), ceiling),
        high=bounded(math.exp(high), ceiling),
        exponent_low=-slope_high,
        exponent_high=-slope_low,
        extrapolation=size / max(sizes),
        law=law,
    )


def _studentised(
    estimate: float, error: float, differences: np.ndarray, again: _Line, usable: np.ndarray, factor: float
) -> tuple[float, float]:
    """Interval around `estimate` of standard error `error`, from resampled differences over their own errors."""
    if not usable.any():  # every run lies on the line
        return estimate, estimate
    ratios = differences[usable] / (again.deviation[usable] * factor)
    low, high = np.quantile(ratios, _TAILS)
    return estimate + float(low) * error, estimate + float(high) * error


def mean_losses(sizes: Sequence[float], losses: Sequence[float]) -> dict[float, float]:
    """The mean loss over the seeds of each size, by size in ascending order."""
    return {
        size: float(np.mean([loss for other, loss in zip(sizes, losses, strict=True) if other == size]))
        for size in sorted(set(sizes))
    }


def rises(sizes: Sequence[float], losses: Sequence[float]) -> list[tuple[float, float]]:
    """Neighbouring sizes (smaller, larger) of which the larger has no lower mean loss: a sign of a bad ladder."""
    means = mean_losses(sizes, losses)
    return [(small, large) for small, large in itertools.pairwise(means) if means[large] >= means[small]]


def deviation(sizes: Sequence[float], losses: Sequence[float], ceiling: float | None = None) -> float:
    """Residual standard deviation of the law in log loss, which is about a run's relative deviation from it."""
    law = fit_power_law(sizes, losses, ceiling)
    residuals = [math.log(loss / law.loss(size)) for size, loss in zip(sizes, losses, strict=True)]
    return math.sqrt(math.fsum(value**2 for value in residuals) / (len(sizes) - 2))


def backtest(sizes: Sequence[float], losses: Sequence[float], ceiling: float | None = None) -> float | None:
    """Relative error of predicting the largest size's mean loss from the smaller ones; `None` if too few are left.

    It is measured before the larger model is trained, and shows a bend that no interval of the fit can.
    """
    largest = max(sizes)
    kept = [(size, loss) for size, loss in zip(sizes, losses, strict=True) if size != largest]
    if len({size for size, _ in kept}) < MIN_SIZES:
        return None
    law = fit_power_law([size for size, _ in kept], [loss for _, loss in kept], ceiling)
    return law.loss(largest) / mean_losses(sizes, losses)[largest] - 1
