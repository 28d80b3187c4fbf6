"""The health of a reward model, by hand-computed numbers: accuracy, ties, length, calibration."""

import numpy as np
import pytest

from hf_scratch_gpt.alignment import reward_health
from hf_scratch_gpt.alignment.reward_health import ScoredPairs, health_metrics, length_warning
from hf_scratch_gpt.evaluation.intervals import wilson


def scored(gaps, differences, prompt=None):
    gaps, differences = np.array(gaps, dtype=float), np.array(differences)
    zeros = np.zeros(len(gaps))
    return ScoredPairs(gaps, zeros, 50 + differences, 50 + 0 * differences, np.array(prompt or range(len(gaps))))


def measured(gaps, differences, prompt=None):
    pairs = scored(gaps, differences, prompt)
    return health_metrics(pairs, pairs.better, pairs.better_length)


def test_ties_are_wrong_and_the_rules_of_length_stand_beside_the_accuracy():
    metrics = measured([1.0, 2.0, 0.0, -1.0], [3, -2, 5, 0])
    interval = wilson(2, 4)
    assert metrics["heldout_accuracy"] == 0.5
    assert metrics["heldout_accuracy_interval"] == [interval.low, interval.high]
    assert metrics["heldout_ties"] == 0.25
    assert metrics["heldout_margin"] == 0.5
    assert (metrics["longer_wins_accuracy"], metrics["shorter_wins_accuracy"]) == (0.5, 0.25)
    assert metrics["equal_length_share"] == 0.25
    # Unequal in length and reward: the first two; the model prefers the longer answer in the first.
    assert metrics["prefers_longer"]["share"] == 0.5
    assert metrics["prefers_longer"]["pairs"] == 2


def test_correlations_are_pearsons_and_undefined_where_a_side_does_not_vary():
    gaps, differences = [1.0, 2.0, 4.0], [1, 5, 2]
    centred_gaps, centred_differences = np.array(gaps) - 7 / 3, np.array(differences) - 8 / 3
    by_hand = (centred_gaps @ centred_differences) / np.sqrt(
        (centred_gaps @ centred_gaps) * (centred_differences @ centred_differences)
    )
    metrics = measured(gaps, differences)
    assert metrics["length_difference_correlation"] == pytest.approx(by_hand)
    assert metrics["length_correlation"] == pytest.approx(by_hand)
    assert measured(gaps, [2, 2, 2])["length_correlation"] is None
    assert reward_health.correlation([1.0, 1.0], [1, 2]) is None


def test_deciles_go_from_the_shorter_to_the_longer_better_answer_and_hold_every_pair_once():
    differences = list(range(-10, 10))
    gaps = [1.0 if difference > 0 else -1.0 for difference in differences]
    deciles = measured(gaps, differences)["length_deciles"]
    assert [entry["pairs"] for entry in deciles] == [2] * 10
    assert [entry["length_difference"] for entry in deciles][:2] == [[-10, -9], [-8, -7]]
    assert [entry["accuracy"] for entry in deciles] == [0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1]
    assert [entry["reward_gap"] for entry in deciles] == [-1, -1, -1, -1, -1, 0, 1, 1, 1, 1]
    assert sum(entry["pairs"] for entry in measured([1.0] * 7, range(7))["length_deciles"]) == 7


def test_calibration_error_by_hand():
    # Three pairs at confidence 0.75, of which one is wrong; one tie.
    gap = np.log(3)
    found = reward_health.calibration_metrics(np.array([gap, gap, -gap, 0.0]))
    assert found["expected_calibration_error"] == pytest.approx(3 / 4 * abs(2 / 3 - 0.75) + 1 / 4 * 0)
    assert [entry["pairs"] for entry in found["reliability"]] == [1, 3]
    assert found["reliability"][1]["confidence"] == pytest.approx(0.75)


def test_scores_drawn_by_their_own_confidence_are_calibrated_and_twice_as_sure_ones_are_not():
    generator = np.random.default_rng(0)
    strengths = generator.exponential(1.5, 20_000)
    gaps = np.where(generator.random(20_000) < 1 / (1 + np.exp(-strengths)), strengths, -strengths)
    assert reward_health.calibration_metrics(gaps)["expected_calibration_error"] < 0.01
    assert reward_health.calibration_metrics(2 * gaps)["expected_calibration_error"] > 0.05


def test_several_pairs_of_one_prompt_are_no_independent_evidence():
    gaps, differences = [1.0] * 30 + [-1.0] * 30, [0] * 60
    narrow = measured(gaps, differences)
    wide = measured(gaps, differences, [number // 6 for number in range(60)])
    assert narrow["heldout_accuracy"] == wide["heldout_accuracy"] == 0.5
    assert (narrow["heldout_pairs"], wide["heldout_pairs"], wide["heldout_prompts"]) == (60, 60, 10)
    widths = [np.diff(metrics["heldout_accuracy_interval"])[0] for metrics in (narrow, wide)]
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize(("sign", "rule"), [(1, "longer"), (-1, "shorter")])
def test_a_model_that_counts_tokens_is_told_of(sign, rule):
    generator = np.random.default_rng(1)
    differences = generator.integers(1, 40, 200) * generator.choice([-1, 1], 200)
    by_length = measured(sign * differences / 10, differences)
    assert f"prefers the {rule} answer in 100% of 200" in length_warning(by_length)
    # One that knows the truth is not, though the better answer is the longer one in two of three pairs.
    differences = np.where(np.arange(200) % 3 == 0, -1, 1) * generator.integers(1, 40, 200)
    assert length_warning(measured(generator.normal(2, 1, 200), sign * differences)) is None


def test_no_warning_where_nothing_differs_in_length_or_reward():
    assert length_warning(measured([1.0] * 50, [0] * 50)) is None
    assert length_warning(measured([0.0] * 50, range(1, 51))) is None
    assert length_warning(measured([1.0, 1.0, 1.0], [1, 2, 3])) is None  # three pairs prove nothing


def test_pairs_whose_better_answer_is_always_the_longer_one_cannot_clear_a_model():
    metrics = measured([1.0] * 100, range(1, 101))
    assert "the rule 'longer wins' alone is right in 100%" in length_warning(metrics)


def test_console_lines_name_chance_rules_and_deciles():
    lines = reward_health.health_lines(measured([1.0, -1.0] * 10, range(20)))
    assert "ranks 50.0%" in lines[0]
    assert "chance 50%, 'longer wins' 95.0%" in lines[0]
    assert "accuracy by decile of length difference (+0 to +19 tokens): 50% 50%" in lines[2]
