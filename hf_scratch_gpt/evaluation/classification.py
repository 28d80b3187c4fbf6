"""How well predicted labels agree with the true ones: accuracy, F1 and confusion matrix, with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_scratch_gpt.evaluation.intervals import Interval, wilson

_RESAMPLES = 2000


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """Counts (classes, classes): rows by true label, columns by predicted label.

    Raises:
        ValueError: if the lists are of different lengths, empty, or hold a number outside 0..classes-1.
    """
    if len(truth) != len(predicted) or not len(truth):
        raise ValueError(f"expected as many predictions as labels, found {len(predicted)} and {len(truth)}")
    matrix = np.zeros((classes, classes), dtype=np.int64)
    for row, column in zip(truth, predicted, strict=True):
        if not (0 <= row < classes and 0 <= column < classes):
            raise ValueError(f"label {row} or prediction {column} is not within 0..{classes - 1}")
        matrix[row, column] += 1
    return matrix


def f1_scores(matrices: np.ndarray) -> np.ndarray:
    """F1 of each class, (..., classes), of confusion matrices (..., classes, classes).

    2 TP / (2 TP + FP + FN), van Rijsbergen's F (1979); NaN for a class that is neither there nor predicted.
    """
    hits = np.diagonal(matrices, axis1=-2, axis2=-1).astype(np.float64)
    sizes = matrices.sum(-1) + matrices.sum(-2)
    return np.divide(2 * hits, sizes, out=np.full(hits.shape, np.nan), where=sizes > 0)


def f1_interval(matrix: np.ndarray, positive: int | None, seed: int = 0) -> Interval:
    """F1 of the class `positive`, or the mean over classes (macro) for `None`, with a percentile bootstrap interval.

    Drawing rows again with replacement changes nothing but the cells' counts, which are then multinomial: so it is the
    cells that are drawn. A resample in which F1 is not defined is left out.
    """
    total = int(matrix.sum())
    draws = np.random.default_rng(seed).multinomial(total, matrix.ravel() / total, size=_RESAMPLES)
    scores = _one_score(f1_scores(draws.reshape(_RESAMPLES, *matrix.shape)), positive)
    low, high = np.quantile(scores[~np.isnan(scores)], (0.025, 0.975))
    return Interval(float(_one_score(f1_scores(matrix), positive)), float(low), float(high), total)


def _one_score(scores: np.ndarray, positive: int | None) -> np.ndarray:
    if positive is not None:
        return scores[..., positive]
    defined = ~np.isnan(scores)
    return np.where(defined, scores, 0.0).sum(-1) / defined.sum(-1)


def classification_metrics(
    truth: Sequence[int], predicted: Sequence[int], names: Sequence[str], positive: str | None, majority: str
) -> dict[str, Any]:
    """What `metrics.json` says of held-out predictions.

    Args:
        truth, predicted (`Sequence[int]`): Indices into `names`.
        names (`Sequence[str]`): The labels.
        positive (`str`, *optional*): The label whose F1 is told; `None` for the mean over all labels.
        majority (`str`): The most frequent label of the training rows: what a classifier that learnt nothing says.

    Returns:
        `dict`: `heldout_examples`, `heldout_accuracy` (Wilson's interval), `heldout_f1` (bootstrap; absent where no
        row is of the class or predicted to be), `f1_of`, `majority_accuracy`, and `confusion_matrix` with `labels`.
    """
    matrix = confusion_matrix(truth, predicted, len(names))
    accuracy = wilson(int(np.trace(matrix)), int(matrix.sum()))
    told: dict[str, Any] = {
        "heldout_examples": accuracy.n,
        "heldout_accuracy": accuracy.mean,
        "heldout_accuracy_interval": [accuracy.low, accuracy.high],
        "majority_label": majority,
        "majority_accuracy": float(matrix[names.index(majority)].sum() / matrix.sum()),
        "f1_of": positive if positive is not None else "macro",
        "confusion_matrix": {"labels": list(names), "true_by_predicted": matrix.tolist()},
    }
    index = None if positive is None else names.index(positive)
    if index is None or not np.isnan(f1_scores(matrix)[index]):
        f1 = f1_interval(matrix, index)
        told |= {"heldout_f1": f1.mean, "heldout_f1_interval": [f1.low, f1.high]}
    return told
