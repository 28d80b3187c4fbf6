"""The mathematics of taking the best of n answers.

How far the best of n moves from the policy has a bound that needs no measuring: its KL is at most log n - (n - 1) / n
nats (Stiennon et al. 2020, https://huggingface.co/papers/2009.01325; proved to be a bound by Beirami et al. 2024,
https://huggingface.co/papers/2401.01879).
"""

import math
from collections.abc import Sequence


def kl_bound(count: int) -> float:
    """The most that the best of `count` answers can diverge from the policy, in nats."""
    return math.log(count) - (count - 1) / count


def powers_of_two(count: int) -> list[int]:
    """1, 2, 4, ... below `count`, and `count`."""
    return [2**power for power in range(count.bit_length()) if 2**power < count] + [count]


def best_of(values: Sequence[float], scores: Sequence[float], count: int) -> float:
    """What the best scored of `count` answers has of `values`, in expectation over all choices of `count` of them.

    All n answers take part, so the estimate has far less variance than one draw: with the answers in rising order of
    score, the one at place i (from 1) is the best of C(i - 1, count - 1) of the C(n, count) choices (Nakano et al.
    2021, https://huggingface.co/papers/2112.09332, appendix I).

    Raises:
        ValueError: if there are fewer answers than `count`, or not as many values as scores.
    """
    total = len(scores)
    if len(values) != total or not 1 <= count <= total:
        raise ValueError(f"the best of {count} from {total} scores and {len(values)} values does not exist")
    order = sorted(range(total), key=lambda place: scores[place])
    choices = math.comb(total, count)
    return sum(
        values[index] * math.comb(place, count - 1) / choices
        for place, index in enumerate(order)
        if place >= count - 1
    )
