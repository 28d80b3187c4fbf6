"""`manifest.json` of a prepared folder, by which every file that is read of it later is known to be as it was written.

It lists size and SHA-256 of each file (a shard's stand with its split, see `shards`) and holds the SHA-256 of its own
other content, so that a changed number in it is found as a changed token is.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_scratch_gpt.runs import read_json, write_json
from hf_scratch_gpt.runs.checkpoints import hash_file
from hf_scratch_gpt.runs.files import json_text
from hf_scratch_gpt.runs.identity import METRICS, read_metrics

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2  # 1, without a number, had no checksums but those of the shards
PREPARE_AGAIN = "run the stage 'prepare' again"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(content).encode()).hexdigest()


def write_manifest(folder: str | Path, content: dict[str, Any], files: Iterable[str]) -> Path:
    """Write the manifest, with sizes and checksums of `files`, atomically; the folder is a prepared one from then on.

    Args:
        folder (`str` or `Path`): Holds all that is listed.
        content (`dict`): What else it says: `splits`, the tokenizer's fingerprint and so on, as plain JSON values.
        files (`Iterable[str]`): Names relative to `folder`, of all that is read later but the shards.

    Raises:
        OSError: if a file cannot be read or the manifest not be written.
    """
    folder = Path(folder)
    listed = {
        name: {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in sorted(files)
    }
    whole = {"format": MANIFEST_FORMAT, **content, "files": listed}
    whole.pop("sha256", None)
    return write_json(folder / MANIFEST, {**whole, "sha256": _digest(whole)})


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder, which is as it was written to the byte.

    Raises:
        FileNotFoundError: if the folder is not one, or was not finished.
        ValueError: if the manifest is damaged or of an earlier version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no prepared tokens here (no {MANIFEST}); run the stage 'prepare' first")
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {PREPARE_AGAIN}") from error
    if not isinstance(manifest, dict) or "splits" not in manifest:
        raise ValueError(f"{path}: not the manifest of prepared tokens (no 'splits'); {PREPARE_AGAIN}")
    if "format" not in manifest and "sha256" not in manifest:
        raise ValueError(f"{path}: of an earlier version, whose files have no checksums; {PREPARE_AGAIN}")
    if not _is_as_written(path, manifest):
        raise ValueError(f"{path}: content does not match its checksum; {PREPARE_AGAIN}")
    if manifest["format"] != MANIFEST_FORMAT:
        raise ValueError(
            f"{path}: of format {manifest['format']}, expected {MANIFEST_FORMAT}: made by another version of "
            f"hf_scratch_gpt; {PREPARE_AGAIN}"
        )
    return manifest


def _is_as_written(path: Path, manifest: dict[str, Any]) -> bool:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    try:
        # The text too: a changed space or a doubled key leaves the same content.
        is_same_text = path.read_bytes() == json_text(manifest).encode()
        return is_same_text and "format" in content and manifest.get("sha256") == _digest(content)
    except ValueError:  # what `write_json` cannot have written: NaN, or half a character
        return False


def check_file(folder: str | Path, manifest: dict[str, Any], name: str) -> Path:
    """The path of a file of a prepared folder, which has the size and checksum that the manifest lists.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, or not of this folder.
    """
    path, entry = Path(folder) / name, manifest["files"].get(name)
    if entry is None:
        raise ValueError(f"{path}: not listed in {MANIFEST}, so it may be of another try; {PREPARE_AGAIN}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {PREPARE_AGAIN}")
    size = path.stat().st_size
    if size != entry["size"]:
        raise ValueError(f"{path}: {size} bytes, expected {entry['size']}; {PREPARE_AGAIN}")
    if hash_file(path) != entry["sha256"]:
        raise ValueError(f"{path}: content does not match its checksum; {PREPARE_AGAIN}")
    return path


def check_files(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Check all files that the manifest lists; shards, which are large, are checked by `TokenShards`.

    Raises:
        FileNotFoundError, ValueError: as `check_file`, for the first that is missing or damaged.
    """
    for name in manifest["files"]:
        check_file(folder, manifest, name)


def is_prepared(folder: str | Path) -> bool:
    """Whether the stage `prepare` made this folder; also where its manifest has gone.

    Raises:
        ValueError: if the folder's `metrics.json` is damaged.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return True
    return (folder / METRICS).is_file() and read_metrics(folder).get("stage") == "prepare"


def find_file(folder: str | Path, name: str) -> Path | None:
    """The path of a file of a folder, checked if `prepare` made the folder; `None` if there is and was none.

    Raises:
        FileNotFoundError: if it, or the manifest, was there and is missing.
        ValueError: if it or the manifest is damaged.
    """
    path = Path(folder) / name
    if not is_prepared(folder):
        return path if path.is_file() else None
    manifest = read_manifest(folder)
    return check_file(folder, manifest, name) if name in manifest["files"] or path.is_file() else None
