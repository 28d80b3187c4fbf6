"""Sampling of responses: a short loop over the model's own forward, several times lighter than `generate` here.

It differs from `model.generate` in what PPO needs: the draws are a pure function of a seed (so a resumed run samples
the same responses), each row's draws do not depend on the other rows, rows that have ended leave the batch, and what
is suppressed in sampling is known to the log-probabilities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_scratch_gpt.alignment.ppo.models import keeps_logits
from hf_scratch_gpt.model.cache_name import cache_argument

# Finite, so that p·log p of a suppressed token is 0 and not NaN.
SUPPRESSED_LOGIT = -1e9


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Positions that count only real tokens, so that left padding does not shift a prompt."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def suppress(logits: Tensor, suppressed_ids: Tensor) -> Tensor:
    """`logits` (..., V) with the suppressed tokens' set so low that their probability is 0."""
    return logits.index_fill(-1, suppressed_ids, SUPPRESSED_LOGIT) if len(suppressed_ids) else logits


@dataclass
class Responses:
    """Sampled responses, padded on the right.

    Attributes:
        ids (`Tensor`): Token ids (B, T), the end token included.
        mask (`Tensor`): 1.0 on the response's tokens (B, T), up to and with the end token, whatever their ids are.
        ended (`Tensor`): Whether the response has an end token (B), boolean.
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One token a row by inversion of the cumulative distribution: one uniform number a row, not one a token."""
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    # Strictly below the total, so that rounding can never choose past the last token with any probability.
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:] * (1 - 2**-20)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


@torch.no_grad()
def sample_responses(
    model: torch.nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    end_ids: Tensor,
    suppressed_ids: Tensor,
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Responses:
    """Sample one response for each left-padded prompt (B, P); stops when every row has ended.

    Memory is that of a key-value cache of the rows that are still running.
    """
    device = prompt_ids.device
    batch, prompt_length = prompt_ids.shape
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(batch, max_new_tokens, generator=generator).to(device)
    ids = torch.full((batch, max_new_tokens), pad_id, dtype=torch.long, device=device)
    lengths = torch.full((batch,), max_new_tokens, dtype=torch.long, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)

    rows = torch.arange(batch, device=device)  # the rows that the cache still holds
    attention = torch.cat([prompt_mask, prompt_mask.new_ones(batch, max_new_tokens)], dim=1)
    positions = position_ids_of(attention)
    cache = DynamicCache(config=model.config)
    cached = {cache_argument(model): cache, "use_cache": True}
    keep_last = {"logits_to_keep": 1} if keeps_logits(model) else {}
    inputs, step_positions = prompt_ids, positions[:, :prompt_length]
    for step in range(max_new_tokens):
        logits = model(
            input_ids=inputs,
            attention_mask=attention[rows, : prompt_length + step],
            position_ids=step_positions,
            **cached,
            **keep_last,
        ).logits[:, -1]
        tokens = _draw(suppress(logits, suppressed_ids), uniforms[rows, step], temperature)
        running = ~ended[rows]
        ids[rows[running], step] = tokens[running]
        newly_ended = rows[running & torch.isin(tokens, end_ids)]
        ended[newly_ended] = True
        lengths[newly_ended] = step + 1
        running = ~ended[rows]
        if not running.any():
            break
        if running.float().mean() < 0.8:  # copying the cache pays once a fifth of its rows are idle
            keep = running.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            rows, tokens = rows[keep], tokens[keep]
        inputs, step_positions = tokens.unsqueeze(-1), positions[rows, prompt_length + step].unsqueeze(-1)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(-1)
    return Responses(ids[:, :longest], mask.float(), ended)
