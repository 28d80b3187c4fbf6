"""A stage's output folder: one writer at a time, resumable, and complete once `metrics.json` is there.

    with StageRun(args, "pretrain") as run:
        if run.finished:
            return run.folder
        run.log(step=1, loss=5.2)                 # a line of curve.jsonl
        ...                                       # weights, tokenizer, config into run.folder
        run.finish({"loss": 1.2})                 # metrics.json, written last

`metrics.json` holds the run's id, its fingerprint (settings and inputs) and those of its inputs: the lineage; what the
run took in time, memory and energy; and the digests of the model's files.
"""

import errno
import glob
import json
import logging
import math
import os
import shutil
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_scratch_gpt.runs.arguments import given_settings
from hf_scratch_gpt.runs.checkpoints import clear_traces
from hf_scratch_gpt.runs.energy import EnergyMeter, add_usage, energy_record
from hf_scratch_gpt.runs.errors import is_full_disk, name_full_disk
from hf_scratch_gpt.runs.files import (
    read_json,
    remove_folder,
    remove_temporaries,
    write_json,
    write_text,
    yaml_text,
)
from hf_scratch_gpt.runs.hardware import describe_environment, node_count, peak_rss_bytes, rank_and_world_size
from hf_scratch_gpt.runs.identity import METRICS, describe_inputs, fingerprint, model_files, read_metrics

logger = logging.getLogger(__name__)

STATE, CURVE, RECIPE = ".state.json", "curve.jsonl", "recipe.yaml"
_STATE_INTERVAL_SECONDS = 2.0
_STATE_FIELDS = {"fingerprint", "run_id", "started_at", "seconds", "peak_rss_bytes", "usage"}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class MainProcessFailed(Exception):
    """Another rank's error, which that rank reports: this one only stops."""


class StageRun:
    """One stage's work on its output folder, as a context manager.

    On entry it locks the folder (released by the system when the process dies) and finds out how far an earlier try
    came. A finished run of other settings is kept as `<folder>.old`; unfinished work of other settings is removed.

    Attributes:
        folder (`Path`): The output folder.
        finished (`bool`): The same settings and inputs are already done here: there is nothing to do.
        resumed (`bool`): An earlier try of the same settings was interrupted; `checkpoints` may hold its state.
        checkpoints (`Path`): Where the stage saves its `checkpoint-<step>` folders; removed by `finish`.
        outlasts_full_disk (`bool`): Set by a stage that goes on where the disk is full: `log` then only warns.
        setup (`dict`, *optional*): Set by a stage that computes: how its process was set up, for `metrics.json`.

    Raises:
        ValueError: on entry, if another process writes this folder, or if it holds files that are not a run's.
    """

    def __init__(self, arguments: Any, stage: str):
        self.arguments, self.stage = arguments, stage
        self.folder = Path(arguments.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.finished = self.resumed = self.outlasts_full_disk = False
        self.setup: dict[str, Any] | None = None
        self._home = Path(os.path.abspath(self.folder))  # has a name, and a parent for the lock, even for "."
        rank, self._world_size = rank_and_world_size()
        self.is_main = rank == 0
        self._state: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}
        self._identity = ""
        self._clock = time.monotonic()
        self._meter = EnergyMeter() if self.is_main else None
        self._saved_at = -_STATE_INTERVAL_SECONDS
        self._lock: Any = None

    def __enter__(self) -> "StageRun":
        error: BaseException | None = None
        if self.is_main:
            try:
                self._open()
            except BaseException as caught:
                error = caught
        if self._world_size > 1:
            error = self._share_state(error)
        if error is not None:
            self.__exit__(None, None, None)  # Python calls it only after an __enter__ that returned
            raise error
        return self

    def _share_state(self, error: BaseException | None) -> BaseException | None:
        """Give every rank what rank 0 found; a rank that waits for a failed rank 0 would wait for ever."""
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, parse_flag_from_env

        # Who makes the state first decides for the process; an Accelerator that comes later reads the same variable.
        if PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes != self._world_size:
            return error or ValueError(
                f"launched as {self._world_size} processes, but they do not know of each other; on a CPU set"
                " ACCELERATE_USE_CPU=true and launch with --multi_gpu"
            )
        told = None if error is None else str(error) or type(error).__name__
        shared = [told, self.finished, self.resumed, self._state]
        told, self.finished, self.resumed, self._state = broadcast_object_list(shared)
        return MainProcessFailed(told) if told is not None and error is None else error

    def _open(self) -> None:
        from filelock import FileLock, Timeout

        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: expected a folder to write to, found a file; choose another output_dir")
        lock = FileLock(self._home.parent / f".{self._home.name}.lock")
        try:
            self._home.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.folder}: another process is writing this run; wait for it or stop it") from None
        except OSError as error:
            self._tell_unwritable(error)
            raise
        self._lock = lock
        self._remove_traces_of_a_kill()
        self._inputs = describe_inputs(self.arguments)
        identity = self._identity = fingerprint(self.arguments, self.stage, self._inputs)
        if (self.folder / METRICS).is_file():
            if read_metrics(self.folder).get("fingerprint") == identity:
                self.finished = True
                self._remove_leftovers()
                return
            self._set_aside()
        elif self._take_back(identity):
            self.finished = True
            return
        try:
            self._begin(identity)
        except OSError as error:
            self._tell_unwritable(error)
            raise

    def _tell_unwritable(self, error: OSError) -> None:
        """Raise what the system says of the folder anew, as a line that names it."""
        reasons = {
            errno.EACCES: "may not be written",
            errno.EPERM: "may not be written",
            errno.EROFS: "is on a read-only disk",
            errno.EEXIST: f"{error.filename} is a file, not a folder",
            errno.ENOTDIR: f"{error.filename} is below a file, not a folder",
        }
        if error.errno in reasons:
            raise OSError(f"{self.folder}: {reasons[error.errno]}; choose another output_dir") from error

    def _take_back(self, identity: str) -> bool:
        """Whether `<folder>.old` is this very run, set aside by a try with other settings that did not finish."""
        old = self._home.with_name(self._home.name + ".old")
        if not (old / METRICS).is_file() or read_metrics(old).get("fingerprint") != identity:
            return False
        if self.folder.is_dir():
            if not (self.folder / STATE).is_file() and any(self.folder.iterdir()):
                return False  # `_begin` refuses it
            remove_folder(self.folder)
        os.replace(old, self.folder)
        logger.warning("%s: taken back from %s, which is this run", self.folder, old)
        return True

    def _remove_traces_of_a_kill(self) -> None:
        for name in (self._home.name, f"{self._home.name}.old"):
            remove_temporaries(self._home.parent, f".{glob.escape(name)}.removed.tmp")
        is_ours = (self.folder / METRICS).is_file() or (self.folder / STATE).is_file()
        remove_temporaries(self.folder, ".*.tmp" if is_ours else f".{STATE}.*.tmp")
        if is_ours:
            clear_traces(self.checkpoints)

    def _set_aside(self) -> None:
        old = self._home.with_name(self._home.name + ".old")
        if old.exists():
            if not (old / METRICS).is_file():
                raise ValueError(f"{old}: in the way, and not a run of this package; rename it or remove it")
            remove_folder(old)
        os.replace(self.folder, old)
        logger.warning("%s was made with other settings or inputs; kept as %s", self.folder, old)

    def _begin(self, identity: str) -> None:
        if (self.folder / STATE).is_file():
            self._state = self._read_state()
            self.resumed = self._state.get("fingerprint") == identity
            if not self.resumed:
                logger.warning("%s: removing unfinished work of other settings or inputs", self.folder)
                remove_folder(self.folder)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder}: not empty and not a run of this package; choose another output_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resumed:
            self._mend_curve()
            if "stop_reason" in self._state:
                stop = {name: self._state.pop(name) for name in ("stop_reason", "stop_step")}
                self._state["stops"] = [*self._state.get("stops", []), stop]
        else:
            self._state = {
                "fingerprint": identity,
                "run_id": uuid.uuid4().hex,
                "started_at": _now(),
                "seconds": 0.0,
                "peak_rss_bytes": 0,
                "usage": {},
            }
        self._save_state()
        self._write_recipe()

    def begin_anew(self, reason: str) -> None:
        """Remove what a finished run left, and begin: for a stage that finds its own folder damaged (main process)."""
        assert self.finished
        assert self.is_main
        logger.warning("%s: made anew, since it is damaged: %s", self.folder, reason)
        remove_folder(self.folder)
        self.finished = False
        self._begin(self._identity)

    def _read_state(self) -> dict[str, Any]:
        path = self.folder / STATE
        try:
            state = read_json(path)
        except ValueError:
            state = None
        if isinstance(state, dict) and state.keys() >= _STATE_FIELDS:
            return state
        logger.warning("%s is damaged: starting this stage anew", path)
        return {}

    def _write_recipe(self) -> None:
        text = yaml_text(given_settings(self.arguments))
        write_text(self.folder / RECIPE, f"# scratch-gpt {self.stage} recipe.yaml makes this run again\n{text}")

    def _save_state(self) -> None:
        now = time.monotonic()
        self._state["seconds"] += now - self._clock
        self._state["peak_rss_bytes"] = max(self._state["peak_rss_bytes"], peak_rss_bytes())
        if self._meter is not None:
            add_usage(self._state["usage"], self._meter.read())
        self._clock = self._saved_at = now
        write_json(self.folder / STATE, self._state)

    @property
    def seconds(self) -> float:
        """Seconds of work on this run, those of interrupted tries included."""
        return self._state.get("seconds", 0.0) + time.monotonic() - self._clock

    def log(self, step: int, **values: float | int | str | None) -> None:
        """Append a line to `curve.jsonl` (main process only). NaN and infinities become null: JSON has no others."""
        if not self.is_main:
            return
        finite = {name: None if _is_non_finite(value) else value for name, value in values.items()}
        line = json.dumps({"step": step, "seconds": round(self.seconds, 3), **finite})
        try:
            self._append(line + "\n")
            if time.monotonic() - self._saved_at > _STATE_INTERVAL_SECONDS:
                self._save_state()
        except OSError as error:
            if not self.outlasts_full_disk or not is_full_disk(error):
                raise
            logger.warning("%s: the disk is full, so step %d is not in %s", self.folder, step, CURVE)

    def _append(self, line: str) -> None:
        """Add a line to the curve, or nothing of it: the next line would continue half a one."""
        with open(self.folder / CURVE, "ab", buffering=0) as file:
            before = file.tell()
            try:
                content = line.encode()
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(before)
                raise

    def note_stop(self, reason: str, step: int) -> None:
        """Record why the run stops before it is done: `stop_reason` and `stop_step` of its state (main process only).

        A try that goes on after it moves them to `stops`, a list that `metrics.json` has in the end.
        """
        if not self.is_main:
            return
        self._state |= {"stop_reason": reason, "stop_step": step}
        try:
            self._save_state()
        except OSError as error:
            logger.warning("%s: the reason for the stop (%s) is not recorded: %s", self.folder, reason, error)

    def read_curve(self) -> list[dict[str, Any]]:
        """The lines of `curve.jsonl`; a last line that a kill cut short is left out."""
        path = self.folder / CURVE
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def _mend_curve(self) -> None:
        """Drop a last line that a kill cut short, so that the next one does not continue it."""
        path = self.folder / CURVE
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in self.read_curve()))

    def truncate_curve(self, step: int) -> None:
        """Drop the curve's lines after `step`: a resumed run is about to write them again."""
        if self.is_main:
            kept = [json.dumps(row) for row in self.read_curve() if row["step"] <= step]
            write_text(self.folder / CURVE, "".join(f"{line}\n" for line in kept))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json` with the stage's `metrics` and the lineage, and remove what only served resuming."""
        if not self.is_main:
            return
        self._save_state()
        state = dict(self._state)
        usage = state.pop("usage")
        report = {
            "stage": self.stage,
            **state,
            "finished_at": _now(),
            "energy": energy_record(usage, self._world_size, node_count(self._world_size)),
            "files": model_files(self.folder),
            "inputs": self._inputs,
            "environment": describe_environment(),
            **({"setup": self.setup} if self.setup is not None else {}),
            "metrics": metrics,
        }
        write_json(self.folder / METRICS, report)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release()
        if error is not None:
            name_full_disk(error, self.folder)
