"""What a pretraining run needs to go on exactly where it stopped, and how it is written.

A batch is a pure function of (seed, step, rank), and dropout is seeded anew at each step, so there is no state of a
loader or of a random generator to save: weights, optimizers and counters are all.
"""

import dataclasses
import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.pretraining.loss_scale import FIRST_SCALE
from hf_scratch_gpt.pretraining.optimizers import Optimizers
from hf_scratch_gpt.pretraining.snapshot import Snapshot
from hf_scratch_gpt.runs import read_json, replace_folder
from hf_scratch_gpt.runs.checkpoints import newest_checkpoint, rotate_checkpoints, write_hashed, write_manifest
from hf_scratch_gpt.runs.errors import NotSaved, is_full_disk
from hf_scratch_gpt.runs.files import json_text

logger = logging.getLogger(__name__)

_WEIGHTS, _OPTIMIZER_TENSORS = "model.safetensors", "optimizer.safetensors"
_OPTIMIZERS, _STATE = "optimizer.json", "state.json"


@dataclasses.dataclass
class TrainingState:
    """Counters of a run; times are in seconds and include those of earlier tries up to the checkpoint.

    Args:
        step (`int`): Optimizer steps taken (a skipped update counts).
        tokens (`int`): Tokens read, over all processes.
        elapsed (`float`): Stage time.
        schedule_start (`float`, *optional*): Stage time when the first step began.
        train_seconds (`float`): Time in steps.
        data_seconds (`float`): Part of it that was spent on reading batches.
        compile_seconds (`float`): Time spent on compiling and its trial step.
        checkpoint_wait_seconds (`float`): Time for which the main process waited for checkpoints instead of training.
        compiled (`bool`): Whether the last try trained compiled.
        skipped (`int`): Updates left out because loss or gradient was not finite, or a spike.
        skipped_in_a_row (`int`): How many of the last steps were left out.
        pending_losses (`list[float]`): Losses since the last line of the curve.
        recent_losses (`list[float]`): The last losses, for the final training loss.
        done (`bool`): Training is over; only the evaluation and the saving of the model remain.
        untrained (`dict`, *optional*): The evaluation of the random model before training, with its `seconds`.
        usual_losses (`list[float]`): Losses of the last accepted steps, for the spike guard.
        usual_log_norms (`list[float]`): Logarithms of their gradients' norms.
        skipped_data (`list[list[int]]`): Pairs (optimizer step, batches passed over from it on).
        rollbacks (`list[dict]`): What the spike guard did, each time it went back to a checkpoint.
        evaluated_step (`int`): Step of the last evaluation during training.
        evaluation_seconds (`float`): Time spent on evaluations during training.
        stream (`dict`, *optional*): Of a run that reads a stream, how far: `batches`, the `digest` of their tokens,
            and what was `removed` on the way.
        loss_scale (`float`): Factor on the loss in fp16; see `LossScale`.
        steps_since_overflow (`int`): Steps in a row whose gradients it did not make overflow.
        overflows (`int`): Updates left out because it did.
    """

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    schedule_start: float | None = None
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    compile_seconds: float = 0.0
    checkpoint_wait_seconds: float = 0.0
    compiled: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    pending_losses: list[float] = dataclasses.field(default_factory=list)
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    done: bool = False
    untrained: dict[str, Any] | None = None
    usual_losses: list[float] = dataclasses.field(default_factory=list)
    usual_log_norms: list[float] = dataclasses.field(default_factory=list)
    skipped_data: list[list[int]] = dataclasses.field(default_factory=list)
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluated_step: int = 0
    evaluation_seconds: float = 0.0
    stream: dict[str, Any] | None = None
    loss_scale: float = FIRST_SCALE
    steps_since_overflow: int = 0
    overflows: int = 0


def _each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with each tied weight once, under the first of its names."""
    found: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.data_ptr() else (name,)
        if found.setdefault(place, name) == name:
            tensors[name] = tensor
    return tensors


def _names_once(model: torch.nn.Module) -> set[str]:
    """The names that `_each_once` leaves of the model's state, also where its parameters are slices of tensors."""
    found: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    tied = {name for name, parameter in parameters if found.setdefault(id(parameter), name) != name}
    return model.state_dict().keys() - tied


def _split_optimizers(state_dicts: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state's tensors by `<optimizer>.<parameter>.<name>`, and the rest, which JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest = []
    for part, state_dict in enumerate(state_dicts):
        numbers: dict[str, dict[str, Any]] = {}
        for parameter, values in state_dict["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{part}.{parameter}.{name}"] = value
                else:
                    numbers.setdefault(str(parameter), {})[name] = value
        rest.append({"state": numbers, "param_groups": state_dict["param_groups"]})
    return tensors, rest


def _join_optimizers(tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `_split_optimizers` took apart."""
    state_dicts: list[dict[str, Any]] = []
    for part in rest:
        state: dict[int, dict[str, Any]] = {int(key): dict(values) for key, values in part["state"].items()}
        groups = [
            {key: tuple(value) if key == "betas" else value for key, value in group.items()}
            for group in part["param_groups"]
        ]
        state_dicts.append({"state": state, "param_groups": groups})
    for key, tensor in tensors.items():
        number, parameter, name = key.split(".", 2)
        state_dicts[int(number)]["state"].setdefault(int(parameter), {})[name] = tensor
    return state_dicts


class CheckpointWriter:
    """Writes `checkpoint-<step>` folders while training goes on; one at a time.

    `save` copies weights, optimizers and counters into memory of its own, as much as they have, and returns; a thread
    writes, hashes and flushes them below a temporary name, renames it, and removes what is older than the last `kept`.

    Args:
        folder (`str` or `Path`): Where the checkpoints are; nobody else may write there.
        kept (`int`, *optional*, defaults to `2`): How many whole ones stay.

    Attributes:
        failure (`Exception`, *optional*): Why the last checkpoint could not be written; `NotSaved` for what a user can
            cause. Older checkpoints are untouched then, and nothing of the new one is left.
    """

    def __init__(self, folder: str | Path, kept: int = 2):
        self.folder, self.kept = Path(folder), kept
        self.failure: Exception | None = None
        self._model, self._optimizers = Snapshot(), Snapshot()
        self._thread: threading.Thread | None = None

    def save(self, model: Any, optimizers: Any, state: TrainingState) -> Path:
        """Begin to write a checkpoint of what is now; waits for the one before it. Returns the folder it will be.

        Of `model` and `optimizers` only `state_dict` is asked, which must give whole tensors.
        """
        self.wait()
        self._model.take(_each_once(model.state_dict()))
        tensors, rest = _split_optimizers(optimizers.state_dict())
        self._optimizers.take(tensors)
        texts = {_OPTIMIZERS: json_text(rest), _STATE: json_text(dataclasses.asdict(state))}
        target = self.folder / f"checkpoint-{state.step}"
        # A daemon, so that a second Ctrl-C need not wait for it; half a checkpoint has no manifest.
        self._thread = threading.Thread(target=self._write, args=(target, texts), name="checkpoint", daemon=True)
        self._thread.start()
        return target

    def wait(self) -> None:
        """Wait until what `save` began is on disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait, and warn of a failure that nobody has taken: the run ends for another reason."""
        self.wait()
        failure = self.take_failure()
        if failure is not None:
            logger.warning("%s", failure)

    def take_failure(self) -> Exception | None:
        """`failure`, once."""
        failure, self.failure = self.failure, None
        return failure

    def _write(self, target: Path, texts: dict[str, str]) -> None:
        try:
            with replace_folder(target) as temporary:
                contents: dict[str, Iterable[Any]] = {
                    _WEIGHTS: self._model.blocks(),
                    _OPTIMIZER_TENSORS: self._optimizers.blocks(),
                    **{name: [text.encode()] for name, text in texts.items()},
                }
                entries = {name: write_hashed(temporary / name, blocks) for name, blocks in contents.items()}
                write_manifest(temporary, entries)
            if self.failure is not None:  # of an earlier one, which nobody has asked for yet
                logger.warning("%s", self.failure)
                self.failure = None
        except OSError as error:
            self.failure = self._explain(target, error)
            return
        except Exception as error:  # a defect of ours: the training thread raises it
            self.failure = error
            return
        try:
            rotate_checkpoints(self.folder, self.kept)
        except OSError as error:
            logger.warning("%s: older checkpoints could not be removed: %s", self.folder, error)

    def _explain(self, target: Path, error: OSError) -> NotSaved:
        reason = "the disk is full" if is_full_disk(error) else error.strerror or str(error)
        name = f" at {Path(error.filename).name}" if error.filename else ""
        good = newest_checkpoint(self.folder)
        rest = f"the last good one is {good.name}" if good else "there is none yet"
        line = NotSaved(f"{target}: this checkpoint could not be written{name} ({reason}); {rest}; make room")
        line.__cause__ = error
        return line


def save_checkpoint(
    folder: str | Path, model: torch.nn.Module, optimizers: Optimizers, state: TrainingState, kept: int = 2
) -> Path:
    """Write `checkpoint-<step>` below `folder` and return when it is on disk; see `CheckpointWriter`.

    Raises:
        NotSaved: if it could not be written; older checkpoints stay.
    """
    writer = CheckpointWriter(folder, kept)
    target = writer.save(model, optimizers, state)
    writer.wait()
    if writer.failure is not None:
        raise writer.failure
    return target


def load_checkpoint(checkpoint: str | Path, model: torch.nn.Module, optimizers: Optimizers) -> TrainingState:
    """Restore `model` and `optimizers` in place from a verified checkpoint and return its counters.

    Raises:
        ValueError: if it is of another model or of other optimizers.
    """
    from safetensors.torch import load_file

    checkpoint = Path(checkpoint)
    # On the CPU first: the optimizers' and the model's own load move what they take to their device.
    tensors = load_file(checkpoint / _WEIGHTS)
    expected = _names_once(model)
    if tensors.keys() != expected:
        name = min(tensors.keys() ^ expected)
        which = "the model has and it has not" if name in expected else "the model has not"
        raise ValueError(f"{checkpoint}: holds another model: '{name}' is a weight that {which}")
    try:
        model.load_state_dict(tensors, strict=False)  # a tied weight has a second name
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: holds another model: {error}") from error
    states = _join_optimizers(load_file(checkpoint / _OPTIMIZER_TENSORS), read_json(checkpoint / _OPTIMIZERS))
    optimizers.load_state_dict(states)
    return TrainingState(**read_json(checkpoint / _STATE))
