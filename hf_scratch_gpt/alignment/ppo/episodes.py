"""From prompts to scored episodes: sample, decode, score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.alignment.ppo.config import PPOConfig
from hf_scratch_gpt.alignment.ppo.generation import sample_responses
from hf_scratch_gpt.alignment.ppo.prompts import Prompt, left_pad
from hf_scratch_gpt.alignment.ppo.rewards import Reward, score_all
from hf_scratch_gpt.alignment.ppo.sampling import SamplingRule


@dataclass
class Episodes:
    """Sampled and scored responses to `prompts`.

    Attributes:
        prompt_ids, prompt_mask (`Tensor`): (B, P), padded on the left.
        response_ids, mask (`Tensor`): (B, T), padded on the right; the mask is 1.0 up to and with the end token.
        ended (`Tensor`): Whether a response has an end token (B).
        scores (`Tensor`): The weighted, normalised, clipped score (B) that PPO maximises.
        raw_scores (`Tensor`): The weighted sum of the rewards as they came (B).
        by_reward (`dict`): Each reward's raw scores (B) by its name.
        learnt, gold (`Tensor`): Where one reward is the gold one, its raw scores (B), and the weighted, normalised sum
            of the others: what is maximised, against what it stands for. Else `None`.
        kept (`Tensor`): Which tokens sampling kept, as bits (B, T, ⌈V/8⌉), where it did not keep all.
    """

    prompts: list[Prompt]
    texts: list[str]
    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    ended: Tensor
    scores: Tensor
    raw_scores: Tensor
    by_reward: dict[str, Tensor]
    learnt: Tensor | None = None
    gold: Tensor | None = None
    kept: Tensor | None = None

    def samples(self, count: int) -> list[dict[str, Any]]:
        """The first `count` episodes, for people to read."""
        return [
            {
                "prompt": self.prompts[index].content,
                "completion": self.texts[index],
                "ended": bool(self.ended[index]),
                "reward": float(self.scores[index]),
                "rewards": {name: float(scores[index]) for name, scores in self.by_reward.items()},
            }
            for index in range(min(count, len(self.texts)))
        ]


def find_end_ids(policy: Any, tokenizer: Any, given: list[int] | None) -> Tensor:
    """Ids that end a response: those given, or the generation config's and the tokenizer's.

    Raises:
        ValueError: if one of them is not in the model's vocabulary.
    """
    if given:
        ids = set(given)
    else:
        configured = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        ids = {tokenizer.eos_token_id, *(number for number in listed if number is not None)}
    size = policy.config.get_text_config().vocab_size
    outside = [number for number in ids if not 0 <= number < size]
    if outside:
        raise ValueError(f"end token {outside[0]} is not in the model's vocabulary of {size} tokens")
    return torch.tensor(sorted(ids))


def find_suppressed_ids(policy: Any, tokenizer: Any, end_ids: Tensor) -> Tensor:
    """Ids that are never sampled: control tokens that do not end a response, and rows that no token has."""
    size = policy.config.get_text_config().vocab_size
    known = set(tokenizer.get_vocab().values())
    control = set(tokenizer.all_special_ids)
    control |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(range(size)) - known
    return torch.tensor(
        sorted(number for number in control - set(end_ids.tolist()) if number < size), dtype=torch.long
    )


def sample_and_score(
    policy: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    rewards: list[Reward],
    args: PPOConfig,
    rule: SamplingRule,
    uniforms: Tensor,
    state: Any = None,
) -> Episodes:
    """Sample one response for each prompt and score it; a pure function of the weights and `uniforms`.

    Raises:
        ValueError: if a reward fails, naming it.
    """
    device = rule.end_ids.device
    ids, prompt_mask = left_pad([prompt.input_ids for prompt in prompts], rule.pad_id)
    ids, prompt_mask = ids.to(device), prompt_mask.to(device)
    responses = sample_responses(policy, ids, prompt_mask, rule, uniforms)
    lengths, ended = responses.mask.sum(-1).int().tolist(), responses.ended.tolist()
    completion_ids = [row[:length] for row, length in zip(responses.ids.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(
        [row[:-1] if has_ended else row for row, has_ended in zip(completion_ids, ended, strict=True)],
        skip_special_tokens=False,  # what is not an end token is the response's own
        clean_up_tokenization_spaces=False,
    )
    scored = score_all(rewards, prompts, completion_ids, ended, texts, state)
    return Episodes(
        prompts, texts, ids, prompt_mask, responses.ids, responses.mask, responses.ended,
        **_weigh(rewards, scored, responses.ended.cpu(), args), kept=responses.kept,
    )  # fmt: skip


def _weigh(rewards: list[Reward], scored: list[Tensor], ended: Tensor, args: PPOConfig) -> dict[str, Any]:
    """The scores' fields of `Episodes` from each reward's raw scores."""
    weights = args.reward_weights or [1.0] * len(rewards)
    gold = find_gold(rewards, weights)
    by_reward: dict[str, Tensor] = {}
    scores = raw_scores = learnt = torch.zeros(len(ended))
    for number, (weight, reward, raw) in enumerate(zip(weights, rewards, scored, strict=True)):
        by_reward[reward.name if reward.name not in by_reward else f"{reward.name}#{number}"] = raw
        scores, raw_scores = scores + weight * reward.normalise(raw), raw_scores + weight * raw
        if number != gold:
            learnt = learnt + weight * reward.normalise(raw)
    scores = finish_scores(scores, ended, args.reward_clip, args.missing_end_score)
    fields = {"scores": scores, "raw_scores": raw_scores, "by_reward": by_reward}
    return fields if gold is None else {**fields, "learnt": learnt, "gold": scored[gold]}


def find_gold(rewards: list[Reward], weights: list[float]) -> int | None:
    """Which reward the others stand for: the one called `gold`, or else the first of weight 0; `None` if none is."""
    named = [number for number, reward in enumerate(rewards) if reward.name == "gold"]
    unused = [number for number, weight in enumerate(weights) if weight == 0]
    found = named + unused
    return found[0] if found and len(rewards) > 1 else None


def finish_scores(scores: Tensor, ended: Tensor, clip: float, missing_end_score: float | None) -> Tensor:
    """Clip the normalised scores to ±`clip`; a response without end scores at most `missing_end_score`."""
    scores = scores.clamp(-clip, clip)
    return scores if missing_end_score is None else torch.where(ended, scores, scores.clamp(max=missing_end_score))
