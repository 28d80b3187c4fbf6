"""Hand-computed comparisons of two models on three questions."""

import pytest

from hf_scratch_gpt.evaluation.comparison import compare, summarise, win_rate

ROWS = [{"family": "a", "answer": "x"}, {"family": "a", "answer": "y"}, {"family": "b", "answer": "z"}]


def record(golds, sampled=None, ratios=None):
    def judged(gold):
        return {"text": "", "ended": gold > 0, "tokens": 3, "exact": gold == 1, "gold": gold, "kl": 0.5}

    return {
        "parameters": 10,
        "text": {"mean": 1.5, "low": 1.4, "high": 1.6, "n": 2},
        "greedy": [judged(gold) for gold in golds],
        "few_shot": [{"text": "", "exact": gold == 1, "examples": 2} for gold in golds],
        "sampled": [[judged(gold) for gold in answers] for answers in sampled or []],
        "pair_log_ratios": ratios or [],
    }


def test_win_rate_counts_ties_half():
    interval, ties = win_rate([[1.0], [0.5], [0.0]], [[0.0], [0.5], [1.0]])
    assert interval.mean == pytest.approx(0.5)
    assert ties == pytest.approx(1 / 3)
    interval, ties = win_rate([[1.0, 0.0]], [[0.5, 0.0]])  # 1 > .5, 1 > 0, 0 < .5, 0 = 0
    assert interval.mean == pytest.approx(2.5 / 4)
    assert ties == pytest.approx(1 / 4)


def test_a_model_against_itself_wins_half_and_differs_by_nothing():
    one = record([1, 0.2, 0], [[1, 0], [0.5, 0.5], [0, 0.1]])
    told = compare(one, one)
    assert told["win_rate"]["mean"] == 0.5
    assert told["ties"] == 1
    assert told["sampled_win_rate"]["mean"] == pytest.approx(0.5)
    assert told["gold_difference"]["mean"] == 0
    assert not told["significant"]


def test_summary_of_two_models():
    records = {
        "sft": record([1, 0, 0], [[1, 0], [0, 0], [0, 0]], [1.0, 1.0]),
        "dpo": record([1, 1, 0.5], [[1, 1], [1, 0], [0, 1]], [2.0, 0.0]),
    }
    told = summarise(records, ROWS, "sft")
    assert told["chance_level"] == pytest.approx(2 / 3)  # the commonest answer of a is right once in two, of b always
    assert told["families"]["b"] == {"questions": 1, "chance_level": 1.0}
    dpo = told["models"]["dpo"]
    assert dpo["exact_match"]["mean"] == pytest.approx(2 / 3)
    assert dpo["exact_match_by_family"]["a"]["mean"] == 1
    assert dpo["gold_reward"]["mean"] == pytest.approx(2.5 / 3)
    assert dpo["sampled_gold_reward"]["mean"] == pytest.approx(2 / 3)
    assert dpo["sampled_share_ended"]["mean"] == pytest.approx(2 / 3)
    assert dpo["kl"]["mean"] == 0.5
    assert dpo["few_shot_exact_match"]["mean"] == pytest.approx(2 / 3)
    versus = dpo["versus_reference"]
    assert versus["win_rate"]["mean"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert versus["sampled_gold_difference"]["mean"] == pytest.approx(1 / 2)
    assert versus["preference_accuracy"]["mean"] == 0.5
    assert "versus_reference" not in told["models"]["sft"]
    assert "reward" not in dpo  # never measured, so never told


def test_without_a_reference_nothing_is_compared():
    told = summarise({"only": record([1, 0, 0])}, ROWS, None)
    assert "versus_reference" not in told["models"]["only"]
    assert "sampled_gold_reward" not in told["models"]["only"]
