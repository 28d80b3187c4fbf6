"""The mathematics of PPO as pure functions, with the symbols of Schulman et al. 2017 (arXiv 1707.06347).

Responses are padded on the right: `mask` is 1 on the tokens of a response, its end token included, and 0 after it.
Shapes: B episodes, T response tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def token_log_probs(logits_BTV: Tensor, token_ids_BT: Tensor, temperature: float) -> Tensor:
    """log π(token) at `temperature`, in fp32, shape (B, T)."""
    logits = logits_BTV.float() / temperature
    return torch.gather(logits, -1, token_ids_BT.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def token_entropy(logits_BTV: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of the distribution that each token was drawn from, shape (B, T)."""
    log_probs = torch.log_softmax(logits_BTV.float() / temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is 1; 0 for an empty mask."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Callable[[Tensor], Tensor] = lambda total: total
) -> Tensor:
    """`values` scaled to deviation 1 over the mask and, with `shift_mean`, shifted to mean 0; 0 outside the mask.

    `reduce` sums a tensor over all processes, so that the statistics are those of the global batch. The variance is
    the population's (divided by n).
    """
    count = reduce(mask.sum()).clamp(min=1)
    mean = reduce((values * mask).sum()) / count
    variance = reduce(((values - mean) ** 2 * mask).sum()) / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) of generalised advantage estimation (arXiv 1506.02438).

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}; the state after a response's last token is terminal, with
    value 0. The returns A + V are the critic's targets. Both are 0 outside the mask.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate loss, probability ratio, and whether the clip binds: each a token's value, shape (B, T)."""
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), ratio, (clipped > unclipped).float()


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, the larger of the value's and the clipped value's, and whether the clip binds."""
    clipped_values = torch.maximum(torch.minimum(values, old_values + cliprange), old_values - cliprange)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k1 estimate of KL(π‖π_ref) at a sampled token: unbiased, and may be negative. For the reward."""
    return log_probs - ref_log_probs


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 estimate, r − 1 − log r with r = π_ref/π: unbiased, never negative, less noisy. For logging."""
    log_ratio = ref_log_probs - log_probs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """−β·KL at each token (B, T), and the score (B) added at the last real token."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(-1).long().clamp(min=1) - 1
    return rewards.index_put((torch.arange(len(scores), device=last.device), last), scores, accumulate=True)


def leave_one_out(scores: Tensor, responses_per_prompt: int) -> Tensor:
    """Scores (B) less the mean of the other responses to the same prompt, which stand in a row (arXiv 2402.14740).

    The baseline of a response does not depend on it, so the policy gradient stays unbiased. For one response a prompt
    the scores are returned as they are.
    """
    if responses_per_prompt == 1:
        return scores
    groups = scores.reshape(-1, responses_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (responses_per_prompt - 1)
    return (groups - others).reshape(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns) over the mask: 1 is a perfect critic; 0 if the returns do not vary."""
    chosen = mask.bool()
    if chosen.sum() < 2:
        return 0.0
    variance = returns[chosen].var(unbiased=False)
    error = (returns - values)[chosen].var(unbiased=False)
    return float(1 - error / variance) if variance > 1e-12 else 0.0


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next KL coefficient of the adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593, 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
