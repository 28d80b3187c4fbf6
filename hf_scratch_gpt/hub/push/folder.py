"""What lies in a model folder: its files, each with its purpose, and what has no business there.

What goes up is chosen by a list of what a model needs, so that logs, rollouts and helper files stay at home; and some
things stop the push wherever they lie, because a folder that holds them was not made ready to be published.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from hf_scratch_gpt.hub.push.leaks import find_home_path, find_secret_name
from hf_scratch_gpt.hub.push.pickles import find_pickle
from hf_scratch_gpt.runs.folder import RECIPE, STATE
from hf_scratch_gpt.runs.identity import METRICS

CARD = "README.md"
# The files that make the model what it is, by their names at the folder's top: stale ones are removed from the
# repository, because a loader would prefer an old `model.safetensors` to new shards.
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "*.safetensors.index.json",
    ),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
_OTHER_FILES = (
    *(CARD, "LICENSE*", "LICENCE*", "NOTICE*", METRICS, RECIPE),
    *("*.gguf", "*.onnx", "*.onnx_data", "*.onnx.data", "onnx/*.onnx", "onnx/*.onnx_data", "onnx/*.onnx.data"),
)
_WHY_LEFT_OUT = {
    "adapter/*": "already merged into the weights",
    "value_model/*": "only serves to train on",
    "*.jsonl": "a record of the training",
    ".cache/*": "a download's own records",
    "*__pycache__/*": "compiled code",
}
_CHECKPOINTS = ("checkpoint-*", "checkpoints", "global_step*", "optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*")
_TRAINING_STATE = (
    *("optimizer.*", "optimizers.*", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*", "random_states_*"),
    *("trainer_state.json", "training_args.bin", "*_optim_states.pt", "*.distcp", "tensors.pt", "optim_state*"),
)


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file of the folder: its name in it, with `/` between the parts, where it is, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclasses.dataclass
class Contents:
    """The files of a folder that may go up, those that stay with the reason why, and what forbids a push.

    Args:
        chosen (`list[LocalFile]`): In the order of their names.
        left_out (`dict[str, str]`): Why each other file stays at home.
        refused (`list[str]`): One line each, naming the file, the reason and the remedy.
    """

    chosen: list[LocalFile]
    left_out: dict[str, str]
    refused: list[str]


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    # `*` of fnmatch also stands for slashes, so the number of parts is compared.
    return any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in patterns)


def is_model_file(name: str) -> bool:
    """Whether a name in a repository is one of those that a model is loaded from."""
    return _matches(name, MODEL_FILES)


def read_folder(folder: Path, code: set[str], include: list[str]) -> Contents:
    """Look through a folder, following no links.

    Args:
        folder: The model folder.
        code: Names of the Python files that the model's config asks for.
        include: Patterns of further files to send.

    Raises:
        OSError: if a file cannot be read.
    """
    found = Contents([], {}, [])
    for path, kind in _walk(folder):
        name = path.relative_to(folder).as_posix()
        reason = _why_refused(path, name, kind, folder)
        if reason:
            found.refused.append(f"{folder / name}: {reason}")
        elif kind == "other":
            found.left_out[name] = "neither a file nor a folder"
        elif kind == "file":
            wanted = name in code or _matches(name, _OTHER_FILES) or is_model_file(name)
            if wanted or any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
                found.chosen.append(LocalFile(name, path, path.stat().st_size))
            else:
                found.left_out[name] = _why_left_out(name)
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every path below `folder` in order, and whether it is a `file`, a `folder` or something `other`.

    A folder that forbids the push, and a link to a folder, are not entered.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        for name in [*folders]:
            path = Path(parent) / name
            yield path, "folder"
            if path.is_symlink() or _forbidden_folder(path.relative_to(folder).as_posix()):
                folders.remove(name)
        for name in sorted(files):
            path = Path(parent) / name
            yield path, "file" if path.is_file() or path.is_symlink() else "other"


def _forbidden_folder(name: str) -> str | None:
    if any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _CHECKPOINTS):
        return "is a training checkpoint, with the optimizer's state; move it out of the folder"
    secret = find_secret_name(name)
    return f"{secret}; move it out of the folder" if secret else None


def _why_refused(path: Path, name: str, kind: str, folder: Path) -> str | None:
    """The reason and the remedy, where a path forbids the push."""
    if path.is_symlink():
        target = path.resolve()
        if not target.exists():
            return "is a link to nothing; remove it or mend it"
        if folder.resolve() not in target.parents:
            return "is a link out of the folder; put the file itself there (`cp -rL` copies what links point to)"
        if kind == "folder":
            return "is a link to a folder; put the folder itself there"
    if kind == "folder":
        return _forbidden_folder(name)
    secret = find_secret_name(name)
    if secret:
        return f"{secret}; move it out of the folder"
    if name == STATE:
        return "marks a run that has not finished; run its stage to the end first"
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _TRAINING_STATE):
        return "is a training state, such as an optimizer's; move it out of the folder"
    if find_home_path(f"/{name}"):
        return "has a name with a path of this machine; rename it"
    pickled = find_pickle(path) if kind == "file" else None
    if pickled:
        return f"{pickled}, which can run code when it is loaded; keep weights as safetensors and move it out"
    return None


def _why_left_out(name: str) -> str:
    if name.endswith(".py"):
        return "code that the config does not ask for"
    return next((why for pattern, why in _WHY_LEFT_OUT.items() if fnmatch.fnmatchcase(name, pattern)), "not needed")
