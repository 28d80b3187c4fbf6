"""What each transformers `Trainer` of ours shares: the curve, one progress bar, verified checkpoints, signals."""

import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_scratch_gpt.runs.checkpoints import newest_checkpoint, step_of, write_manifest
from hf_scratch_gpt.runs.folder import StageRun
from hf_scratch_gpt.runs.hardware import release_freed_memory
from hf_scratch_gpt.runs.signals import Interrupted, StopRequest


class ProgressBar(tqdm):
    """tqdm's, whose `delay` holds for `set_postfix` too, and whose line ends if it was ever shown."""

    def refresh(self, *args: Any, **options: Any) -> Any:
        """Show the bar now, unless it is too early or it is switched off (TQDM_DISABLE)."""
        if self.disable:
            return None
        now = self._time()
        if now < self.start_t + self.delay:
            return None
        self.last_print_t = now  # `close` leaves the line open where it believes that nothing was shown
        return super().refresh(*args, **options)


def progress_bar(stage: str, total: int, done: int = 0) -> Any:
    """The one progress bar: stage, steps, time left, and whatever `set_postfix` is given (loss, tokens/s).

    It shows only after a moment, so that a mistake in the input is the one line that a user sees.
    """
    return ProgressBar(
        total=total, initial=done, desc=f"{stage:9}", unit="step", dynamic_ncols=True, mininterval=0.5, delay=0.5
    )


_STEPS_BETWEEN_RELEASES = 50


class AlreadyTrained(Exception):
    """A resumed `Trainer` stands at its last step: it was killed between its last checkpoint and its end.

    transformers asks only after a step whether it was the last, so that it would take one more.
    """


class RunCallback(TrainerCallback):
    """Ties a `Trainer` to a `StageRun`: curve, progress bar, a manifest for each checkpoint, stop on a signal."""

    def __init__(self, run: StageRun, stop: StopRequest):
        self.run, self.stop = run, stop
        self.bar: Any = None
        self._mark: tuple[float, float] = (time.monotonic(), 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = progress_bar(self.run.stage, state.max_steps, state.global_step)
        self._mark = (time.monotonic(), float(state.num_input_tokens_seen))
        if state.global_step >= state.max_steps > 0:
            raise AlreadyTrained

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % _STEPS_BETWEEN_RELEASES == 0:
            release_freed_memory()
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if self._any_rank_stops():
            control.should_save = True
            control.should_training_stop = True
        return control

    def _any_rank_stops(self):
        """Whether a signal reached any rank: ranks that stopped at different steps would wait for each other."""
        if dist.is_available() and dist.is_initialized():
            requests = [None] * dist.get_world_size()
            dist.all_gather_object(requests, self.stop.requested)
            self.stop.requested = next((name for name in requests if name), None)
        return self.stop.requested is not None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        seen, now = float(state.num_input_tokens_seen), time.monotonic()
        if seen > self._mark[1]:
            values["tokens_per_second"] = (seen - self._mark[1]) / (now - self._mark[0])
        self._mark = (now, seen)
        self.run.log(step=state.global_step, **values)
        if self.bar is not None:
            shown = {name: f"{values[name]:.4g}" for name in ("loss", "tokens_per_second") if name in values}
            self.bar.set_postfix({name.replace("tokens_per_second", "tok/s"): text for name, text in shown.items()})

    def on_save(self, args, state, control, **kwargs):
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # every rank has written its part
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def close(self):
        """End the bar's line, after an error too: what comes next begins a line of its own."""
        if self.bar is not None:
            self.bar.close()


def train(trainer: Any, run: StageRun) -> Any:
    """Run `trainer.train()` from the newest whole checkpoint of `run`, if there is one.

    The trainer's `args.output_dir` must be `run.checkpoints`.

    Returns:
        What `trainer.train()` does; nothing where that checkpoint is of the last step.

    Raises:
        Interrupted: if a signal stopped it; a checkpoint of the last step is saved.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if trainer.args.save_total_limit == 1:  # the older one goes before the newer one has its manifest
        trainer.args.save_total_limit = 2
    checkpoint = newest_checkpoint(run.checkpoints) if run.resumed and run.is_main else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    run.truncate_curve(step_of(checkpoint) if checkpoint else 0)
    with StopRequest() as stop, closing(RunCallback(run, stop)) as callback:
        trainer.add_callback(callback)
        result = None
        with suppress(AlreadyTrained):
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"{run.folder}: stopped by {stop.requested} at step {trainer.state.global_step}")
    return result
