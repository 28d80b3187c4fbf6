"""Intervals agree with published and hand-computed values, and cover as often as they say."""

import numpy as np
import pytest

from hf_scratch_gpt.evaluation.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    wilson,
)


def test_wilson_equals_newcombes_published_values():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        interval = wilson(successes, total)
        assert interval.mean == successes / total
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)
    none = wilson(0, 20)
    assert none.low == 0
    assert none.high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(20, 20).high == 1
    assert wilson(20, 20).low == pytest.approx(1 - 0.1611, abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, total):
    with pytest.raises(ValueError, match=f"{successes} of {total}"):
        wilson(successes, total)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval_of_many_values():
    values = np.random.default_rng(1).normal(3, 2, 1000)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_equal_values_have_an_interval_of_no_width():
    assert bootstrap_mean([0.5] * 7) == Interval(0.5, 0.5, 0.5, 7)


def test_intervals_cover_the_truth_about_19_times_in_20():
    generator = np.random.default_rng(0)
    means = [bootstrap_mean(generator.random(60)) for _ in range(200)]
    assert 0.90 <= np.mean([interval.low <= 0.5 <= interval.high for interval in means]) <= 0.99
    shares = [wilson(int(generator.binomial(60, 0.1)), 60) for _ in range(500)]
    assert 0.90 <= np.mean([interval.low <= 0.1 <= interval.high for interval in shares]) <= 0.99


def test_a_ratio_weighs_items_by_their_denominator():
    interval = bootstrap_ratio([8.0, 1.0], [4.0, 4.0])
    assert interval.mean == pytest.approx(9 / 8)  # not the mean of 2 and 1/4 that equal denominators would hide
    assert bootstrap_ratio([8.0, 1.0], [1.0, 3.0]).mean == pytest.approx(9 / 4)
    assert interval.low == pytest.approx(0.25)
    assert interval.high == pytest.approx(2.0)


def test_pairing_finds_a_small_difference_that_separate_intervals_hide():
    hardness = np.random.default_rng(2).random(200)
    better, worse = hardness + 0.02, hardness
    assert bootstrap_mean(better).low < bootstrap_mean(worse).high
    difference = paired_difference(better, worse)
    assert difference.mean == pytest.approx(0.02)
    assert difference.excludes_zero
    assert not paired_difference(worse, worse).excludes_zero


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="item 1"):
        bootstrap_mean([0.0, float("nan")])
    with pytest.raises(ValueError, match="2 values and 1 of"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="denominator 1"):
        bootstrap_ratio([1.0, 2.0], [1.0, 0.0])


def test_as_dict_is_plain_json():
    assert wilson(1, 2).as_dict().keys() == {"mean", "low", "high", "n"}
