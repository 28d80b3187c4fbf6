"""From what each model answered to what can be said about it: means, intervals, and comparisons with a reference.

Pure functions of the records that `evaluate` collects. A record of one model holds

    greedy    one answer a question:      {"text", "ended", "tokens", "exact", "gold"}
    sampled   k answers a question:       the same, and "kl" and "reward" where they were measured
    few_shot  one answer a question:      {"text", "exact"}, or None
    pair_log_ratios  for each held-out pair, log p(chosen) - log p(rejected)

Questions are the unit of resampling: answers to one question are not independent of each other.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_scratch_gpt.data.tasks import chance_level
from hf_scratch_gpt.evaluation.intervals import Interval, bootstrap_mean, paired_difference, wilson

Record = dict[str, Any]


def by_family(rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Indices of the rows of each family, families in alphabetical order."""
    families: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        families[row["family"]].append(index)
    return dict(sorted(families.items()))


def share(flags: Sequence[bool]) -> dict[str, Any]:
    """Share of true flags with Wilson's interval."""
    return wilson(sum(map(bool, flags)), len(flags)).as_dict()


def per_question(sampled: Sequence[Sequence[dict[str, Any]]], field: str) -> list[float]:
    """Mean of `field` over the answers to each question."""
    return [float(np.mean([answer[field] for answer in answers])) for answers in sampled]


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[Interval, float]:
    """How often our answer's reward is above theirs, ties counted half, and the share of ties.

    Args:
        ours: For each question the rewards of our answers; each is compared with each of theirs.
        theirs: The same questions, the other model's rewards.
    """
    wins, ties = [], []
    for left, right in zip(ours, theirs, strict=True):
        difference = np.subtract.outer(np.asarray(left, float), np.asarray(right, float))
        ties.append(float((difference == 0).mean()))
        wins.append(float((difference > 0).mean()) + ties[-1] / 2)
    return bootstrap_mean(wins), float(np.mean(ties))


def describe(record: Record, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is measured of one model alone."""
    greedy, sampled = record["greedy"], record["sampled"]
    exact = [answer["exact"] for answer in greedy]
    told = {
        "parameters": record["parameters"],
        "bits_per_byte": record["text"],
        "exact_match": share(exact),
        "exact_match_by_family": {
            family: share([exact[index] for index in indices]) for family, indices in by_family(rows).items()
        },
        "gold_reward": bootstrap_mean([answer["gold"] for answer in greedy]).as_dict(),
        "share_ended": share([answer["ended"] for answer in greedy]),
        "answer_tokens": float(np.mean([answer["tokens"] for answer in greedy])),
    }
    if record.get("few_shot"):
        told["few_shot_exact_match"] = share([answer["exact"] for answer in record["few_shot"]])
        told["few_shot_examples"] = float(np.mean([answer["examples"] for answer in record["few_shot"]]))
    if sampled:
        told["sampled_exact_match"] = bootstrap_mean(per_question(sampled, "exact")).as_dict()
        told["sampled_gold_reward"] = bootstrap_mean(per_question(sampled, "gold")).as_dict()
        # Answers to one question are alike, so the interval resamples questions.
        told["sampled_share_ended"] = bootstrap_mean(per_question(sampled, "ended")).as_dict()
        for field in ("kl", "reward"):
            if all(field in answer for answers in sampled for answer in answers):
                told[field] = bootstrap_mean(per_question(sampled, field)).as_dict()
    return told


def compare(record: Record, reference: Record) -> dict[str, Any]:
    """One model against the reference on the same questions; differences are paired by question."""

    def golds(answers: Sequence[Any]) -> list[float]:
        return [answer["gold"] for answer in answers]

    wins, ties = win_rate(
        [[gold] for gold in golds(record["greedy"])], [[gold] for gold in golds(reference["greedy"])]
    )
    difference = paired_difference(golds(record["greedy"]), golds(reference["greedy"]))
    told: dict[str, Any] = {
        "win_rate": wins.as_dict(),
        "ties": ties,
        "gold_difference": difference.as_dict(),
        "significant": difference.excludes_zero,
        "exact_difference": paired_difference(
            [answer["exact"] for answer in record["greedy"]], [answer["exact"] for answer in reference["greedy"]]
        ).as_dict(),
    }
    if record["sampled"] and reference["sampled"]:
        wins, ties = win_rate(
            [golds(answers) for answers in record["sampled"]], [golds(answers) for answers in reference["sampled"]]
        )
        difference = paired_difference(
            per_question(record["sampled"], "gold"), per_question(reference["sampled"], "gold")
        )
        told["sampled_win_rate"], told["sampled_ties"] = wins.as_dict(), ties
        told["sampled_gold_difference"] = difference.as_dict()
        told["sampled_significant"] = difference.excludes_zero
    if record.get("pair_log_ratios") and reference.get("pair_log_ratios"):
        # The implicit reward of DPO (Rafailov et al., 2023): beta log(policy / reference); beta does not change signs.
        told["preference_accuracy"] = share(
            [
                ours > theirs
                for ours, theirs in zip(record["pair_log_ratios"], reference["pair_log_ratios"], strict=True)
            ]
        )
    return told


def summarise(records: dict[str, Record], rows: Sequence[dict[str, Any]], reference: str | None) -> dict[str, Any]:
    """`metrics` of the evaluate stage but for the reward model's: each model alone, and against the reference."""
    models = {name: describe(record, rows) for name, record in records.items()}
    if reference is not None:
        for name, record in records.items():
            if name != reference:
                models[name]["versus_reference"] = compare(record, records[reference])
    return {
        "reference": reference,
        "questions": len(rows),
        "chance_level": chance_level(rows),
        "families": {
            family: {"questions": len(indices), "chance_level": chance_level([rows[index] for index in indices])}
            for family, indices in by_family(rows).items()
        },
        "models": models,
    }
