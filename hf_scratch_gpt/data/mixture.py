"""Sources by their share of the training tokens, whatever their sizes: small good ones seen several times, the crawl
less than once, as in table 2.2 of Brown et al. 2020 (arXiv:2005.14165).

Which source the window number n of a run comes from, and which of that source's windows it is, are functions of n and
the weights alone: nothing is drawn, so that after any number of windows each source has its share to within a few
windows, and weights can be changed without new shards.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_scratch_gpt.runs.values import read_mapping

# The order matters: the command line is read as the second kind.
MixtureWeights = dict[str, Any] | str | list[str] | None

_ONE = 1 << 24  # shares are whole numbers of this part, so that 2^39 windows are counted exactly in 64 bits


def parse_mixture(weights: MixtureWeights, sources: Sequence[str]) -> dict[str, float] | None:
    """The share of each source, in the order of `sources`; they sum to 1. `None` if there are no weights.

    Args:
        weights (`MixtureWeights`): A mapping of source to weight, a JSON object, or `source=weight` texts.
        sources (`Sequence[str]`): The sources that there are.

    Raises:
        ValueError: for a source that is not one or has no weight, or a weight that is not a positive number.
    """
    mapping = read_mapping(weights, "mixture", "source=weight", str.rpartition)
    if not mapping:
        return None
    for name, weight in mapping.items():
        if name not in sources:
            raise ValueError(f"mixture: '{name}' is none of the sources {', '.join(sources)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"mixture: the weight of '{name}' is {weight!r}, expected a number above 0")
    missing = [source for source in sources if source not in mapping]
    if missing:
        raise ValueError(
            f"mixture: '{missing[0]}' has no weight; give one to each source, or leave it out of 'sources'"
        )
    total = sum(mapping.values())
    return {source: mapping[source] / total for source in sources}


def describe_shares(tokens: Mapping[str, int], shares: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """What each source gives to one pass: to a run over as many tokens as all sources have together.

    Args:
        tokens (`Mapping[str, int]`): Training tokens of each source.
        shares (`Mapping[str, float]`, *optional*): As `parse_mixture` gives them; without, each token is seen once.

    Returns:
        `list[dict]`: `source`; its `tokens`, and `token_share` of all tokens; `weight`, its share of a pass, `None`
        where none was asked for; and `epochs_of_a_pass`, how often a pass sees all of it, `None` if it is empty.
    """
    total = sum(tokens.values())
    return [
        {
            "source": source,
            "tokens": count,
            "token_share": count / total,
            "weight": None if shares is None else shares[source],
            "epochs_of_a_pass": (1.0 if shares is None else shares[source] * total / count) if count else None,
        }
        for source, count in tokens.items()
    ]


@dataclasses.dataclass(frozen=True)
class Turns:
    """Which source's turn it is at each window: Bresenham's even spacing, one source after the other.

    Args:
        shares (`tuple[float, ...]`): Of each source, summing to 1.
    """

    shares: tuple[float, ...]

    def _numerators(self) -> list[int]:
        """For each source but the last, its share of what the ones before it leave, in parts of `_ONE`."""
        left, found = 1.0, []
        for share in self.shares[:-1]:
            found.append(min(_ONE, round(_ONE * share / left)) if left > 0 else 0)
            left -= share
        return found

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each window number (int64, any shape): its source, and its number among that source's windows."""
        sources = np.full(numbers.shape, len(self.shares) - 1, np.int64)
        indices = np.array(numbers, np.int64)
        open_ = np.ones(numbers.shape, bool)
        for source, numerator in enumerate(self._numerators()):
            before = indices * numerator // _ONE
            mine = open_ & ((indices + 1) * numerator // _ONE > before)
            sources[mine] = source
            indices = np.where(mine, before, np.where(open_, indices - before, indices))
            open_ &= ~mine
        return sources, indices

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` windows each source has."""
        found, left = [], total
        for numerator in self._numerators():
            found.append(left * numerator // _ONE)
            left -= found[-1]
        return [*found, left]
