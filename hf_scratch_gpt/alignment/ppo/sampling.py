"""The distribution that responses are drawn from: one description, for sampling and for every log-probability.

What shapes the logits is a function of the tokens before (a repetition penalty), of the place (no end before so many
tokens), or a set of tokens that were kept (top-k, top-p, min-p). That set depends on the weights: it is found once, in
sampling, and held fixed, so that π(a)/π_old(a) compares two distributions over the same tokens (as in DeepSeek-V3.2,
arXiv 2512.02556, "keep sampling mask"). So the first ratio is 1 and the first KL 0 whatever the settings are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# Finite, so that p·log p of a suppressed token is 0 and not NaN.
SUPPRESSED_LOGIT = -1e9
_NEVER = torch.iinfo(torch.int32).max


def suppress(logits: Tensor, suppressed_ids: Tensor) -> Tensor:
    """`logits` (..., V) with the suppressed tokens' set so low that their probability is 0."""
    return logits.index_fill(-1, suppressed_ids, SUPPRESSED_LOGIT) if len(suppressed_ids) else logits


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean mask (..., V) as bytes (..., ⌈V/8⌉)."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8))
    powers = 2 ** torch.arange(8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * powers).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """What `pack_bits` made of a boolean mask (..., `size`)."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> bits) & 1).bool().flatten(-2)[..., :size]


def first_places(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, vocabulary: int) -> Tensor:
    """Where each token of the vocabulary first occurs (B, V): -1 in the prompt, t in a response, or a huge number."""
    device = prompt_ids.device
    table = torch.full((len(prompt_ids), vocabulary), _NEVER, dtype=torch.int32, device=device)
    in_prompt = torch.where(prompt_mask.bool(), -1, _NEVER).int()
    table.scatter_reduce_(1, prompt_ids, in_prompt, "amin")
    places = torch.arange(response_ids.shape[1], dtype=torch.int32, device=device).expand_as(response_ids)
    return table.scatter_reduce_(1, response_ids, places.contiguous(), "amin")


@dataclass
class SamplingRule:
    """How logits become the distribution of the next token.

    Attributes:
        end_ids, suppressed_ids (`Tensor`): What ends a response, and what is never sampled.
        pad_id (`int`): Fills behind a response; means nothing.
    """

    end_ids: Tensor
    suppressed_ids: Tensor
    pad_id: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    @classmethod
    def from_args(cls, args: Any, end_ids: Tensor, suppressed_ids: Tensor, pad_id: int) -> "SamplingRule":
        """The rule that a `PPOConfig` describes."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
        return cls(
            end_ids, suppressed_ids, pad_id, args.max_new_tokens, **{name: getattr(args, name) for name in names}
        )

    def to(self, device: torch.device) -> "SamplingRule":
        """Move the ids to `device`."""
        self.end_ids, self.suppressed_ids = self.end_ids.to(device), self.suppressed_ids.to(device)
        return self

    @property
    def truncates(self) -> bool:
        """Whether only a part of the tokens is kept at each place."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def shape(self, logits_BTV: Tensor, places: Tensor, first: Tensor | None, kept: Tensor | None) -> Tensor:
        """Logits (B, T, V) of the distribution at the response's `places` (T), before the temperature.

        Args:
            first: `first_places` (B, V); needed with a repetition penalty.
            kept: `pack_bits` of the tokens that sampling kept (B, T, ⌈V/8⌉), or `None` for all.
        """
        logits = logits_BTV
        if self.repetition_penalty != 1:
            assert first is not None
            seen = first.unsqueeze(1) < places.view(1, -1, 1)
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        logits = suppress(logits, self.suppressed_ids)
        early = places < self.min_new_tokens
        if self.min_new_tokens and early.any():
            logits = torch.where(early.view(1, -1, 1), suppress(logits, self.end_ids), logits)
        if kept is not None:
            logits = logits.masked_fill(~unpack_bits(kept, logits.shape[-1]), SUPPRESSED_LOGIT)
        return logits

    def shape_response(self, logits_BTV: Tensor, batch: Any) -> Tensor:
        """`shape` for all places of the responses of a `Rollout` (or whatever has its ids and masks)."""
        places = torch.arange(logits_BTV.shape[1], device=logits_BTV.device)
        first = None
        if self.repetition_penalty != 1:
            first = first_places(batch.prompt_ids, batch.prompt_mask, batch.response_ids, logits_BTV.shape[-1])
        return self.shape(logits_BTV, places, first, batch.kept)

    def keep(self, logits_BV: Tensor) -> Tensor:
        """Which tokens top-k, top-p and min-p keep (B, V), in the order in which `generate` applies them."""
        scores = logits_BV.float() / self.temperature
        ids = torch.empty(0, device=scores.device)  # what came before, which none of them looks at
        if self.top_k > 0:
            scores = TopKLogitsWarper(self.top_k)(ids, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(ids, scores)
        if self.min_p > 0:
            scores = MinPLogitsWarper(self.min_p)(ids, scores)
        return scores > SUPPRESSED_LOGIT / 2
