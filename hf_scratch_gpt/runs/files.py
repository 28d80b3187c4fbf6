"""Atomic file writes: a reader, or a run that starts after a crash, sees the old content or the new, never a part."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REMOVED = ".removed.tmp"  # ends the hidden name of a folder that is about to be emptied


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk; a rename survives a power cut only after this."""
    if os.name == "nt":  # Windows flushes only what is open for writing, and no folders
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path` atomically: temporary file beside it, flush, rename, flush the folder.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write names no file, and the temporary one tells nothing
        raise
    _flush(path.parent)
    return path


def remove_temporaries(folder: str | Path, pattern: str) -> None:
    """Remove what a killed writer left in `folder` under names like `pattern`; call it only with the folder locked."""
    for path in Path(folder).glob(pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _find_non_finite(value: Any, name: str = "") -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"'{name}' is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_find_non_finite(item, f"{name}.{key}" if name else str(key)) for key, item in items)
    return next((text for text in found if text), None)


def json_text(value: Any) -> str:
    """What `write_json` writes of `value`; `ValueError` for NaN or an infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically.

    Raises:
        OSError: as `write_text`.
        ValueError: for NaN or an infinity, which JSON has not; the message names the entry.
    """
    non_finite = _find_non_finite(value)
    if non_finite:
        raise ValueError(f"{path}: {non_finite}, which JSON cannot hold")
    return write_text(path, json_text(value))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not UTF-8 or not valid JSON; the message names the file and the place.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def yaml_text(value: Any, **options: Any) -> str:
    """YAML of plain values, keys in their order, that reads back as them; `options` as for `yaml.safe_dump`."""
    import yaml

    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    # PyYAML writes NEL and Unicode's separators as they are, and reads them as ends of lines.
    if any(end in text for end in "\x85\u2028\u2029"):
        return yaml.safe_dump(value, sort_keys=False, **options)
    return text


def remove_folder(folder: str | Path) -> None:
    """Remove a folder so that a kill half-way leaves it whole or gone: it is renamed before it is emptied."""
    shutil.rmtree(_move_aside(Path(os.path.abspath(folder))), ignore_errors=True)


def _move_aside(folder: Path) -> Path:
    doomed = folder.with_name(f".{folder.name}{REMOVED}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    return doomed


@contextmanager
def replace_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an exception.

    All files are flushed before the rename, so that `target` is either absent, the old one, or complete.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():
                _flush(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # The old one is emptied last: until the new one is in its place, it is all there is.
    old = _move_aside(target) if target.exists() else None
    os.replace(temporary, target)
    _flush(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def shipped_folder(name: str) -> Path:
    """A top-level folder of the repository that travels in the package: `recipes` or `model_cards`.

    In an installed package it is inside it; in a checkout it stands beside it.

    Raises:
        FileNotFoundError: if it is in neither place: the installation is damaged.
    """
    package = Path(__file__).parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{package / name}: missing; install hf_scratch_gpt again")
