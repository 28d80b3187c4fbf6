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
from hf_scratch_gpt.alignment.ppo.sampling import SUPPRESSED_LOGIT, SamplingRule, first_places, pack_bits
from hf_scratch_gpt.model.cache_name import cache_argument


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Positions that count only real tokens, so that left padding does not shift a prompt."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def draw_uniforms(rows: int, max_new_tokens: int, seed: int) -> Tensor:
    """The random numbers of `rows` responses (rows, max_new_tokens): all that chance has to do with a rollout."""
    return torch.rand(rows, max_new_tokens, generator=torch.Generator().manual_seed(seed))


@dataclass
class Responses:
    """Sampled responses, padded on the right.

    Attributes:
        ids (`Tensor`): Token ids (B, T), the end token included.
        mask (`Tensor`): 1.0 on the response's tokens (B, T), up to and with the end token, whatever their ids are.
        ended (`Tensor`): Whether the response has an end token (B), boolean.
        kept (`Tensor`): `pack_bits` of the tokens that top-k, top-p and min-p kept (B, T, ⌈V/8⌉), or `None`.
    """

    ids: Tensor
    mask: Tensor
    ended: Tensor
    kept: Tensor | None = None


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One token a row by inversion of the cumulative distribution: one uniform number a row, not one a token."""
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    # Strictly below the total, so that rounding can never choose past the last token with any probability.
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:] * (1 - 2**-20)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


class _Constraints:
    """What one row's next token may be, kept up as rows are sampled and leave the batch."""

    def __init__(self, rule: SamplingRule, prompt_ids: Tensor, prompt_mask: Tensor, vocabulary: int):
        self.rule, self.first, self.kept = rule, None, None
        if rule.repetition_penalty != 1:
            self.first = first_places(prompt_ids, prompt_mask, prompt_ids[:, :0], vocabulary)
        if rule.truncates:
            shape = (len(prompt_ids), rule.max_new_tokens, -(-vocabulary // 8))
            self.kept = torch.full(shape, 255, dtype=torch.uint8, device=prompt_ids.device)

    def apply(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """The logits (b, V) of `rows` at place `step`; what is kept there is noted."""
        first = None if self.first is None else self.first[rows]
        places = torch.tensor([step], device=logits.device)
        logits = self.rule.shape(logits.unsqueeze(1), places, first, None).squeeze(1)
        if self.kept is not None:
            keep = self.rule.keep(logits)
            self.kept[rows, step] = pack_bits(keep)
            logits = logits.masked_fill(~keep, SUPPRESSED_LOGIT)
        return logits

    def note(self, tokens: Tensor, rows: Tensor, step: int) -> None:
        """Remember that `rows` have `tokens` at place `step`."""
        if self.first is not None:
            self.first[rows, tokens] = self.first[rows, tokens].clamp(max=step)


@torch.no_grad()
def sample_responses(
    model: torch.nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, rule: SamplingRule, uniforms: Tensor
) -> Responses:
    """Sample one response for each left-padded prompt (B, P); stops when every row has ended.

    Memory is that of a key-value cache of the rows that are still running, and with top-k, top-p or min-p a bit for
    each token of the vocabulary at each place.

    Args:
        uniforms (`Tensor`): `draw_uniforms` of these rows (B, max_new_tokens).
    """
    device = prompt_ids.device
    batch, prompt_length = prompt_ids.shape
    max_new_tokens = rule.max_new_tokens
    uniforms = uniforms.to(device)
    ids = torch.full((batch, max_new_tokens), rule.pad_id, dtype=torch.long, device=device)
    lengths = torch.full((batch,), max_new_tokens, dtype=torch.long, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    constraints = _Constraints(rule, prompt_ids, prompt_mask, model.config.get_text_config().vocab_size)

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
        tokens = _draw(constraints.apply(logits, rows, step), uniforms[rows, step], rule.temperature)
        running = ~ended[rows]
        ids[rows[running], step] = tokens[running]
        constraints.note(tokens[running], rows[running], step)
        newly_ended = rows[running & torch.isin(tokens, rule.end_ids)]
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
    kept = None if constraints.kept is None else constraints.kept[:, :longest]
    return Responses(ids[:, :longest], mask.float(), ended, kept)
