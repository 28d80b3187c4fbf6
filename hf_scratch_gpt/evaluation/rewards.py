"""What a reward model says of whole conversations, and the scale on which it says it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_scratch_gpt.evaluation.mode import context_length_of, measuring
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation


@dataclasses.dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of a reward model's scores of reference answers.

    The ranking loss leaves a model's zero and unit free; on this scale a reference answer scores 0 on average, and a
    deviation is 1. Whatever optimises or compares rewards (PPO, best-of-n) normalises by it.
    """

    mean: float = 0.0
    std: float = 1.0

    def normalise(self, scores: Any) -> Any:
        """(score - mean) / deviation, of a number, a tensor or an array."""
        return (scores - self.mean) / self.std


def reward_scale_of(config: Any, source: str) -> RewardScale:
    """The scale that a reward model's config carries: `reward_mean` and `reward_std`, 0 and 1 where it has none.

    Raises:
        ValueError: naming `source`, for numbers that nothing can be normalised by.
    """
    scale = RewardScale(float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0)))
    if not (math.isfinite(scale.mean) and math.isfinite(scale.std) and scale.std > 0):
        raise ValueError(
            f"reward model {source}: reward_mean {scale.mean}, reward_std {scale.std}; expected a std > 0"
        )
    return scale


def score_conversations(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[dict[str, Any]]], batch_size: int = 32
) -> list[float]:
    """The reward model's score of each conversation, answer included, as the chat template renders it.

    Args:
        model: A sequence-classification model with one label.
        tokenizer: Its tokenizer.
        conversations: Lists of messages that end with the assistant's.

    Raises:
        ValueError: if a conversation is longer than the model's context.
    """
    encoded = [list(encode_conversation(tokenizer, list(messages))["input_ids"]) for messages in conversations]
    limit = context_length_of(model)
    for index, token_ids in enumerate(encoded):
        if limit is not None and len(token_ids) > limit:
            raise ValueError(f"conversation {index}: {len(token_ids)} tokens, the reward model's context is {limit}")
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    scores = [0.0] * len(encoded)
    padding = model.config.pad_token_id if model.config.pad_token_id is not None else tokenizer.pad_token_id
    with measuring(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(encoded[index]) for index in chosen)
            lengths = torch.tensor([len(encoded[index]) for index in chosen])[:, None]
            rows = [encoded[index] + [padding] * (width - len(encoded[index])) for index in chosen]
            output = model(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=(torch.arange(width)[None] < lengths).long().to(model.device),
            )
            for index, score in zip(chosen, output.logits[:, 0].float().tolist(), strict=True):
                scores[index] = score
    return scores
