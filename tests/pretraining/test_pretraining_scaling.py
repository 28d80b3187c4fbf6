"""Properties of the scaling law's fit, its intervals, and what it refuses."""

import numpy as np
import pytest

from hf_scratch_gpt.pretraining.scaling import (
    PowerLaw,
    backtest,
    bounded,
    check_extrapolation,
    deviation,
    fit_power_law,
    predict,
    rises,
    unbounded,
)

LADDER = [12_000, 28_000, 49_000, 110_000]


def _ladder(law: PowerLaw, noise: float, draw: np.random.Generator, seeds: int = 2):
    sizes = [size for size in LADDER for _ in range(seeds)]
    return sizes, [law.loss(size) * float(np.exp(noise * draw.standard_normal())) for size in sizes]


def test_a_law_without_noise_is_recovered_exactly():
    law = PowerLaw(8.0, 0.12)
    sizes, losses = _ladder(law, 0.0, np.random.default_rng(0))
    fitted, prediction = fit_power_law(sizes, losses), predict(sizes, losses, 440_000)
    assert fitted.coefficient == pytest.approx(8.0)
    assert fitted.exponent == pytest.approx(0.12)
    assert prediction.loss == pytest.approx(8.0 * 440_000**-0.12)
    assert prediction.low == pytest.approx(prediction.loss)
    assert prediction.high == pytest.approx(prediction.loss)
    assert prediction.extrapolation == pytest.approx(4.0)


def test_a_bounded_law_without_noise_is_recovered_exactly():
    law = PowerLaw(30.0, 0.35, 4.0)
    assert law.loss(10_000) == pytest.approx(1 / (1 / (30 * 10_000**-0.35) + 1 / 4))
    losses = [law.loss(size) for size in LADDER]
    fitted, prediction = fit_power_law(LADDER, losses, 4.0), predict(LADDER, losses, 440_000, 4.0)
    assert (fitted.coefficient, fitted.exponent) == (pytest.approx(30.0), pytest.approx(0.35))
    assert prediction.loss == pytest.approx(law.loss(440_000))
    assert prediction.low == pytest.approx(prediction.high)
    assert deviation(LADDER, losses, 4.0) == pytest.approx(0.0, abs=1e-12)
    # The plain law takes the flat beginning for the slope: it comes out too high, and its own residuals show it.
    assert predict(LADDER, losses, 440_000).loss > 1.03 * law.loss(440_000)
    assert backtest(LADDER, losses) > 0.01
    assert backtest(LADDER, losses, 4.0) == pytest.approx(0.0, abs=1e-12)


def test_a_bound_far_above_the_losses_changes_nothing():
    losses = [PowerLaw(8.0, 0.12).loss(size) for size in LADDER]
    assert predict(LADDER, losses, 440_000, 1e9).loss == pytest.approx(predict(LADDER, losses, 440_000).loss)
    assert bounded(unbounded(2.0, 3.0), 3.0) == pytest.approx(2.0)


@pytest.mark.parametrize("worst", [4.0, 4.1])
def test_a_model_that_has_learnt_nothing_is_refused(worst):
    with pytest.raises(ValueError, match=r"no better than an even guess among all tokens \(4\)"):
        fit_power_law([1e4, 2e4, 4e4], [worst, 3.0, 2.8], 4.0)


def test_the_fit_is_that_of_polyfit_in_logarithms():
    sizes, losses = _ladder(PowerLaw(5.0, 0.08), 0.02, np.random.default_rng(1))
    slope, intercept = np.polyfit(np.log(sizes), np.log(losses), 1)
    law = fit_power_law(sizes, losses)
    assert law.exponent == pytest.approx(-slope)
    assert law.coefficient == pytest.approx(np.exp(intercept))
    residuals = np.log(losses) - (intercept + slope * np.log(sizes))
    assert deviation(sizes, losses) == pytest.approx(np.sqrt((residuals**2).sum() / (len(sizes) - 2)))


def test_a_planted_law_lies_in_the_intervals():
    law = PowerLaw(8.0, 0.12)
    sizes, losses = _ladder(law, 0.005, np.random.default_rng(2))
    prediction = predict(sizes, losses, 440_000)
    assert prediction.low < law.loss(440_000) < prediction.high
    assert prediction.exponent_low < 0.12 < prediction.exponent_high
    assert prediction.high / prediction.low < 1.06


@pytest.mark.parametrize(("seeds", "ceiling"), [(1, None), (2, None), (3, None), (2, 5.0)])
def test_the_intervals_cover_new_runs_as_often_as_they_say(seeds, ceiling):
    law, draw = PowerLaw(6.0, 0.1, ceiling), np.random.default_rng(3)
    ladders, covered, covered_exponent = 400, 0, 0
    for number in range(ladders):
        sizes, losses = _ladder(law, 0.01, draw, seeds)
        outcome = law.loss(440_000) * float(np.exp(0.01 * draw.standard_normal()))
        prediction = predict(sizes, losses, 440_000, ceiling, seed=number, resamples=500)
        covered += prediction.low <= outcome <= prediction.high
        covered_exponent += prediction.exponent_low <= 0.1 <= prediction.exponent_high
    # Binomial error at 95% of 400 is 1.1 points; a percentile interval of two seeds a size covers about 80%.
    assert 0.90 <= covered / ladders <= 0.99
    assert 0.90 <= covered_exponent / ladders <= 0.99


def test_no_prediction_beyond_ten_times_the_largest():
    sizes, losses = _ladder(PowerLaw(8.0, 0.12), 0.01, np.random.default_rng(0))
    assert predict(sizes, losses, 1_100_000).extrapolation == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"11\.0 times the ladder's largest.*at least 121,000") as caught:
        predict(sizes, losses, 1_210_000)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not trusted beyond 10 times"):
        check_extrapolation(110_000, 1_100_001)


def test_two_sizes_make_no_law_however_many_runs():
    with pytest.raises(ValueError, match="2 different sizes, expected at least 3"):
        fit_power_law([1e4, 1e4, 2e4, 2e4], [3.0, 3.1, 2.9, 2.8])


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_loss_that_is_no_positive_number_is_refused(bad):
    with pytest.raises(ValueError, match="a loss of the ladder is"):
        fit_power_law([1e4, 2e4, 4e4], [3.0, bad, 2.8])


def test_losses_that_rise_with_size_are_refused_and_single_rises_are_told():
    with pytest.raises(ValueError, match="do not fall with size"):
        predict([1e4, 2e4, 4e4], [2.0, 2.1, 2.2], 8e4)
    assert rises([1e4, 1e4, 2e4, 4e4], [3.0, 2.8, 2.95, 2.0]) == [(1e4, 2e4)]
    assert rises(LADDER, [3.0, 2.9, 2.8, 2.7]) == []


def test_the_backtest_shows_a_bend_that_the_residuals_hide():
    bent = [1.0 + 60 * size**-0.5 for size in LADDER]  # an irreducible loss: the law must come out too low
    assert backtest(LADDER, bent) < -0.005
    assert backtest(LADDER, [PowerLaw(8.0, 0.12).loss(size) for size in LADDER]) == pytest.approx(0.0, abs=1e-12)
    assert backtest(LADDER[:3], bent[:3]) is None
