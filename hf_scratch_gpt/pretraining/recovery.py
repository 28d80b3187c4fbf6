"""The way back from a spike that lasts: the newest whole checkpoint from before it, and other data than before."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_scratch_gpt.pretraining.checkpointing import TrainingState, load_checkpoint
from hf_scratch_gpt.pretraining.interim import truncate_samples
from hf_scratch_gpt.pretraining.optimizers import Optimizers
from hf_scratch_gpt.pretraining.spike_guard import NO_WAY_BACK, RECENT, Detour, SpikeGuard
from hf_scratch_gpt.runs import StageRun
from hf_scratch_gpt.runs.checkpoints import find_damage, step_of

logger = logging.getLogger(__name__)

# What was spent and what happened stays so when the weights go back.
_KEPT = (
    "elapsed",
    "schedule_start",
    "train_seconds",
    "data_seconds",
    "compile_seconds",
    "checkpoint_wait_seconds",
    "compiled",
    "untrained",
    "evaluation_seconds",
    "skipped",
    "skipped_data",
    "rollbacks",
)


class Recovery:
    """Watches the guard after each step and takes the run back when it has to; all processes call it in step.

    The checkpoint stays as it was written: a run that is killed right after going back repeats the spike and goes back
    again, to the same end.

    Args:
        accelerator (`Accelerator`): Of this process.
        run (`StageRun`): Holds the checkpoints and takes the journal: a line of the curve.
        model: The bare model.
        optimizers (`Optimizers`): Over its parameters.
        state (`TrainingState`): Changed in place.
        guard (`SpikeGuard`): Over the same state.
        limit (`int`): How often the run may go back; 0 for never.
        settle (*optional*): Waits until a checkpoint that is being written is on disk, where that goes on beside the
            training.
    """

    def __init__(
        self,
        accelerator: Any,
        run: StageRun,
        model: torch.nn.Module,
        optimizers: Optimizers,
        state: TrainingState,
        guard: SpikeGuard,
        limit: int,
        settle: Callable[[], Any] = lambda: None,
    ):
        self.accelerator, self.run, self.model, self.optimizers = accelerator, run, model, optimizers
        self.state, self.guard, self.limit, self.settle = state, guard, limit, settle

    def watch(self, reason: str) -> bool:
        """Go back if a spike has turned out to last, `reason` being what the guard said last; whether it did.

        Raises:
            ValueError: if the loss stays non-finite with no checkpoint to go back to, or a spike lasts after the last
                return that is allowed.
        """
        onset = self.guard.onset()
        if onset is None:
            return False
        if self.limit and len(self.state.rollbacks) >= self.limit:
            raise ValueError(self._stop_message(reason, f"went back {self.limit} times already ('spike_rollbacks')"))
        checkpoint = self._find_checkpoint(onset) if self.limit else None
        if checkpoint is None:
            self._go_on(reason)
            return False
        self._go_back(checkpoint, self.guard.detour(onset), reason)
        return True

    def _find_checkpoint(self, onset: int) -> Path | None:
        """The newest whole checkpoint whose weights are from before the update of step `onset`."""
        from accelerate.utils import broadcast_object_list

        self.settle()
        found: Path | None = None
        if self.accelerator.is_main_process:
            for candidate in sorted(self.run.checkpoints.glob("checkpoint-*"), key=step_of, reverse=True):
                if 0 <= step_of(candidate) <= onset:
                    damage = find_damage(candidate)
                    if damage is None:
                        found = candidate
                        break
                    logger.warning("not going back to a damaged checkpoint: %s", damage)
        (found,) = broadcast_object_list([found])
        return found

    def _go_on(self, reason: str) -> None:
        state = self.state
        if not self.guard.last_was_finite:
            raise ValueError(self._stop_message(reason, "there is no checkpoint to go back to"))
        if state.skipped_in_a_row and state.skipped_in_a_row < NO_WAY_BACK:
            return
        text = f"{reason}; there is no checkpoint from before it, so this is taken as usual from now on"
        self.run.log(step=state.step, accepted_spike=text)
        logger.warning("%s, step %d: %s", self.run.folder, state.step, text)
        self.guard.accept()

    def _stop_message(self, reason: str, why: str) -> str:
        count, step = self.state.skipped_in_a_row, self.state.step
        updates = f"{count} updates in a row were skipped up to" if count else "the loss rose before"
        return (
            f"{self.run.folder}: {updates} step {step} ({reason or 'none of the losses was far out'}) and {why}; "
            "lower 'learning_rate' and 'muon_learning_rate', or set 'precision' to fp32"
        )

    def _go_back(self, checkpoint: Path, detour: Detour, reason: str) -> None:
        state, spiked_at = self.state, self.state.step
        kept = {name: getattr(state, name) for name in _KEPT}
        restored = load_checkpoint(checkpoint, self.model, self.optimizers)
        for field in dataclasses.fields(state):  # in place: others hold this state too
            setattr(state, field.name, kept.get(field.name, getattr(restored, field.name)))
        record = {
            "spiked_at": spiked_at,
            "back_to": state.step,
            "at": detour.at,
            "first_batch": detour.first,
            "last_batch": detour.last,
            "reason": reason or f"the last {RECENT} losses stand above those before them",
        }
        state.skipped_data = [*state.skipped_data, [detour.at, detour.count]]
        state.rollbacks = [*state.rollbacks, record]
        self._write_down(record)
        self.accelerator.wait_for_everyone()

    def _write_down(self, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        # A checkpoint from within the spike must not be the one that a killed run begins from.
        for newer in self.run.checkpoints.glob("checkpoint-*"):
            if step_of(newer) > record["back_to"]:
                shutil.rmtree(newer)
        back_to = record["back_to"]
        self.run.truncate_curve(back_to)
        truncate_samples(self.run.folder, back_to)
        # As of the next step: a run that begins again from this checkpoint drops the line, and comes to write it anew.
        for known in self.state.rollbacks:
            if known["back_to"] >= back_to:
                self.run.log(step=back_to + 1, **{f"rollback_{name}": value for name, value in known.items()})
        logger.warning(
            "%s: a spike lasted at step %d (%s); back to step %d, passing over batches %d to %d",
            *(self.run.folder, record["spiked_at"], record["reason"], record["back_to"]),
            *(record["first_batch"], record["last_batch"]),
        )
