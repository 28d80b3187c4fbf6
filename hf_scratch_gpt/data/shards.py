"""Token shards: the documents' token ids one after another, in files of a fixed number of tokens.

    <folder>/manifest.json            sizes and checksums of everything, written last
    <folder>/train/shard-00000.bin    little-endian uint16, or uint32 for vocabularies above 65,536
    <folder>/train/shard-00000.starts.npy   where in the shard a document begins, uint64, ascending
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

from hf_scratch_gpt.data.manifest import PREPARE_AGAIN, read_manifest
from hf_scratch_gpt.runs.checkpoints import hash_file

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
        entry (`dict`, *optional*): What `flush` returned to an earlier writer of this folder, to go on from: its
            shards are verified and kept, and what was written after it is removed.

    Raises:
        ValueError: for `shard_tokens` below 1; if a shard of `entry` is missing or damaged, naming it.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        separator: int,
        shard_tokens: int,
        entry: dict[str, Any] | None = None,
    ):
        if shard_tokens < 1:
            raise ValueError(f"'shard_tokens' is {shard_tokens}, expected at least 1")
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self._separator = np.array([separator], dtype)
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._starts: list[np.ndarray] = []  # of the open shard
        self._room = 0
        self._at_start = True  # the next token begins a document
        self.tokens = self.documents = self.bytes = 0
        if entry is None:
            folder.mkdir(parents=True)
        else:
            self._take_up(entry)

    def add(self, ids: np.ndarray, size: int) -> None:
        """Append a document of `size` bytes of text and the separator.

        Raises:
            ValueError: if the ids contain the separator, which would tear the document apart.
        """
        self.extend(np.concatenate([ids.astype(self.dtype, copy=False), self._separator]), 1, size)

    def extend(self, tokens: np.ndarray, documents: int, size: int) -> None:
        """Append several documents of `size` bytes of text in all, each already followed by its separator.

        Args:
            tokens (`np.ndarray`): Of shape (tokens,), in the type on disk.
            documents (`int`): How many they are.

        Raises:
            ValueError: if a document contains the separator, which would tear it apart.
        """
        if not documents:
            return
        if np.count_nonzero(tokens == self._separator) != documents or tokens[-1] != self._separator[0]:
            raise ValueError(f"a document's tokens contain the separator, id {self._separator[0]}: encode it as text")
        while len(tokens):
            if self._room == 0:
                self._open_next()
            part, tokens = tokens[: self._room], tokens[self._room :]
            self._append(part)
        self.documents += documents
        self.bytes += size

    def _append(self, part: np.ndarray) -> None:
        assert self._file is not None
        shard = self._shards[-1]
        self._note_starts(part)
        content = part.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._room -= len(part)
        self.tokens += len(part)
        shard["tokens"] += len(part)
        if self._room == 0:
            self._finish_shard()

    def _note_starts(self, part: np.ndarray) -> None:
        """A document begins behind each separator, and at the very beginning."""
        separators = np.flatnonzero(part == self._separator).astype(np.uint64)
        starts = separators[: len(separators) - int(part[-1] == self._separator[0])] + np.uint64(1)
        if self._at_start:
            starts = np.concatenate([np.zeros(1, np.uint64), starts])
        self._starts.append(starts + np.uint64(self._shards[-1]["tokens"]))
        self._at_start = bool(part[-1] == self._separator[0])

    def _open_next(self) -> None:
        name = f"shard-{len(self._shards):05d}"
        self._file = open(self.folder / f"{name}.bin", "wb")  # noqa: SIM115  # closed by `_finish_shard`
        self._digest = hashlib.sha256()
        self._starts = []
        self._shards.append({"name": f"{name}.bin", "tokens": 0, "sha256": ""})
        self._room = self.shard_tokens

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        _flush_and_close(self._file)
        self._file, self._room = None, 0
        shard = self._shards[-1]
        starts = np.concatenate([np.empty(0, "<u8"), *self._starts]).astype("<u8")
        path = self.folder / shard["name"].replace(".bin", ".starts.npy")
        with open(path, "wb") as file:
            np.save(file, starts, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        shard["sha256"] = self._digest.hexdigest()
        shard["starts"] = {"name": path.name, "documents": len(starts), "sha256": hash_file(path)}

    def flush(self) -> dict[str, Any]:
        """Bring all to the disk; returns what a later writer needs to go on from here, as plain JSON values."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        sizes = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {**sizes, "shards": [dict(shard) for shard in self._shards]}

    @property
    def finished_shards(self) -> int:
        """Shards that are complete on the disk."""
        return len(self._shards) - (self._file is not None)

    def _take_up(self, entry: dict[str, Any]) -> None:
        self._shards = [dict(shard) for shard in entry["shards"]]
        self.tokens, self.documents, self.bytes = (entry[name] for name in ("tokens", "documents", "bytes"))
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = set()
        for shard in self._shards:
            if shard["sha256"]:
                open_shard(self.folder, shard, self.dtype, verify=True)
                kept |= {shard["name"], shard["starts"]["name"]}
        if self._shards and not self._shards[-1]["sha256"]:
            self._take_up_open_shard()
            kept.add(self._shards[-1]["name"])
        self._at_start = True  # notes are taken between documents
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _take_up_open_shard(self) -> None:
        """Cut the shard that was being written to what was noted of it; its documents end in separators."""
        shard = self._shards[-1]
        path, size = self.folder / shard["name"], shard["tokens"] * self.dtype.itemsize
        if not path.is_file() or path.stat().st_size < size:
            raise ValueError(f"{path}: missing or shorter than the {size} bytes that were written")
        self._file = open(path, "r+b")  # noqa: SIM115  # closed by `_finish_shard`
        content = self._file.read(size)
        self._file.truncate(size)
        self._digest = hashlib.sha256(content)
        self._room = self.shard_tokens - shard["tokens"]
        shard["tokens"] = 0
        self._starts = []
        # Only a shard that begins a document, or that goes on with one, may have been noted: the writer was between
        # documents then, so what precedes the shard tells which.
        self._at_start = len(self._shards) == 1 or self._ends_with_separator(self._shards[-2])
        tokens = np.frombuffer(content, self.dtype)
        if len(tokens):
            self._note_starts(tokens)
        shard["tokens"] = len(tokens)

    def _ends_with_separator(self, shard: dict[str, Any]) -> bool:
        return bool(open_shard(self.folder, shard, self.dtype, verify=False)[-1] == self._separator[0])

    def close(self) -> dict[str, Any]:
        """Flush the last shard to disk and return tokens, documents, bytes and shards."""
        self._finish_shard()
        return self.flush()


def _flush_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def open_shard(folder: Path, shard: dict[str, Any], dtype: np.dtype, verify: bool) -> np.ndarray:
    """The tokens of one shard of a split's `folder`, memory-mapped, shape (tokens,).

    Args:
        shard (`dict`): Its entry of the manifest.
        verify (`bool`): Compare checksums, of the index of its documents too; sizes are always compared.

    Raises:
        FileNotFoundError: if it or its index is missing.
        ValueError: if one of them is damaged, naming it.
    """
    path = folder / shard["name"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this token shard is missing; {PREPARE_AGAIN}")
    size, expected = path.stat().st_size, shard["tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected}; {PREPARE_AGAIN}")
    tokens = np.memmap(path, dtype, mode="r")
    if verify and hashlib.sha256(tokens.data).hexdigest() != shard["sha256"]:
        raise ValueError(f"{path}: content does not match its checksum; {PREPARE_AGAIN}")
    if "starts" in shard:
        _check_starts(folder / shard["starts"]["name"], shard["starts"], verify)
    return tokens


def _check_starts(path: Path, entry: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this index of documents is missing; {PREPARE_AGAIN}")
    size, least = path.stat().st_size, 8 * entry["documents"]
    if size < least:
        raise ValueError(f"{path}: {size} bytes, expected over {least}; {PREPARE_AGAIN}")
    if verify and hash_file(path) != entry["sha256"]:
        raise ValueError(f"{path}: content does not match its checksum; {PREPARE_AGAIN}")


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
        sources (`list[dict]`): For each source its `source`, `start` (its first token), `tokens` and `documents`:
            the sources follow each other. Empty for shards of an earlier version.

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
        self._entries = entry["shards"]
        self._shards = [open_shard(self.folder / split, shard, self._dtype, verify) for shard in self._entries]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.sources: list[dict[str, Any]] = entry.get("sources", [])

    def document_starts(self) -> np.ndarray:
        """Where each document begins, ascending token numbers, int64 of shape (documents,).

        Raises:
            ValueError: for shards of an earlier version, which have no such index.
        """
        found = []
        for shard, end in zip(self._entries, self._ends, strict=True):
            if "starts" not in shard:
                raise ValueError(f"{self.folder}: has no index of its documents; {PREPARE_AGAIN}")
            starts = np.load(self.folder / self.split / shard["starts"]["name"], allow_pickle=False)
            found.append(starts.astype(np.int64) + (int(end) - shard["tokens"]))
        return np.concatenate(found)

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
