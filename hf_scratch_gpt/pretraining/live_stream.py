"""Training from a stream (see `data.streaming`): which one, and where in it a run stands."""

from typing import Any

import torch

from hf_scratch_gpt.pretraining.arguments import PretrainArguments
from hf_scratch_gpt.pretraining.checkpointing import TrainingState
from hf_scratch_gpt.pretraining.setup import Dataset


def make_stream(arguments: PretrainArguments, dataset: Dataset) -> Any:
    """The `StreamWindows` of `arguments.stream`, or `None` for a run that reads shards.

    Raises:
        FileNotFoundError: if a source is a path that does not exist.
        ValueError: if the prepared folder does not tell its filters.
    """
    if not arguments.stream:
        return None
    from hf_scratch_gpt.data.sources import source_parts
    from hf_scratch_gpt.data.streaming import StreamWindows, stream_cleaning

    columns = (arguments.stream_text_column, arguments.stream_split)
    for source in arguments.stream:  # a typing mistake is told now, not after the first source was read
        source_parts(source, *columns)
    return StreamWindows(
        arguments.stream,
        dataset.tokenizer,
        stream_cleaning(dataset.manifest, dataset.folder),
        dataset.heldout,
        arguments.context_length,
        arguments.batch_size,
        *columns,
    )


def read_stream(stream: Any, state: TrainingState, number: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """A rank's share of batch `number`; notes in `state` how far the stream was read, and checks what stood there.

    Raises: as `StreamWindows.batch`.
    """
    noted = state.stream
    known = (noted["batches"], noted["digest"]) if noted else None
    windows = stream.batch(number, rank, world_size, known)
    batches, digest = stream.position
    # Not back: the trial step of compiling reads an earlier batch than a run that passes over data goes on with.
    if known is None or batches > known[0]:
        state.stream = {"batches": batches, "digest": digest, "removed": dict(stream.removed)}
    return windows


def stream_usage(state: TrainingState, tokens_per_batch: int) -> dict[str, Any]:
    """What a run has read of its stream, for `metrics.json`: tokens, and what the filters left out."""
    noted = state.stream or {"batches": 0, "removed": {}}
    return {"stream_tokens": noted["batches"] * tokens_per_batch, "stream_removed": noted["removed"]}
