"""How far a tuned model has moved from its reference: KL over answers that it gives itself to held-out prompts."""

import logging
from typing import Any

from hf_scratch_gpt.evaluation.generation import generate_from_ids, suppressed_token_ids
from hf_scratch_gpt.evaluation.intervals import bootstrap_mean
from hf_scratch_gpt.evaluation.likelihood import answer_divergences
from hf_scratch_gpt.evaluation.mode import context_length_of

logger = logging.getLogger(__name__)


def heldout_divergence(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    count: int,
    answer_tokens: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """KL(policy || reference) of one answer, in nats, estimated on an answer drawn to each of `count` prompts.

    Answers are drawn at temperature 1 and cut off after `answer_tokens`, so that the divergence is that of the first
    so many tokens; `heldout_kl_ended` is the share that ended before. Prompts that leave no room for so many tokens
    are passed over.

    Returns:
        `heldout_kl`, its 95% interval over prompts, and how many prompts and tokens it rests on; nothing where no
        prompt fits.
    """
    context = context_length_of(policy)
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    fitting = [list(prompt) for prompt in different if context is None or len(prompt) + answer_tokens <= context]
    if not fitting:
        logger.warning("no held-out prompt leaves room for %d tokens: the KL is not measured", answer_tokens)
        return {}
    chosen = fitting[:count]
    answers = generate_from_ids(policy, tokenizer, chosen, answer_tokens, 1.0, seed, batch_size)
    pairs = [(prompt, answer.token_ids) for prompt, answer in zip(chosen, answers, strict=True)]
    suppressed = suppressed_token_ids(policy, tokenizer)
    divergence = bootstrap_mean(answer_divergences(policy, reference, pairs, suppressed, 1.0, batch_size))
    return {
        "heldout_kl": divergence.mean,
        "heldout_kl_interval": [divergence.low, divergence.high],
        "heldout_kl_prompts": divergence.n,
        "heldout_kl_tokens": sum(answer.tokens for answer in answers),
        "heldout_kl_ended": sum(answer.ended for answer in answers) / len(answers),
    }
