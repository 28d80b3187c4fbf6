"""Batches of windows into which documents were packed whole (see `packing`), a pure function of (seed, step, rank).

A document is read as it is in contiguous windows: behind a separator at position 0, and up to the separator that ends
it. So the tokens that a piece begins behind, and not its last one, are `input_ids`, and the piece itself is what is to
be predicted: in an epoch each token of the text, each separator too, is a target exactly once. `labels` are therefore
given, already shifted, and -100 in the padding that fills a window up, which is a document of its own to the model.

Each epoch takes the same windows in an order of its own. A process's plan takes 12 bytes of memory a piece and 12 a
window.
"""

from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.data.loader import mixture_shares, sample_numbers, shuffled_index, source_parts, source_seed
from hf_scratch_gpt.data.masking import IGNORED
from hf_scratch_gpt.data.mixture import MixtureWeights, Turns
from hf_scratch_gpt.data.packing import PackingPlan, plan_windows
from hf_scratch_gpt.data.shards import TokenShards

_WHOLE = "all"  # the name of the only part of shards that are not mixed


class PackedWindows:
    """Packed windows of a split, or of several of its sources with a share of the tokens each.

    Args:
        shards (`TokenShards`): The split to read.
        context_length (`int`): Tokens of a window.
        shares (`dict[str, float]`, *optional*): Share of the training tokens, padding left out, of each source (see
            `parse_mixture`); without, every document is seen equally often.
        padding_id (`int`, *optional*): Fills windows up; the separator if not given.

    Attributes:
        plans (`list[PackingPlan]`): Of each source, or of the whole split.

    Raises:
        ValueError: if the shards have no index of their documents, do not tell their sources, or a source has no
            documents.
    """

    def __init__(
        self,
        shards: TokenShards,
        context_length: int,
        shares: dict[str, float] | None = None,
        padding_id: int | None = None,
    ):
        self._shards, self.context_length, self._is_mixed = shards, context_length, shares is not None
        self._padding_id = shards.separator_id if padding_id is None else padding_id
        parts: list[dict[str, Any]]
        if shares is None:
            shares, parts = {_WHOLE: 1.0}, [{"source": _WHOLE, "start": 0, "tokens": len(shards)}]
        else:
            parts = source_parts(shards, shares)
        self._names = [part["source"] for part in parts]
        self._weights = [shares[name] for name in self._names]
        self.plans = _plan_parts(shards, context_length, parts)
        # Windows of another source may have more padding: it is the tokens that have the shares.
        windows = [weight * plan.windows / plan.tokens for weight, plan in zip(self._weights, self.plans, strict=True)]
        self._turns = Turns(tuple(share / sum(windows) for share in windows))

    def batch(
        self,
        batch_size: int,
        seed: int,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        respect_documents: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The batch of a step on a rank: a pure function of its arguments.

        Args:
            batch_size (`int`): Windows of this rank; as many processes share what one would take.
            seed (`int`): Seed of the order.
            step (`int`): Number of the batch, from 0; epochs follow each other without a gap.
            rank, world_size (`int`, *optional*, defaults to `0` and `1`): This process among all.
            respect_documents (`bool`, *optional*, defaults to `True`): Restart positions at documents; else they
                count on.

        Returns:
            `dict`: `input_ids`, `position_ids` and `labels`, int64 of shape (batch_size, context_length).
        """
        sources, windows = self._locate(sample_numbers(batch_size, step, rank, world_size), seed)
        shape = (batch_size, self.context_length)
        input_ids, labels = np.full(shape, self._padding_id, np.int64), np.full(shape, IGNORED, np.int64)
        position_ids = np.broadcast_to(np.arange(self.context_length), shape).copy()
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            at = 0
            for start, length in self.plans[source].pieces(window):
                tokens, place = self._read(start, length), slice(at, at + length)
                input_ids[row, place], labels[row, place] = tokens[:-1], tokens[1:]
                if respect_documents:
                    position_ids[row, place] = np.arange(length)
                at += length
            if respect_documents:
                position_ids[row, at:] = np.arange(self.context_length - at)
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def count_padding(self, batch_size: int, seed: int, step: int) -> int:
        """Padding in the batch of a step, that of all ranks if `batch_size` is, in tokens; reads no text."""
        sources, windows = self._locate(sample_numbers(batch_size, step), seed)
        filled = sum(int(self.plans[source].filled[windows[sources == source]].sum()) for source in np.unique(sources))
        return batch_size * self.context_length - filled

    def usage(self, samples: int, seed: int) -> dict[str, Any]:
        """What the first `samples` windows took of the text, padding left out.

        Returns:
            `dict`: `epochs`, how often that is all of the tokens; `documents_cut_share`, of documents that are longer
            than a window; and of a mixture `mixture`, for each source the same as `MixtureWindows.usage` tells.
        """
        drawn = [self._drawn(source, count, seed) for source, count in enumerate(self._turns.counts(samples))]
        documents = sum(plan.documents for plan in self.plans)
        usage: dict[str, Any] = {
            "epochs": sum(drawn) / len(self._shards),
            "documents_cut_share": sum(plan.documents_cut for plan in self.plans) / documents,
        }
        if self._is_mixed:
            usage["mixture"] = [
                {
                    "source": name,
                    "weight": weight,
                    "share": tokens / sum(drawn) if samples else 0.0,
                    "tokens": tokens,
                    "epochs": tokens / plan.tokens,
                }
                for name, weight, tokens, plan in zip(self._names, self._weights, drawn, self.plans, strict=True)
            ]
        return usage

    def _locate(self, samples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample number, and which window of that source's plan it is; int64 of the same shape."""
        sources, numbers = self._turns.locate(samples)
        windows = np.empty_like(numbers)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            windows[chosen] = self._shuffle(source, numbers[chosen], seed)
        return sources, windows

    def _shuffle(self, source: int, numbers: np.ndarray, seed: int) -> np.ndarray:
        """The window of each number among those that a source has had its turn with, in an order an epoch."""
        count, own_seed = self.plans[source].windows, source_seed(seed, source) if self._is_mixed else seed
        windows, epochs = np.empty_like(numbers), numbers // count
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            windows[chosen] = shuffled_index(numbers[chosen] % count, count, own_seed, epoch)
        return windows

    def _drawn(self, source: int, count: int, seed: int) -> int:
        """Tokens in the first `count` windows of a source."""
        plan = self.plans[source]
        epochs, rest = divmod(count, plan.windows)
        last = self._shuffle(source, np.arange(count - rest, count), seed)
        return epochs * plan.tokens + int(plan.filled[last].sum(dtype=np.int64))

    def _read(self, start: int, length: int) -> np.ndarray:
        """A piece's tokens and the one before it, (length + 1,): before a document stands a separator."""
        if start:
            return self._shards.read(start - 1, length + 1)
        return np.concatenate([[self._shards.separator_id], self._shards.read(0, length)])


def _plan_parts(shards: TokenShards, context_length: int, parts: list[dict[str, Any]]) -> list[PackingPlan]:
    """A plan for each part, whose documents follow each other; sources never share a window."""
    documents, plans = shards.document_starts(), []
    for part in parts:
        end = part["start"] + part["tokens"]
        first, last = np.searchsorted(documents, [part["start"], end])
        if first == last:
            raise ValueError(
                f"{shards.folder}: the source {part['source']} has no documents in the {shards.split} part; leave it "
                "out of 'sources', or give it more text"
            )
        if documents[first] != part["start"]:
            raise ValueError(
                f"{shards.folder}: no document begins at token {part['start']} of the {shards.split} part, where "
                "the manifest says that one does; run the stage 'prepare' again"
            )
        plans.append(plan_windows(documents[first:last], end, context_length))
    return plans


def pack_windows(
    shards: TokenShards, context_length: int, weights: MixtureWeights, padding_id: int | None = None
) -> PackedWindows:
    """Packed windows in the mixture of the given `weights`, else of those in the manifest, else of all documents.

    Raises:
        ValueError: for weights that do not fit the sources, or shards that have no index of their documents.
    """
    return PackedWindows(shards, context_length, mixture_shares(shards, weights), padding_id)
