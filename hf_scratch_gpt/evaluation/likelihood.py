"""What models think of given answers: log-probabilities, and the divergence between two models along an answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_scratch_gpt.evaluation.mode import measuring

# A prompt's token ids and an answer's.
Pair = tuple[Sequence[int], Sequence[int]]


def _batches(pairs: Sequence[Pair], batch_size: int) -> Iterator[list[int]]:
    """Indices of `pairs` in batches of similar length."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class _AnswerTokens:
    """Where the answers stand in a right-padded batch; under a causal mask no padding mask is needed."""

    def __init__(self, pairs: Sequence[Pair], device: torch.device):
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        width = max(lengths)
        rows = [
            [*prompt, *answer] + [0] * (width - length)
            for (prompt, answer), length in zip(pairs, lengths, strict=True)
        ]
        ids = torch.tensor(rows, device=device)
        self.inputs = ids[:, :-1]
        # Position i predicts token i + 1; nothing before the first answer's first token is needed.
        self.first = min(len(prompt) for prompt, _ in pairs) - 1
        self.targets = ids[:, self.first + 1 :]
        columns = torch.arange(self.first, width - 1, device=device)[None]
        begins = torch.tensor([len(prompt) - 1 for prompt, _ in pairs], device=device)[:, None]
        ends = torch.tensor([length - 1 for length in lengths], device=device)[:, None]
        self.mask = (columns >= begins) & (columns < ends)

    def log_probabilities(self, model: Any, suppressed: Sequence[int], temperature: float) -> torch.Tensor:
        """Log-probabilities (rows x positions x vocabulary) from the first answer's position on, in fp32."""
        kept = self.inputs.shape[1] - self.first
        logits = model(input_ids=self.inputs, use_cache=False, logits_to_keep=kept).logits.float() / temperature
        if len(suppressed):
            logits[..., torch.tensor(list(suppressed), device=logits.device)] = -torch.inf
        return logits.log_softmax(dim=-1)


def answer_log_probabilities(model: Any, pairs: Sequence[Pair], batch_size: int = 32) -> list[float]:
    """Sum of the log-probabilities (nats) of each answer's tokens given its prompt."""
    values = [0.0] * len(pairs)
    with measuring(model):
        for chosen in _batches(pairs, batch_size):
            batch = _AnswerTokens([pairs[index] for index in chosen], model.device)
            chances = batch.log_probabilities(model, (), 1.0)
            picked = chances.gather(-1, batch.targets[..., None])[..., 0].double()
            for index, value in zip(chosen, (picked * batch.mask).sum(dim=1).tolist(), strict=True):
                values[index] = value
    return values


def answer_divergences(
    policy: Any,
    reference: Any,
    pairs: Sequence[Pair],
    suppressed: Sequence[int] = (),
    temperature: float = 1.0,
    batch_size: int = 32,
) -> list[float]:
    """KL(policy || reference) in nats along each answer: the sum over its positions of the exact divergence there.

    Over answers drawn from the policy this is an unbiased estimate of the divergence of whole answers, with less
    variance than the log-ratio of the drawn tokens and never negative. `suppressed` tokens are impossible under both.
    """
    values = [0.0] * len(pairs)
    with measuring(policy), measuring(reference):
        for chosen in _batches(pairs, batch_size):
            batch = _AnswerTokens([pairs[index] for index in chosen], policy.device)
            ours = batch.log_probabilities(policy, suppressed, temperature)
            theirs = batch.log_probabilities(reference, suppressed, temperature)
            # Where both are impossible the difference is undefined, and its weight is zero.
            terms = ours.exp() * (ours - theirs).masked_fill(ours == -torch.inf, 0.0)
            divergence = terms.sum(dim=-1).double() * batch.mask
            for index, value in zip(chosen, divergence.sum(dim=1).tolist(), strict=True):
                values[index] = value
    return values
