"""What our trainers on top of TRL's share: batches of like length, in an order that resuming reproduces; the end."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from hf_scratch_gpt.finetuning.models import save_tuned
from hf_scratch_gpt.runs import StageRun
from hf_scratch_gpt.runs.training import train


def run_stage(arguments: Any, stage: str, work: Callable[[Any, StageRun], None]) -> Path:
    """Do `work` in the folder that the settings name, unless it is done already; returns the folder."""
    arguments.check_inputs()
    with StageRun(arguments, stage) as stage_run:
        if not stage_run.finished:
            work(arguments, stage_run)
        return stage_run.folder


class LengthSampler(Sampler[int]):
    """Shuffled examples in batches of like length, as a pure function of (seed, epoch).

    transformers' `LengthGroupedSampler` draws from the global generator, so a run that resumes in its second epoch
    sees other batches than one that was not interrupted. As there, the first batch holds the longest example, so that
    running out of memory shows at once.

    Args:
        lengths (`list[int]`): Length of each example.
        batch_size (`int`): Examples an optimizer step, over all processes.
        seed (`int`): Seed.
    """

    _BATCHES_A_POOL = 50  # examples are sorted within pools of this many batches

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; called by the training loop."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * self._BATCHES_A_POOL
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            members = sorted(order[start : start + pool], key=lambda index: -self.lengths[index])
            batches += [members[at : at + self.batch_size] for at in range(0, len(members), self.batch_size)]
        # A short batch must stay last, or all batches after it would straddle two lengths.
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [index for batch in batches if len(batch) < self.batch_size for index in batch]
        shuffled = [whole[at] for at in torch.randperm(len(whole), generator=generator).tolist()]
        longest = max(range(len(shuffled)), key=lambda at: self.lengths[shuffled[at][0]], default=0)
        if shuffled:
            shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        yield from (index for batch in shuffled for index in batch)
        yield from rest


class LengthGrouping:
    """Mixin for a `Trainer` whose data set's examples were encoded by `tokenise` (they have a known length)."""

    args: Any
    example_lengths: list[int]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(self.example_lengths, batch_size, self.args.seed)


def train_in_blocks(model: Any, settings: Any) -> None:
    """On a CPU, train with attention in blocks where the model would use torch's own kernel, which is slower."""
    if settings.use_cpu and getattr(model.config, "_attn_implementation", None) == "sdpa":
        from hf_scratch_gpt.model.blocked_attention import IMPLEMENTATION

        model.set_attn_implementation(IMPLEMENTATION)


def train_and_save(
    trainer: Any, stage_run: StageRun, tokenizer: Any, sample: list[list[int]]
) -> tuple[Any, dict[str, Any]]:
    """Train from where an earlier try stopped, write the merged model, and say what was done.

    Returns:
        The plain model (with an adapter that cannot be merged), and its first metrics. Processes other than the main
        one get the unmerged model.

    Raises:
        Interrupted: if a signal stopped it.
        ValueError: if merging changes the logits of `sample`.
    """
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    train(trainer, stage_run)
    # Accelerate's wrapper of `forward` would put everything that follows into autocast.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if stage_run.is_main:
        model = save_tuned(model, tokenizer, stage_run.folder, sample)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, {
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "last_train_loss": losses[-1] if losses else None,
        "trainable_parameters": trainable,
        "parameters": model.num_parameters(),
    }
