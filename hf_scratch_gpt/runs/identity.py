"""What identifies a run (its settings, and its inputs: runs, files or names) and a model (digests of its files)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hf_scratch_gpt.runs.arguments import VOLATILE_FIELDS, given_settings
from hf_scratch_gpt.runs.checkpoints import hash_file
from hf_scratch_gpt.runs.files import read_json

METRICS = "metrics.json"
# What a model is: its digests stand in `metrics.json`, so that nobody takes the measures of one model for another's.
_MODEL_FILES = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer.json")


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """The `metrics.json` of a finished run.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: if the file is damaged.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a finished run (it has no {METRICS})")
    metrics = read_json(path)
    if not isinstance(metrics, dict) or "run_id" not in metrics:
        raise ValueError(f"{path}: not the metrics of a run (no 'run_id')")
    return metrics


def describe_input(source: str) -> dict[str, Any]:
    """What identifies an input: a finished run by its id, files by size and modification time, else the name alone."""
    path = Path(source)
    if (path / METRICS).is_file():
        return {"path": source, "run_id": read_metrics(path)["run_id"]}
    if path.exists():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [
            (file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns)
            for file in files
            if file.is_file()
        ]
        return {"path": source, "files": len(stats), "digest": _digest(stats)}
    return {"path": source}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def describe_inputs(arguments: Any) -> dict[str, Any]:
    """`describe_input` of every input field of a stage's settings; a list of sources gives a list.

    Those of its `named_input_fields` are known by their names alone, though files of that name may be there: what they
    hold may grow, and the stage itself checks it.
    """
    inputs: dict[str, Any] = {}
    for name in getattr(type(arguments), "input_fields", ()):
        value = getattr(arguments, name)
        if isinstance(value, list | tuple):
            inputs[name] = [describe_input(str(item)) for item in value]
        elif value:
            inputs[name] = describe_input(str(value))
    for name in getattr(type(arguments), "named_input_fields", ()):
        if getattr(arguments, name):
            inputs[name] = [{"path": str(item)} for item in getattr(arguments, name)]
    return inputs


def model_files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file in `folder` that makes a model what it is: weights, config, tokenizer."""
    paths = [path for pattern in _MODEL_FILES for path in sorted(Path(folder).glob(pattern))]
    return {path.name: hash_file(path) for path in paths}


def fingerprint(arguments: Any, stage: str, inputs: dict[str, Any] | None = None) -> str:
    """Digest of the stage, the package's version, the settings that matter, and the inputs' identities.

    `inputs` spares a second look at the inputs to a caller that has their `describe_inputs`.
    """
    from hf_scratch_gpt import __version__

    input_fields = getattr(type(arguments), "input_fields", ())
    settings = {
        name: value
        for name, value in given_settings(arguments).items()
        if name not in VOLATILE_FIELDS and name not in input_fields
    }
    return _digest(
        [stage, __version__, settings, _without_paths(describe_inputs(arguments) if inputs is None else inputs)]
    )


def _without_paths(inputs: dict[str, Any]) -> dict[str, Any]:
    """A run keeps its identity when its folder moves; only inputs that are known by name alone keep the name."""

    def identity(entry: dict[str, Any]) -> Any:
        return entry.get("run_id") or entry.get("digest") or entry["path"]

    return {
        name: [identity(item) for item in entry] if isinstance(entry, list) else identity(entry)
        for name, entry in inputs.items()
    }
