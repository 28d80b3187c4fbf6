"""The pretraining loop: one optimizer step after the other, until the budget is spent or somebody asks to stop."""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.pretraining.arguments import PretrainArguments
from hf_scratch_gpt.pretraining.checkpointing import CheckpointWriter, TrainingState
from hf_scratch_gpt.pretraining.interim import Interim
from hf_scratch_gpt.pretraining.loss_scale import LossScale
from hf_scratch_gpt.pretraining.optimizers import Optimizers
from hf_scratch_gpt.pretraining.recovery import Recovery
from hf_scratch_gpt.pretraining.schedules import Budget, decay_factor, warmup_factor
from hf_scratch_gpt.pretraining.sharding import gather_state
from hf_scratch_gpt.pretraining.spike_guard import SpikeGuard, data_step
from hf_scratch_gpt.pretraining.telemetry import Counters, Telemetry
from hf_scratch_gpt.runs import Interrupted, StageRun, StopRequest
from hf_scratch_gpt.runs.errors import NotSaved
from hf_scratch_gpt.runs.folder import MainProcessFailed
from hf_scratch_gpt.runs.signals import STOP_REASONS
from hf_scratch_gpt.runs.training import progress_bar

logger = logging.getLogger(__name__)

_RECENT_LOSSES = 20
_STARTING_MOMENTUM = 0.85

BatchReader = Callable[[int], dict[str, Tensor]]


class PretrainingLoop:
    """Trains a prepared loss module; all processes run it in step.

    Args:
        arguments (`PretrainArguments`): The stage's settings.
        accelerator (`Accelerator`): Of this process.
        run (`StageRun`): Takes the curve and the checkpoints.
        module: Loss module as `accelerator.prepare` returned it: a batch's tensors to a summed loss.
        model: The bare model inside of it.
        optimizers (`Optimizers`): Over its parameters.
        read_batch: This process's share of the windows of a step; a pure function of the step. With `labels`, only
            those that are not -100 are targets.
        state (`TrainingState`): Where to begin; updated in place.
        budget (`Budget`): How much to train.
        clock: Seconds of the stage so far.
        telemetry (`Telemetry`, *optional*): Tells the rates in the curve.
        interim (`Interim`, *optional*): Evaluates at set intervals.
        count_padding (*optional*): Tokens of a step's windows, over all processes, that are padding; without, none.
        fp16 (`bool`, *optional*, defaults to `False`): Scale the loss, as fp16 needs it.
    """

    def __init__(
        self,
        arguments: PretrainArguments,
        accelerator: Any,
        run: StageRun,
        module: torch.nn.Module,
        model: torch.nn.Module,
        optimizers: Optimizers,
        read_batch: BatchReader,
        state: TrainingState,
        budget: Budget,
        clock: Callable[[], float],
        telemetry: Telemetry | None = None,
        interim: Interim | None = None,
        count_padding: Callable[[int], int] = lambda step: 0,
        fp16: bool = False,
    ):
        self.arguments, self.accelerator, self.run = arguments, accelerator, run
        self.module, self.model, self.optimizers = module, model, optimizers
        self.read_batch, self.state, self.budget, self.clock = read_batch, state, budget, clock
        self.telemetry, self.interim, self.count_padding = telemetry, interim, count_padding
        self.tokens_per_step = arguments.batch_size * arguments.context_length
        self.guard = SpikeGuard(state, arguments.spike_threshold)
        self.loss_scale, self._overflowed = LossScale(state, fp16), False
        self.checkpoints = CheckpointWriter(run.checkpoints, arguments.checkpoints_kept)
        self.recovery = Recovery(
            accelerator, run, model, optimizers, state, self.guard, arguments.spike_rollbacks, self.checkpoints.wait
        )
        self._skip_reason = ""
        # Without labels every window is full, so the number of next tokens over all processes is known beforehand.
        self.targets_per_step = arguments.batch_size * (arguments.context_length - 1)
        self._steps_here, self._seconds_here, self._data_seconds_here, self._padding_here = 0, 0.0, 0.0, 0
        self._step_seconds = 0.0  # of a step so far, on the slowest process
        self._evaluation_seconds = (state.untrained or {}).get("seconds", 0.0)  # of the last one
        self._mark = Counters()
        self._checkpointed_at = clock()
        run.outlasts_full_disk = arguments.on_checkpoint_failure == "continue"

    def train(self, stop: StopRequest) -> None:
        """Train until the budget is spent, then save a checkpoint that is marked as done.

        Raises:
            Interrupted: if `stop` was requested; a checkpoint of the last step is saved.
            NotSaved: if a checkpoint could not be written, unless 'on_checkpoint_failure' is 'continue'.
            ValueError: if the loss was not finite for several steps in a row, or spikes last again and again.
        """
        state = self.state
        if state.done:
            return
        (state.elapsed,) = self._largest(self.clock())
        if state.schedule_start is None:
            state.schedule_start = state.elapsed
        with contextlib.closing(self._make_bar()) as bar, contextlib.closing(self.checkpoints):
            self._train(bar, stop)
            state.done = True
            self._checkpoint()
            self._finish_checkpoint(must_succeed=False)

    def _train(self, bar: Any, stop: StopRequest) -> None:
        state = self.state
        self._evaluate_if_due()  # a signal may have come before it
        while not self.budget.spent(state.step, state.elapsed, self._step_seconds):
            self._step()
            if not self._overflowed:  # which says nothing about the weights or the data
                self.recovery.watch(self._skip_reason)
            reason, due, failed = self._agree(stop)
            self._log(bar)
            if failed:
                self._tell_failure(must_succeed=False)
            if reason:
                self._interrupt(reason)
            self._evaluate_if_due()
            if due:
                # A failure of the last one that came since `_agree` would be lost in the next one's success.
                self._finish_checkpoint(must_succeed=False)
                self._checkpoint()

    def _interrupt(self, reason: str) -> None:
        """Save what is now, record why, and leave, all processes at once: the launcher kills who is left behind."""
        self._checkpoint()
        self._finish_checkpoint(must_succeed=True)
        self.run.note_stop(reason, self.state.step)
        self.accelerator.wait_for_everyone()
        raise Interrupted(f"{self.run.folder}: stopped by {reason} at step {self.state.step}")

    def _make_bar(self) -> Any:
        """The progress bar, over steps or over seconds; a silent one in the processes other than the first."""
        if self.budget.steps is not None:
            bar = progress_bar("pretrain", self.budget.steps, self.state.step)
        else:
            assert self.budget.seconds is not None
            bar = progress_bar("pretrain", round(self.budget.seconds), round(self.state.elapsed))
            # No rate: it would always be one second a second.
            bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
        bar.disable = bar.disable or not self.accelerator.is_main_process
        return bar

    def _largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes.

        Rates and the end of the budget follow the clock: processes that read their own would train different weights,
        and one would stop while the others wait for its gradients.
        """
        if self.accelerator.num_processes == 1:
            return list(values)
        votes = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        return votes.tolist()

    def _set_rates(self) -> None:
        arguments, state = self.arguments, self.state
        assert state.schedule_start is not None
        progress = self.budget.progress(state.step, state.elapsed, state.schedule_start)
        decay = decay_factor(
            progress, arguments.schedule, arguments.decay_fraction, arguments.final_learning_rate_fraction
        )
        self.optimizers.set_factor(decay * warmup_factor(state.step, arguments.warmup_steps))
        if arguments.momentum_warmup_steps:
            share = min(1.0, state.step / arguments.momentum_warmup_steps)
            self.optimizers.set_momentum(_STARTING_MOMENTUM + share * (arguments.momentum - _STARTING_MOMENTUM))

    def _step(self) -> None:
        """One optimizer step, or a skipped one if the guard finds a spike in its loss or gradient."""
        arguments, state, accelerator = self.arguments, self.state, self.accelerator
        begin = time.monotonic()
        self._set_rates()
        # Dropout, if any, is a function of (seed, step, rank) too: resuming needs no generator's state.
        torch.manual_seed(hash((arguments.seed, state.step, accelerator.process_index)) % 2**63)
        number = data_step(state.step, state.skipped_data)
        batch, padding = self.read_batch(number), self.count_padding(number)
        data_seconds = time.monotonic() - begin
        state.data_seconds += data_seconds
        self._data_seconds_here += data_seconds
        loss = self._accumulate_gradients(batch)
        self.loss_scale.unscale(self.module.parameters())
        norm = accelerator.clip_grad_norm_(self.module.parameters(), arguments.grad_clip or math.inf)
        self.last_norm, last_loss = float(norm), float(accelerator.reduce(loss, "mean"))
        self._overflowed = self.loss_scale.overflowed(last_loss, self.last_norm)
        spike = None if self._overflowed else self.guard.judge(last_loss, self.last_norm)
        if spike is None and not self._overflowed:
            self.optimizers.step()
        self.optimizers.zero_grad()
        state.step += 1
        state.tokens += self.tokens_per_step - padding
        self._padding_here += padding
        seconds = time.monotonic() - begin
        state.train_seconds += seconds
        self._steps_here, self._seconds_here = self._steps_here + 1, self._seconds_here + seconds
        self._record(last_loss, spike)

    def _accumulate_gradients(self, batch: dict[str, Tensor]) -> Tensor:
        """Gradients of the mean loss over the targets of all processes; returns this process's share, times them."""
        parts = self.arguments.gradient_accumulation_steps
        # Data-parallel training averages gradients over the processes, a sum is wanted.
        scale = self.accelerator.num_processes / self._count_targets(batch)
        chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(parts):
            is_last = part == parts - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module):
                loss = self.module(**{name: tensors[part] for name, tensors in chunks.items()}) * scale
                (
                    loss * self.loss_scale.factor
                ).backward()  # not accelerator.backward, which divides by the launcher's accumulation steps
            total += loss.detach()
        return total

    def _count_targets(self, batch: dict[str, Tensor]) -> int:
        """Targets of a step over all processes: a mean of the parts' means would weigh their tokens unequally."""
        if "labels" not in batch:
            return self.targets_per_step
        return max(1, int(self.accelerator.reduce((batch["labels"] != -100).sum(), "sum")))

    def _record(self, loss: float, spike: str | None) -> None:
        state, self._skip_reason = self.state, spike or ""
        if self._overflowed:
            self.run.log(step=state.step, overflow_halved_loss_scale_to=state.loss_scale)
        if spike is None:
            state.pending_losses.append(loss)
            state.recent_losses = [*state.recent_losses, loss][-_RECENT_LOSSES:]
        else:
            self.run.log(step=state.step, skipped_update=spike)

    def _agree(self, stop: StopRequest) -> tuple[str | None, bool, bool]:
        """Let all processes see the same time.

        Returns:
            Why any was asked to stop, whether to save now, and whether the last checkpoint could not be written.
        """
        arguments, state = self.arguments, self.state
        elapsed = self.clock()
        due = bool(arguments.checkpoint_steps) and state.step % arguments.checkpoint_steps == 0
        seconds = arguments.checkpoint_seconds
        due = due or (seconds > 0 and elapsed - self._checkpointed_at >= seconds)
        # In a spike the weights may be damaged, and a new checkpoint would push an older, good one out.
        due = due and not state.skipped_in_a_row
        step_seconds = self._seconds_here / self._steps_here
        reason = stop.requested
        mine = (STOP_REASONS.index(reason) + 1 if reason else 0, due, self.checkpoints.failure is not None)
        state.elapsed, self._step_seconds, *votes = self._largest(elapsed, step_seconds, *map(float, mine))
        reason = STOP_REASONS[int(votes[0]) - 1] if votes[0] else None
        return reason, bool(votes[1]), bool(votes[2])

    def _log(self, bar: Any) -> None:
        state = self.state
        bar.update((state.step if self.budget.steps is not None else min(round(state.elapsed), bar.total)) - bar.n)
        if state.step % self.arguments.logging_steps and not self.budget.spent(
            state.step, state.elapsed, self._step_seconds
        ):
            return
        now = Counters(self._steps_here, self._seconds_here, self._data_seconds_here, self._padding_here)
        mark = self._mark
        self._mark = now
        if not state.pending_losses:
            return
        rates = {f"{name}_lr": rate for name, rate in self.optimizers.learning_rates.items()}
        values: dict[str, float] = {
            "loss": sum(state.pending_losses) / len(state.pending_losses),
            "lr": rates.get("adamw_lr", 0.0),
            **{name: rate for name, rate in rates.items() if name != "adamw_lr"},
            "tokens": state.tokens,
            **(self.telemetry.rates(mark, now) if self.telemetry else {}),
            "grad_norm": self.last_norm,
        }
        state.pending_losses = []
        if not math.isfinite(self.last_norm):
            del values["grad_norm"]
        self.run.log(step=state.step, **values)
        self.accelerator.log(values, step=state.step)
        shown = (
            {"tok/s": f"{values['tokens_per_second']:,.0f}", "MFU": f"{values['mfu']:.0%}"} if self.telemetry else {}
        )
        bar.set_postfix({"loss": f"{values['loss']:.3f}", **shown})

    def _evaluate_if_due(self) -> None:
        """Evaluate in between, unless the evaluation at the end follows, or a time budget has no room for both."""
        state, interim = self.state, self.interim
        if interim is None or not interim.due(state.step) or state.evaluated_step == state.step:
            return
        if self.budget.spent(state.step, state.elapsed, self._step_seconds + self._evaluation_seconds):
            return
        self._evaluation_seconds = interim.measure(state.step)
        state.evaluated_step = state.step
        state.evaluation_seconds += self._evaluation_seconds
        (state.elapsed,) = self._largest(self.clock())

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint; the processes other than the first go on to their next step."""
        is_main, begin = self.accelerator.is_main_process, time.monotonic()
        model, optimizers = gather_state(self.model, self.optimizers, keep=is_main)
        if is_main:
            self.checkpoints.save(model, optimizers, self.state)
            self.state.checkpoint_wait_seconds += time.monotonic() - begin
        self._checkpointed_at = self.clock()

    def _finish_checkpoint(self, must_succeed: bool) -> None:
        """Wait, in all processes, until the last checkpoint is on disk."""
        begin = time.monotonic()
        self.checkpoints.wait()
        self.state.checkpoint_wait_seconds += time.monotonic() - begin
        (failed,) = self._largest(float(self.checkpoints.failure is not None))
        if failed:
            self._tell_failure(must_succeed)

    def _tell_failure(self, must_succeed: bool) -> None:
        """Stop because a checkpoint could not be written, or only say so; all processes do the same."""
        failure = self.checkpoints.take_failure()
        if must_succeed or self.arguments.on_checkpoint_failure == "stop" or not isinstance(failure, NotSaved | None):
            self.run.note_stop("a checkpoint could not be written", self.state.step)
            raise failure or MainProcessFailed("a checkpoint could not be written")
        if failure is not None:
            logger.warning("%s, or training that ends now is lost from there on", failure)
            self.run.log(step=self.state.step, checkpoint_failed=str(failure))
