"""Classification measures agree with hand-computed ones, and F1's interval with resampling the rows themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.evaluation.classification import (
    classification_metrics,
    confusion_matrix,
    f1_interval,
    f1_scores,
)
from hf_scratch_gpt.evaluation.intervals import wilson


def test_measures_of_two_labels_by_hand():
    truth, predicted = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    told = classification_metrics(truth, predicted, ["ham", "spam"], "spam", "ham")
    interval = wilson(6, 8)
    assert told["heldout_accuracy"] == 0.75
    assert told["heldout_accuracy_interval"] == [interval.low, interval.high]
    assert told["heldout_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert told["f1_of"] == "spam"
    assert told["confusion_matrix"] == {"labels": ["ham", "spam"], "true_by_predicted": [[4, 1], [1, 2]]}
    assert (told["majority_label"], told["majority_accuracy"]) == ("ham", 5 / 8)
    assert told["heldout_f1_interval"][0] <= told["heldout_f1"] <= told["heldout_f1_interval"][1]


def test_macro_f1_is_the_mean_over_labels_that_occur():
    truth, predicted = [0, 0, 1, 1], [0, 1, 1, 1]
    told = classification_metrics(truth, predicted, ["a", "b", "c"], None, "a")
    assert told["f1_of"] == "macro"
    assert told["heldout_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)  # of "c" nothing can be said


def test_f1_of_a_label_that_is_neither_there_nor_predicted_is_not_told():
    told = classification_metrics([0, 0], [0, 0], ["a", "b"], "b", "a")
    assert "heldout_f1" not in told
    assert told["heldout_accuracy"] == 1.0
    assert classification_metrics([0, 1], [0, 0], ["a", "b"], "b", "a")["heldout_f1"] == 0.0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    truth, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = f1_scores(confusion_matrix(truth, predicted, 3))
    for label in range(3):
        hits = sum(pair == (label, label) for pair in pairs)
        if not hits:
            assert np.isnan(scores[label]) if label not in truth + predicted else scores[label] == 0
            continue
        precision, recall = hits / predicted.count(label), hits / truth.count(label)
        assert scores[label] == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("positive", [1, None])
def test_drawing_cells_gives_the_interval_of_drawing_rows(positive):
    draw = np.random.default_rng(1)
    truth = (draw.random(400) < 0.15).astype(int)
    predicted = np.where(draw.random(400) < 0.1, 1 - truth, truth)
    interval = f1_interval(confusion_matrix(truth.tolist(), predicted.tolist(), 2), positive)
    scores = []
    for _ in range(2000):
        rows = draw.integers(0, 400, 400)
        one = f1_scores(confusion_matrix(truth[rows].tolist(), predicted[rows].tolist(), 2))
        scores.append(one.mean() if positive is None else one[positive])
    assert [interval.low, interval.high] == pytest.approx(np.quantile(scores, (0.025, 0.975)), abs=0.015)
    assert interval.n == 400


@pytest.mark.parametrize(("truth", "predicted"), [([], []), ([0], [0, 1]), ([0], [2]), ([-1], [0])])
def test_what_cannot_be_counted_is_refused(truth, predicted):
    with pytest.raises(ValueError, match=r"expected as many|is not within"):
        confusion_matrix(truth, predicted, 2)
