"""How well a masked language model fills in held-out text, under a mask that is the same for every model and run.

Each document is tokenised alone, after a separator as in training, and cut into windows of about equal length. 15% of
the ordinary tokens of a window are chosen, by its content alone, and all are shown as the mask token: BERT's 10% kept
and 10% random tokens (https://arxiv.org/abs/1810.04805) are for training, and would make the measure too easy.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.data.masking import IGNORED, TokenMasker
from hf_scratch_gpt.data.shards import TokenShards
from hf_scratch_gpt.evaluation.intervals import Interval, bootstrap_ratio
from hf_scratch_gpt.evaluation.mode import measuring
from hf_scratch_gpt.evaluation.text import separator_id
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_text

_COUNTED_TOKENS = 2**24  # enough to know the most frequent token of any corpus


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """How well the masked tokens of documents are predicted; intervals come from resampling documents.

    Args:
        loss (`Interval`): Nats a masked token.
        accuracy (`Interval`): Share of masked tokens whose likeliest prediction is right.
        baseline_accuracy (`Interval`): The same if one token is always predicted.
        tokens (`int`): Masked tokens.
    """

    loss: Interval
    accuracy: Interval
    baseline_accuracy: Interval
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Window:
    document: int
    input_ids: np.ndarray  # (length,), int64, with the chosen tokens masked
    labels: np.ndarray  # (length,)

    @property
    def targets(self) -> np.ndarray:
        """Ids of the masked tokens."""
        return self.labels[self.labels != IGNORED]


def most_frequent_token(shards: TokenShards, masker: TokenMasker) -> int:
    """Id of the most frequent ordinary token among the first 16 million of a split: what to say knowing nothing."""
    tokens = shards.read(0, min(len(shards), _COUNTED_TOKENS))
    counts = np.bincount(tokens, minlength=len(masker.is_ordinary))
    return int(np.argmax(np.where(masker.is_ordinary, counts[: len(masker.is_ordinary)], -1)))


def _windows(masker: TokenMasker, document: int, token_ids: list[int], context_length: int) -> list[_Window]:
    ids = np.asarray(token_ids, np.int64)
    windows = []
    for part in np.array_split(ids, -(-len(ids) // context_length)):
        chosen = masker.choose(part, np.random.default_rng(zlib.crc32(part.astype("<i8").tobytes())))
        labels, hidden = np.full(len(part), IGNORED), part.copy()
        labels[chosen], hidden[chosen] = part[chosen], masker.mask_id
        windows.append(_Window(document, hidden, labels))
    return windows


def _score(model: Any, windows: Sequence[_Window]) -> list[tuple[float, int]]:
    """Summed loss in nats and number of right predictions of each window."""
    width = max(len(window.input_ids) for window in windows)
    input_ids, labels = torch.zeros(len(windows), width).long(), torch.full((len(windows), width), IGNORED)
    attention_mask = torch.zeros_like(input_ids)
    for row, window in enumerate(windows):
        length = len(window.input_ids)
        input_ids[row, :length] = torch.from_numpy(window.input_ids)
        labels[row, :length] = torch.from_numpy(window.labels)
        attention_mask[row, :length] = 1
    labels = labels.to(model.device)
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)
    logits = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
    chosen, targets = logits[rows, columns].float(), labels[rows, columns]
    losses = torch.nn.functional.cross_entropy(chosen, targets, reduction="none").double()
    right = (chosen.argmax(-1) == targets).double()
    totals = torch.zeros(2, len(windows), dtype=torch.float64, device=model.device)
    totals = totals.index_add(1, rows, torch.stack([losses, right]))
    return [(loss, round(count)) for loss, count in totals.T.tolist()]


def masked_tokens(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    context_length: int,
    batch_size: int = 16,
    baseline_token: int | None = None,
    seed: int = 0,
) -> MaskedTokens:
    """Loss and accuracy of `model` on the masked tokens of `documents`.

    Args:
        model: A masked language model of transformers.
        tokenizer: Its tokenizer.
        documents: Raw texts, control tokens in them plain text; empty ones are left out.
        context_length (`int`): Longest window, in tokens.
        batch_size (`int`, *optional*, defaults to `16`): Windows in a batch.
        baseline_token (`int`, *optional*): What the baseline always predicts; by default the most frequent target.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap; the mask does not depend on it.

    Raises:
        ValueError: if there is no text, or the tokenizer has no mask token.
    """
    masker, separator = TokenMasker(tokenizer), separator_id(tokenizer)
    texts = [text for text in documents if text]
    if not texts:
        raise ValueError(f"no text to measure: all {len(documents)} documents are empty")
    windows: list[_Window] = []
    for index, text in enumerate(texts):
        windows += _windows(masker, index, [separator, *encode_text(tokenizer, text)], context_length)
    windows.sort(key=lambda window: len(window.input_ids))
    if baseline_token is None:
        baseline_token = int(np.bincount(np.concatenate([window.targets for window in windows])).argmax())
    totals = np.zeros((4, len(texts)))  # loss, right, right of the baseline, tokens
    with measuring(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for window, (loss, right) in zip(batch, _score(model, batch), strict=True):
                wanted = window.targets
                totals[:, window.document] += (loss, right, (wanted == baseline_token).sum(), len(wanted))
    totals = totals[:, totals[3] > 0]  # a document of control tokens alone has nothing to mask
    names = ("loss", "accuracy", "baseline_accuracy")
    intervals = {
        name: bootstrap_ratio(row.tolist(), totals[3].tolist(), seed)
        for name, row in zip(names, totals[:3], strict=True)
    }
    return MaskedTokens(tokens=int(totals[3].sum()), **intervals)
