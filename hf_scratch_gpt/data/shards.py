"""Token shards: the documents' token ids one after another, in files of a fixed number of tokens.

    <folder>/manifest.json            sizes and checksums of everything, written last
    <folder>/train/shard-00000.bin    little-endian uint16, or uint32 for vocabularies above 65,536
    <folder>/heldout/shard-00000.bin

After each document stands one separator, `<|endoftext|>`, and nowhere else: text that contains the words
`<|endoftext|>` is encoded as plain text.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf_scratch_gpt.runs import read_json

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
SEPARATOR = "<|endoftext|>"
_BATCH_CHARACTERS = 1_000_000


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id: uint16 or uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Digest of a fast tokenizer's rules and vocabulary; two tokenizers with the same one give the same ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def separator_id(tokenizer: Any) -> int:
    """Id of the document separator: `<|endoftext|>`, or the end token of a tokenizer that has none.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    vocabulary = tokenizer.get_added_vocab()
    if SEPARATOR in vocabulary:
        return vocabulary[SEPARATOR]
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer has neither {SEPARATOR} nor an end token to separate documents with")
    return tokenizer.eos_token_id


def encode_documents(tokenizer: Any, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids of each text, in which control tokens are plain text; in batches of a megabyte, on all cores."""
    from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_texts

    dtype = token_dtype(len(tokenizer))
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield from (np.array(ids, dtype) for ids in encode_texts(tokenizer, batch))
            batch, size = [], 0
    yield from (np.array(ids, dtype) for ids in encode_texts(tokenizer, batch))


class ShardWriter:
    """Writes one split's documents as shards; `close` returns the split's entry for the manifest.

    Args:
        folder (`Path`): Folder of the split; created, must not hold shards already.
        dtype (`np.dtype`): Type of a token on disk.
        separator (`int`): Id written after each document.
        shard_tokens (`int`): Tokens of a shard; the last one may have fewer.
    """

    def __init__(self, folder: Path, dtype: np.dtype, separator: int, shard_tokens: int):
        if shard_tokens < 1:
            raise ValueError(f"'shard_tokens' is {shard_tokens}, expected at least 1")
        folder.mkdir(parents=True)
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self._separator = np.array([separator], dtype)
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._room = 0
        self.tokens = self.documents = self.bytes = 0

    def add(self, ids: np.ndarray, size: int) -> None:
        """Append a document of `size` bytes of text and the separator.

        Raises:
            ValueError: if the ids contain the separator, which would tear the document apart.
        """
        if (ids == self._separator).any():
            raise ValueError(f"a document's tokens contain the separator, id {self._separator[0]}: encode it as text")
        for part in (ids.astype(self.dtype, copy=False), self._separator):
            self._append(part)
        self.documents += 1
        self.bytes += size

    def _append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._room == 0:
                self._open_next()
            part, ids = ids[: self._room], ids[self._room :]
            assert self._file is not None
            content = part.tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._room -= len(part)
            self.tokens += len(part)
            self._shards[-1]["tokens"] += len(part)

    def _open_next(self) -> None:
        self._finish_shard()
        name = f"shard-{len(self._shards):05d}.bin"
        self._file = open(self.folder / name, "wb")  # noqa: SIM115  # closed by `_finish_shard`
        self._digest = hashlib.sha256()
        self._shards.append({"name": name, "tokens": 0, "sha256": ""})
        self._room = self.shard_tokens

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._shards[-1]["sha256"] = self._digest.hexdigest()

    def close(self) -> dict[str, Any]:
        """Flush the last shard to disk and return tokens, documents, bytes and shards."""
        self._finish_shard()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self._shards}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        FileNotFoundError: if the folder is not one, or was not finished.
        ValueError: if the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no prepared tokens here (no {MANIFEST}); run the stage 'prepare' first")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "splits" not in manifest:
        raise ValueError(f"{path}: not the manifest of prepared tokens (no 'splits')")
    return manifest


class TokenShards:
    """The tokens of one split, memory-mapped.

    Args:
        folder (`str` or `Path`): A prepared folder.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"heldout"`.
        verify (`bool`, *optional*, defaults to `True`): Compare checksums; sizes are always compared.

    Attributes:
        manifest (`dict`): The folder's manifest.
        separator_id (`int`): Id that follows each document.
        total_bytes, total_documents (`int`): Of the split's text.

    Raises:
        FileNotFoundError: if the folder is not a prepared one or a shard is missing.
        ValueError: if a shard is damaged, naming it, or the split does not exist.
    """

    def __init__(self, folder: str | Path, split: str = "train", verify: bool = True):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(folder)
        if split not in self.manifest["splits"]:
            raise ValueError(f"{folder}: no split '{split}'; it has {', '.join(self.manifest['splits'])}")
        entry = self.manifest["splits"][split]
        self.separator_id: int = self.manifest["separator_id"]
        self.total_bytes, self.total_documents = entry["bytes"], entry["documents"]
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._shards = [self._open(shard, verify) for shard in entry["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def _open(self, shard: dict[str, Any], verify: bool) -> np.ndarray:
        path = self.folder / self.split / shard["name"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this token shard is missing; run the stage 'prepare' again")
        size, expected = path.stat().st_size, shard["tokens"] * self._dtype.itemsize
        if size != expected:
            raise ValueError(f"{path}: {size} bytes, expected {expected}; run the stage 'prepare' again")
        tokens = np.memmap(path, self._dtype, mode="r")
        if verify and hashlib.sha256(tokens.data).hexdigest() != shard["sha256"]:
            raise ValueError(f"{path}: content does not match its checksum; run the stage 'prepare' again")
        return tokens

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """The tokens `start` to `start + length`, across shards, shape (length,).

        Raises:
            IndexError: if they are not all there.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        index = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while length > 0:
            offset = start - (int(self._ends[index - 1]) if index else 0)
            parts.append(self._shards[index][offset : offset + length])
            start, length, index = start + len(parts[-1]), length - len(parts[-1]), index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self._dtype)
