"""Decides how good a completion of a task question is: the gold reward, and what constant answers would get.

Rule of exactness: the completion and the answer are the same text once runs of white space are one space, the ends
are stripped and one full stop at the very end is removed from either. Nothing else is forgiven: not case, not quotes,
not a word before or after.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

# The most that a completion can get that is not exact: an almost right answer never comes near a right one.
LARGEST_PARTIAL_REWARD = 0.5


def normalise(text: str) -> str:
    """White space runs become one space, the ends are stripped, one full stop at the end is removed."""
    return " ".join(text.split()).removesuffix(".")


def is_exact(row: Mapping[str, Any], completion: str) -> bool:
    """Whether `completion` is the answer of the task row (`answer` field), see this module's rule of exactness."""
    return normalise(completion) == normalise(row["answer"])


def gold_reward(row: Mapping[str, Any], completion: str) -> float:
    """Reward in [0, 1]: 1 if and only if exact, else half the square of the ROUGE-L F1 over words.

    Words in order count (longest common subsequence; Lin 2004, ROUGE), so a completion earns nothing by being a bag of
    likely words; the square leaves next to nothing to texts that share only an article with the answer.
    """
    if is_exact(row, completion):
        return 1.0
    found, expected = re.findall(r"\w+", completion), re.findall(r"\w+", row["answer"])
    if not found or not expected:
        return 0.0
    f1 = 2 * _longest_common_subsequence(found, expected) / (len(found) + len(expected))
    return LARGEST_PARTIAL_REWARD * f1 * f1


def _longest_common_subsequence(left: list[str], right: list[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]


def chance_level(rows: Iterable[Mapping[str, Any]]) -> float:
    """Exact match of somebody who knows only each family's commonest answer, and always gives that.

    Measured on `rows` themselves, so it is the highest that any constant answer a family can reach on them.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row["family"]][normalise(row["answer"])] += 1
    total = sum(counts.total() for counts in answers.values())
    if not total:
        raise ValueError("no task rows: the chance level of an empty set does not exist")
    return sum(max(counts.values()) for counts in answers.values()) / total


def report_prompts(rows: Iterable[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` rows to show in a report: the smallest id of each family, then the next of each, families in order."""
    by_family: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["id"]):
        by_family[row["family"]].append(row)
    rounds = max(map(len, by_family.values()), default=0)
    ordered = [
        by_family[family][turn]
        for turn in range(rounds)
        for family in sorted(by_family)
        if turn < len(by_family[family])
    ]
    return ordered[:count]
