"""Batches of token windows as a pure function of (seed, step, rank): nothing to save, exact to resume.

Each epoch cuts the split into windows of `context_length` tokens, at an offset of its own, and takes them in an order
of its own. The windows run across documents. `position_ids` restart at each separator, and the model keeps apart
what restarts (`attention_mask` stays `None`): so a document begins with a separator at position 0, its first token is
predicted from nothing else, and the separator after it is its end. Labels are the input ids themselves, with no
position masked; the model shifts them.
"""

import numpy as np
import torch

from hf_scratch_gpt.data.shards import TokenShards

__all__ = ["TokenShards", "batch_windows", "sample_numbers", "shuffled_index", "windows_per_epoch"]

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
    return max(1, (len(shards) - context_length + 1) // context_length)


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
    input_ids = np.empty((batch_size, context_length), np.int64)
    for row, start in enumerate(starts):
        input_ids[row] = shards.read(int(start), context_length)
    if respect_documents:
        position_ids = document_positions(input_ids, shards.separator_id)
    else:
        position_ids = np.broadcast_to(np.arange(context_length), input_ids.shape).copy()
    return {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(position_ids)}
