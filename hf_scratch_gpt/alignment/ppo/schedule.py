"""Which episodes a step has, as pure functions of the seed and the step: the ground of exact resume."""

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor


def prompt_order(count: int, start: int, size: int, seed: int) -> list[int]:
    """Places `start` to `start + size` of an endless sequence of shuffled passes over `count` prompts.

    A resumed run sees the same prompts without replaying the earlier ones.
    """
    order: list[int] = []
    while len(order) < size:
        epoch, offset = divmod(start + len(order), count)
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        order += shuffled[offset : offset + size - len(order)]
    return order


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of `numbers` and on nothing else."""
    return int.from_bytes(sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


class Schedule:
    """The order of episodes, for all processes together: how many there are changes nothing but who takes which.

    Args:
        args ([`PPOConfig`]): Sizes, seed and the process's number.
        prompts (`int`): How many prompts there are.
    """

    def __init__(self, args: Any, prompts: int):
        self.args, self.prompts = args, prompts
        self.episodes = args.rollout_batch_size

    @property
    def micro_steps_per_epoch(self) -> int:
        """Micro-batches of an epoch on one process: each prompt in one rollout, as far as whole rollouts go."""
        rollouts = max(1, self.prompts * self.args.responses_per_prompt // self.episodes)
        return rollouts * self.args.steps_per_rollout * self.args.gradient_accumulation_steps

    def rollout_prompts(self, rollout_index: int) -> list[int]:
        """The prompt of each episode of a rollout; each prompt `responses_per_prompt` times in a row."""
        repeats = self.args.responses_per_prompt
        size = self.episodes // repeats
        distinct = prompt_order(self.prompts, rollout_index * size, size, self.args.seed)
        return [place for place in distinct for _ in range(repeats)]

    def shares(self) -> Tensor:
        """The rows of a rollout that each process samples (processes, episodes of one).

        They are those that it trains on in the first pass, in the same order: see `minibatch_rows`.
        """
        world = self.args.world_size
        own = self.args.minibatch_size // world
        return torch.arange(self.episodes).view(-1, world, own).transpose(0, 1).reshape(world, -1)

    def sampling_seed(self, rollout_index: int) -> int:
        """The seed of the draws of a rollout."""
        return seed_of(self.args.seed, rollout_index, 0, 0)

    def minibatch_rows(self, rollout_index: int, step: int) -> Tensor:
        """Rows of the minibatch of a rollout's `step`, those of process 0 first.

        The first pass keeps the order in which the old log-probabilities were computed, so that its forward passes
        are the same to the bit and its first ratio is exactly 1; the other passes are shuffled.
        """
        size = self.args.minibatch_size
        epoch, minibatch = divmod(step, self.episodes // size)
        order = torch.arange(self.episodes)
        if epoch > 0:
            seed = seed_of(self.args.seed, rollout_index, 0, epoch)
            order = torch.randperm(self.episodes, generator=torch.Generator().manual_seed(seed))
        return order[minibatch * size : (minibatch + 1) * size]

    def micro_batch_rows(self, minibatch: Tensor, accumulated: int) -> Tensor:
        """Rows of the `accumulated`th micro-batch of a minibatch (processes, rows of one)."""
        world, size = self.args.world_size, self.args.per_device_train_batch_size
        return minibatch.view(world, -1)[:, accumulated * size : (accumulated + 1) * size]
