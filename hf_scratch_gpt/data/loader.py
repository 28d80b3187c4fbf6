"""Batches of token windows as a pure function of (seed, step, rank): nothing to save, exact to resume.

Each epoch cuts the split into windows of `context_length` tokens, at an offset of its own, and takes them in an order
of its own. The windows run across documents. `position_ids` restart at each separator, and the model keeps apart
what restarts (`attention_mask` stays `None`): so a document begins with a separator at position 0, its first token is
predicted from nothing else, and the separator after it is its end. Labels are the input ids themselves, with no
position masked; the model shifts them.

With a mixture (`MixtureWindows`) each source has windows, orders and epochs of its own. Documents that are packed
whole instead are in `packed_windows`.
"""

from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.data.mixture import MixtureWeights, Turns, parse_mixture
from hf_scratch_gpt.data.shards import TokenShards

__all__ = [
    "MixtureWindows",
    "TokenShards",
    "batch_windows",
    "data_usage",
    "make_mixture",
    "mixture_shares",
    "sample_numbers",
    "shuffled_index",
    "source_parts",
    "source_seed",
    "windows_per_epoch",
]

_ROUNDS = 6


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014), elementwise on uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _keys(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch]).generate_state(count, np.uint64)


def shuffled_index(index: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where the random permutation of `range(count)` that belongs to (seed, epoch) sends each `index`.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002): no table,
    so any element of a permutation of billions costs microseconds.

    Args:
        index (`np.ndarray`): Integers in `[0, count)`, any shape.

    Returns:
        `np.ndarray`: int64 in `[0, count)`, of the same shape.
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    mask = np.uint64(2 ** int(half) - 1)
    keys = _keys(seed, epoch, _ROUNDS)
    value = np.array(index, dtype=np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        value[outside] = (left << half) | right
        outside = value >= count
    return value.astype(np.int64)


def _count_windows(tokens: int, context_length: int) -> int:
    return max(1, (tokens - context_length + 1) // context_length)


def windows_per_epoch(shards: TokenShards, context_length: int) -> int:
    """How many windows an epoch has: what fits at every offset, or one if the text is shorter than two windows.

    Raises:
        ValueError: if the split is shorter than one window.
    """
    if not 1 <= context_length <= len(shards):
        raise ValueError(
            f"{shards.folder}: the {shards.split} part has {len(shards)} tokens, too few for windows of "
            f"{context_length}; use a smaller context_length or more text"
        )
    return _count_windows(len(shards), context_length)


def _window_starts(total: int, count: int, context_length: int, seed: int, samples: np.ndarray) -> np.ndarray:
    """Start of the window of each sample number among `total` tokens; an epoch's offset is below `context_length`."""
    offsets = np.uint64(min(context_length, total - count * context_length + 1))
    starts = np.empty(len(samples), np.int64)
    epochs = samples // count
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        offset = int(_keys(seed, int(epoch), _ROUNDS + 1)[-1] % offsets)
        order = shuffled_index(samples[chosen] % count, count, seed, int(epoch))
        starts[chosen] = order * context_length + offset
    return starts


def document_positions(input_ids: np.ndarray, separator_id: int) -> np.ndarray:
    """Positions that restart at 0 on each separator; shape (B, T), int64."""
    columns = np.arange(input_ids.shape[1])
    return columns - np.maximum.accumulate(np.where(input_ids == separator_id, columns, 0), axis=1)


def sample_numbers(batch_size: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Numbers of a batch's windows since the start of training, int64 of shape (batch_size,)."""
    return (step * world_size + rank) * batch_size + np.arange(batch_size, dtype=np.int64)


def source_seed(seed: int, source: int) -> int:
    """A seed for each source of a mixture: the same text in another place of it has another order."""
    return int(np.random.SeedSequence([seed, source]).generate_state(1, np.uint64)[0])


def batch_windows(
    shards: TokenShards,
    context_length: int,
    batch_size: int,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    respect_documents: bool = True,
) -> dict[str, torch.Tensor]:
    """The batch of a step on a rank: a pure function of its arguments.

    The ranks of a step share `batch_size * world_size` successive samples of the epoch, so one process with batch 32
    and two with batch 16 see the same windows.

    Args:
        shards (`TokenShards`): The split to read.
        context_length (`int`): Tokens of a window.
        batch_size (`int`): Windows of this rank.
        seed (`int`): Seed of the order.
        step (`int`): Number of the batch, from 0; epochs follow each other without a gap.
        rank, world_size (`int`, *optional*, defaults to `0` and `1`): This process among all.
        respect_documents (`bool`, *optional*, defaults to `True`): Restart positions at documents; else they count on.

    Returns:
        `dict`: `input_ids` and `position_ids`, int64 of shape (batch_size, context_length).

    Raises:
        ValueError: if the split is shorter than one window.
    """
    count = windows_per_epoch(shards, context_length)
    samples = sample_numbers(batch_size, step, rank, world_size)
    starts = _window_starts(len(shards), count, context_length, seed, samples)
    return _read_windows(shards, starts, context_length, respect_documents)


def _read_windows(
    shards: TokenShards, starts: np.ndarray, context_length: int, respect_documents: bool
) -> dict[str, torch.Tensor]:
    input_ids = np.empty((len(starts), context_length), np.int64)
    for row, start in enumerate(starts):
        input_ids[row] = shards.read(int(start), context_length)
    if respect_documents:
        position_ids = document_positions(input_ids, shards.separator_id)
    else:
        position_ids = np.broadcast_to(np.arange(context_length), input_ids.shape).copy()
    return {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(position_ids)}


def source_parts(shards: TokenShards, shares: dict[str, float]) -> list[dict[str, Any]]:
    """Where in the shards the tokens of each source of a mixture are: their entries of `TokenShards.sources`.

    Raises:
        ValueError: if the shards do not tell it.
    """
    if not shards.sources:
        raise ValueError(f"{shards.folder}: does not tell its sources' tokens; run the stage 'prepare' again")
    parts = [part for part in shards.sources if part["source"] in shares]
    assert len(parts) == len(shares), "shares name a source that the shards have not"
    return parts


class MixtureWindows:
    """Windows of several sources, each source with its share of them.

    Args:
        shards (`TokenShards`): The split to read; its manifest tells which tokens are of which source.
        context_length (`int`): Tokens of a window; none runs over the end of a source.
        shares (`dict[str, float]`): Of each source (see `parse_mixture`).

    Raises:
        ValueError: if the shards do not tell their sources, or a source is shorter than one window.
    """

    def __init__(self, shards: TokenShards, context_length: int, shares: dict[str, float]):
        self._shards, self.context_length = shards, context_length
        self._parts = source_parts(shards, shares)
        for part in self._parts:
            if part["tokens"] < context_length:
                raise ValueError(
                    f"{shards.folder}: the source {part['source']} has {part['tokens']} tokens in the {shards.split} "
                    f"part, too few for windows of {context_length}; use a smaller context_length or more of it"
                )
        self._counts = [_count_windows(part["tokens"], context_length) for part in self._parts]
        self._shares = [shares[part["source"]] for part in self._parts]
        self._turns = Turns(tuple(self._shares))

    def batch(
        self,
        batch_size: int,
        seed: int,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        respect_documents: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The batch of a step on a rank: a pure function of its arguments; see `batch_windows`."""
        samples = sample_numbers(batch_size, step, rank, world_size)
        return _read_windows(self._shards, self.starts(samples, seed), self.context_length, respect_documents)

    def starts(self, samples: np.ndarray, seed: int) -> np.ndarray:
        """The first token of the window of each sample number, int64 of the same shape (samples,)."""
        sources, numbers = self._turns.locate(samples)
        starts = np.empty(len(samples), np.int64)
        for source in np.unique(sources).tolist():
            chosen, part = sources == source, self._parts[source]
            own_seed = source_seed(seed, source)
            starts[chosen] = part["start"] + _window_starts(
                part["tokens"], self._counts[source], self.context_length, own_seed, numbers[chosen]
            )
        return starts

    def usage(self, samples: int) -> list[dict[str, Any]]:
        """For each source what the first `samples` windows took of it.

        Returns:
            `list[dict]`: `source`; `weight`, the share that was asked for; `share` of the tokens that it had;
            `tokens`; and `epochs`, how often that is all of its tokens.
        """
        counts = self._turns.counts(samples)
        return [
            {
                "source": part["source"],
                "weight": weight,
                "share": count / samples if samples else 0.0,
                "tokens": count * self.context_length,
                "epochs": count * self.context_length / part["tokens"],
            }
            for part, weight, count in zip(self._parts, self._shares, counts, strict=True)
        ]


def mixture_shares(shards: TokenShards, weights: MixtureWeights) -> dict[str, float] | None:
    """Each source's share by the given `weights`, else by those in the manifest; `None` if neither says any.

    Raises:
        ValueError: for weights that do not fit the sources.
    """
    return parse_mixture(weights or shards.manifest.get("mixture"), shards.manifest.get("sources", []))


def make_mixture(shards: TokenShards, context_length: int, weights: MixtureWeights) -> MixtureWindows | None:
    """The mixture of the given `weights`, else of those in the manifest; `None` if neither says any.

    Raises:
        ValueError: for weights that do not fit the sources, or a source shorter than one window.
    """
    shares = mixture_shares(shards, weights)
    return None if shares is None else MixtureWindows(shards, context_length, shares)


def data_usage(
    shards: TokenShards, mixture: MixtureWindows | None, samples: int, context_length: int
) -> dict[str, Any]:
    """How often a run of `samples` windows has seen its text: `epochs`, and with a mixture `mixture` by source."""
    epochs = samples * context_length / len(shards)
    return {"epochs": epochs} if mixture is None else {"epochs": epochs, "mixture": mixture.usage(samples)}
