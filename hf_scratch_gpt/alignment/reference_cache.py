"""Log-probabilities of the reference model, computed once and kept on disk for every later run of the same data.

DPO's reference never changes, yet it costs a forward pass of every pair in every epoch and, without adapters, a second
model in memory. What it says depends on the encoded rows, its weights and config, and the precision: a digest of these
names the file, so that other data or another model never finds it. A file is read only whole: its own checksum, its
key and its length must be right, else it is computed anew and a warning names it.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.runs.checkpoints import write_hashed

logger = logging.getLogger(__name__)

_FORMAT = 1
_ROW_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL names them

Values = dict[str, list[float]]


def digest_rows(rows: Any) -> str:
    """SHA-256 of encoded pairs in their order: every token id of prompt, chosen and rejected answer."""
    digest = hashlib.sha256()
    for example in zip(*(rows[column] for column in _ROW_COLUMNS), strict=True):
        for ids in example:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def digest_model(model: Any) -> str:
    """SHA-256 of a model: the name, type, shape and bytes of each weight, and the config but for its origin."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _checksum(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.float32).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass
class ReferenceCache:
    """The files of one reference model, computed in one way.

    Args:
        folder (`Path`): Where they are; made when the first one is written.
        reference (`str`): `digest_model` of the reference.
        method (`dict`): What else the values depend on: precision, device, versions.

    Attributes:
        found (`int`): How often `get` found its file.
        computed (`int`): How often it did not.
    """

    folder: Path
    reference: str
    method: dict[str, Any]
    found: int = 0
    computed: int = 0

    def path_of(self, rows: Any) -> tuple[Path, str]:
        """The file of `rows`, and the key that stands in it."""
        identity = [_FORMAT, digest_rows(rows), self.reference, self.method]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key[:32]}.safetensors", key

    def get(self, rows: Any, compute: Callable[[], Values], is_main: bool = True) -> Values:
        """The values of `rows`: from the file if it is whole, else by `compute`, whose result is then kept.

        Every process of several must call it: `compute` may gather over them, and only the main one touches files.
        """
        path, key = self.path_of(rows)
        values = self._read(path, key, len(rows)) if is_main else None
        values = _from_main(values)
        if values is not None:
            self.found += 1
            return values
        self.computed += 1
        # As they will be read, so that a run that finds them and the run that made them are the same.
        values = {name: np.asarray(column, dtype=np.float32).tolist() for name, column in compute().items()}
        if is_main:
            self._write(path, key, values)
        return values

    def _read(self, path: Path, key: str, count: int) -> Values | None:
        if not path.is_file():
            return None
        try:
            return _read_values(path, key, count)
        except (OSError, ValueError) as damage:
            logger.warning("%s: %s; the reference's log-probabilities are computed anew", path, damage)
            return None

    def _write(self, path: Path, key: str, values: Values) -> None:
        from safetensors.torch import save

        tensors = {name: torch.tensor(values[name], dtype=torch.float32) for name in COLUMNS}
        checksum = _checksum([tensors[name].numpy() for name in COLUMNS])
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_hashed(temporary, [save(tensors, {"key": key, "checksum": checksum})])
            os.replace(temporary, path)
        except OSError as error:  # they are in memory: only a later run misses them
            with contextlib.suppress(OSError):
                temporary.unlink()
            logger.warning("%s: not kept, so that the next run computes it again: %s", path, error)


def _read_values(path: Path, key: str, count: int) -> Values:
    """The values in a cache file.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if names != set(COLUMNS):
                raise ValueError(f"holds {', '.join(sorted(names)) or 'nothing'}, expected {', '.join(COLUMNS)}")
            arrays = [file.get_tensor(name) for name in COLUMNS]
    except SafetensorError as error:
        raise ValueError(f"damaged ({error})") from None
    if metadata.get("key") != key:
        raise ValueError("made of other rows or by another reference")
    if any(array.shape != (count,) for array in arrays):
        raise ValueError(f"holds {arrays[0].size} and {arrays[1].size} values for {count} pairs")
    if _checksum(arrays) != metadata.get("checksum"):
        raise ValueError("damaged (its content does not match its checksum)")
    return {name: array.astype(np.float32).tolist() for name, array in zip(COLUMNS, arrays, strict=True)}


def _from_main(values: Values | None) -> Values | None:
    """What the main process has, on every process."""
    from accelerate.utils import broadcast_object_list

    (values,) = broadcast_object_list([values])
    return values
