"""Bits per byte of raw text: a loss that can be compared between tokenizers, and with gzip and xz.

Each document is tokenised alone and its first token is predicted from `<|endoftext|>`. A document longer than the
context is read in overlapping windows; each token is predicted exactly once, by the first window that reaches it.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_scratch_gpt.evaluation.intervals import Interval, bootstrap_ratio
from hf_scratch_gpt.evaluation.mode import context_length_of, measuring
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_text

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class BitsPerByte(Interval):
    """Bits per byte: `mean`, `low`, `high`, `n` documents, and the totals behind it.

    Args:
        bits (`float`): Total negative log2 likelihood.
        bytes (`int`): Total bytes of the documents in UTF-8.
        tokens (`int`): Number of tokens predicted.
    """

    bits: float = 0.0
    bytes: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class _Window:
    document: int
    token_ids: list[int]  # inputs and the last target: one more than the inputs
    predicted: int  # the last so many targets belong to this window


def separator_id(tokenizer: Any) -> int:
    """Id of the token that precedes a document: `<|endoftext|>`, or the begin or end token of a foreign tokenizer."""
    index = tokenizer.get_vocab().get(END_OF_TEXT)
    for candidate in (index, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ValueError(
        f"the tokenizer has no {END_OF_TEXT}, begin or end token to predict a document's first token from"
    )


def _split(document: int, token_ids: list[int], context_length: int, stride: int) -> Iterator[_Window]:
    """Windows over a document's ids (separator first): the first predicts all it can, later ones `stride` more."""
    targets = len(token_ids) - 1
    done = 0
    while done < targets:
        end = min(context_length if done == 0 else done + stride, targets)
        begin = max(0, end - context_length)
        yield _Window(document, token_ids[begin : end + 1], end - done)
        done = end


def _window_bits(model: Any, windows: Sequence[_Window]) -> list[float]:
    """Bits of the targets that belong to each window.

    Windows are padded on the right: under a causal mask no token sees what follows it, so no mask is needed.
    """
    width = max(len(window.token_ids) for window in windows)
    rows = torch.tensor([window.token_ids + [0] * (width - len(window.token_ids)) for window in windows])
    rows = rows.to(model.device)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    # The first position that any window predicts; the head is not computed before it.
    first = min(len(window.token_ids) - 1 - window.predicted for window in windows)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=width - 1 - first).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[:, first:].flatten(), reduction="none"
    ).view(len(windows), -1)
    ends = torch.tensor([len(window.token_ids) - 1 for window in windows], device=rows.device)[:, None]
    predicted = torch.tensor([window.predicted for window in windows], device=rows.device)[:, None]
    columns = torch.arange(first, width - 1, device=rows.device)[None]
    owned = (columns < ends) & (columns >= ends - predicted)
    return ((losses.double() * owned).sum(dim=1) / math.log(2)).tolist()


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    context_length: int | None = None,
    batch_size: int = 16,
    stride: int | None = None,
    seed: int = 0,
) -> BitsPerByte:
    """Total bits that `model` needs for `documents`, divided by their bytes in UTF-8.

    Special tokens that stand in a document are plain text. The interval comes from resampling documents.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        documents: Raw texts; empty ones are left out.
        context_length (`int`, *optional*): Longest input; defaults to the model's own context.
        batch_size (`int`, *optional*, defaults to `16`): Windows in a batch.
        stride (`int`, *optional*): New tokens that a window after the first predicts, the rest being its context;
            defaults to half of `context_length`. A smaller stride gives each token more context and costs more.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        ValueError: if there is no text, or `context_length` or `stride` are out of range.
    """
    context_length = context_length or context_length_of(model) or 1024
    stride = stride or max(1, context_length // 2)
    if not 1 <= stride <= context_length:
        raise ValueError(f"expected 1 <= stride <= context_length, found stride {stride} of {context_length}")
    texts = [text for text in documents if text]
    if not texts:
        raise ValueError(f"no text to measure: all {len(documents)} documents are empty")
    separator = separator_id(tokenizer)
    windows: list[_Window] = []
    for index, text in enumerate(texts):
        windows += _split(index, [separator, *encode_text(tokenizer, text)], context_length, stride)
    windows.sort(key=lambda window: (len(window.token_ids), window.predicted))
    bits = [0.0] * len(texts)
    with measuring(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for window, value in zip(batch, _window_bits(model, batch), strict=True):
                bits[window.document] += value
    sizes = [len(text.encode("utf-8")) for text in texts]
    interval = bootstrap_ratio(bits, sizes, seed)
    return BitsPerByte(
        interval.mean,
        interval.low,
        interval.high,
        interval.n,
        bits=sum(bits),
        bytes=sum(sizes),
        tokens=sum(window.predicted for window in windows),
    )
