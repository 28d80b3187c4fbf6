"""Held-out measures of tuned models, each answer and token counted once: no means of batch means."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hf_scratch_gpt.evaluation.mode import measuring


@dataclasses.dataclass
class AnswerScore:
    """Log-probability (nats) of an answer's trained tokens, their number, and how many were the likeliest token."""

    log_probability: float
    tokens: int
    correct: int


def pad_rows(rows: Sequence[list[int]], value: int, device: Any = None) -> torch.Tensor:
    """Rows of ids as a tensor, padded on the right with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def score_answers(
    model: Any, input_ids: Sequence[list[int]], labels: Sequence[list[int]], pad_token_id: int, batch_size: int
) -> list[AnswerScore]:
    """Score each row's labelled tokens (label != -100) under a causal language model, in the rows' order."""
    scores: list[AnswerScore] = [AnswerScore(0.0, 0, 0)] * len(input_ids)
    with measuring(model):
        for batch in _by_length([len(row) for row in input_ids], batch_size):
            ids = pad_rows([input_ids[index] for index in batch], pad_token_id, model.device)
            targets = pad_rows([labels[index] for index in batch], -100, model.device)[:, 1:]
            mask = pad_rows([[1] * len(input_ids[index]) for index in batch], 0, model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            trained = targets != -100
            chosen = logits[trained].float()
            row_of = trained.nonzero()[:, 0]
            log_probabilities = -torch.nn.functional.cross_entropy(chosen, targets[trained], reduction="none")
            correct = (chosen.argmax(-1) == targets[trained]).double()
            totals = torch.zeros(3, len(batch), dtype=torch.float64, device=ids.device)
            for row, values in enumerate((log_probabilities.double(), torch.ones_like(correct), correct)):
                totals[row].index_add_(0, row_of, values)
            for index, (log_probability, tokens, hits) in zip(batch, totals.T.tolist(), strict=True):
                scores[index] = AnswerScore(log_probability, int(tokens), int(hits))
    return scores


def score_rewards(model: Any, input_ids: Iterable[list[int]], pad_token_id: int, batch_size: int) -> list[float]:
    """The reward of each row under a model with one label, in the rows' order."""
    rows = list(input_ids)
    rewards = [0.0] * len(rows)
    with measuring(model):
        for batch in _by_length([len(row) for row in rows], batch_size):
            ids = pad_rows([rows[index] for index in batch], pad_token_id, model.device)
            mask = pad_rows([[1] * len(rows[index]) for index in batch], 0, model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for index, reward in zip(batch, logits[:, 0].float().tolist(), strict=True):
                rewards[index] = reward
    return rewards
