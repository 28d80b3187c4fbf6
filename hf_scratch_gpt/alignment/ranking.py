"""From answers and verdicts to rankings and preferences.

A ranking has one prompt, its answers and their scores, higher is better, equal is a tie. Preferences are its pairs: of
K answers up to K (K - 1) / 2.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from hf_scratch_gpt.alignment.judges import Comparison, Judge, ask_both_ways
from hf_scratch_gpt.alignment.scoring import Row, are_task_questions
from hf_scratch_gpt.data.tasks import gold_reward
from hf_scratch_gpt.evaluation.generation import Answer
from hf_scratch_gpt.evaluation.intervals import wilson

Pair = tuple[int, int]


@dataclasses.dataclass
class Ranking:
    """A row's answers with their scores.

    Attributes:
        row (`dict`): The data set's row, with its prompt.
        answers (`list[str]`): Different answers.
        scores (`list[float]`): One each; higher is better.
        pairs (`list[tuple[int, int, float]]`): Better, worse, and by how much: for a judge the margin from 0 to 1
            between the chances of both, else the difference of the scores.
    """

    row: Row
    answers: list[str]
    scores: list[float]
    pairs: list[tuple[int, int, float]]

    def preferences(self) -> list[Row]:
        """The pairs as rows of `prompt`, `chosen`, `rejected` and `margin`, that `dpo` and `reward` take."""

        def message(index: int) -> list[dict[str, str]]:
            return [{"role": "assistant", "content": self.answers[index]}]

        return [
            {"prompt": self.row["prompt"], "chosen": message(better), "rejected": message(worse), "margin": margin}
            for better, worse, margin in self.pairs
        ]

    def record(self) -> Row:
        """A line of `rankings.jsonl`, the best answer first; equal scores share a rank, and 1 is the best."""
        order = sorted(range(len(self.answers)), key=lambda index: -self.scores[index])
        return {
            "prompt": self.row["prompt"],
            "completions": [[{"role": "assistant", "content": self.answers[index]}] for index in order],
            "ranks": [1 + sum(other > self.scores[index] for other in self.scores) for index in order],
            "scores": [self.scores[index] for index in order],
        }


def comparable(answers: Sequence[Answer]) -> list[str]:
    """The different texts among the answers that ended: what has no end cannot be trained on."""
    return list(dict.fromkeys(answer.text for answer in answers if answer.ended and answer.text.strip()))


def pairs_by_score(scores: Sequence[float], least_margin: float = 0.0) -> list[tuple[int, int, float]]:
    """All pairs whose scores differ by more than `least_margin`, as (better, worse, difference)."""
    return [
        (left, right, scores[left] - scores[right])
        for left, right in itertools.permutations(range(len(scores)), 2)
        if scores[left] - scores[right] > least_margin
    ]


def ask_judge(judge: Judge, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[list[Any]]:
    """For each row what the judge says of each pair of its answers: `[first, second, straight, turned]`."""
    asked = [
        (index, pair) for index, texts in enumerate(answers) for pair in itertools.combinations(range(len(texts)), 2)
    ]
    comparisons = [
        Comparison(rows[index]["prompt"], answers[index][first], answers[index][second])
        for index, (first, second) in asked
    ]
    told: list[list[Any]] = [[] for _ in rows]
    for (index, pair), verdicts in zip(asked, ask_both_ways(judge, comparisons), strict=True):
        told[index].append([*pair, *verdicts])
    return told


def rank_by_verdicts(row: Row, answers: list[str], verdicts: Sequence[Sequence[Any]], least_margin: float) -> Ranking:
    """A ranking by how often an answer is preferred to the others; a pair within `least_margin` of even is none.

    A pair of which the judge said nothing readable in either order is left out of both.
    """
    wins: list[list[float]] = [[] for _ in answers]
    pairs = []
    for left, right, straight, turned in verdicts:
        if straight is None or turned is None:
            continue
        chance = (straight + turned) / 2
        wins[left].append(chance)
        wins[right].append(1 - chance)
        margin = abs(2 * chance - 1)
        if margin > least_margin:
            pairs.append((left, right, margin) if chance > 0.5 else (right, left, margin))
    scores = [sum(own) / len(own) if own else 0.5 for own in wins]
    return Ranking(row, answers, scores, pairs)


def judge_metrics(verdicts: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """How far a judge agrees with itself when the places are exchanged, and how it favours the first.

    `order_agreement` is the share of comparisons with the same winner in both orders; a verdict of exactly even agrees
    with nothing. `first_place_share` is 0.5 for a judge that the place does not sway.
    """
    whole = [(straight, turned) for _, _, straight, turned in verdicts if straight is not None and turned is not None]
    metrics: dict[str, Any] = {"comparisons": len(verdicts), "unreadable_comparisons": len(verdicts) - len(whole)}
    if whole:
        agreed = wilson(
            sum((one > 0.5 and other > 0.5) or (one < 0.5 and other < 0.5) for one, other in whole), len(whole)
        )
        metrics["order_agreement"] = agreed.mean
        metrics["order_agreement_interval"] = [agreed.low, agreed.high]
        metrics["first_place_share"] = sum(one + 1 - other for one, other in whole) / (2 * len(whole))
    return metrics


def gold_metrics(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """How often the preferred answer is the one that the checker gives more; pairs that it gives the same are out."""
    rows = [ranking.row for ranking in rankings]
    if not are_task_questions(rows):
        return {}
    right = total = 0
    for ranking in rankings:
        gold = [gold_reward(ranking.row, text) for text in ranking.answers]
        for better, worse, _ in ranking.pairs:
            total += gold[better] != gold[worse]
            right += gold[better] > gold[worse]
    if not total:
        return {"gold_pairs": 0}
    share = wilson(right, total)
    return {"gold_agreement": share.mean, "gold_agreement_interval": [share.low, share.high], "gold_pairs": total}
