"""Answers of a model to many prompts at once, the same whatever the batch and the order.

`transformers.generate` draws from one stream of random numbers for the whole batch, so that a sampled answer depends
on its neighbours and a comparison of two models is not repeatable when a prompt is added. Here each prompt has its own
stream, a function of the seed, the prompt and how often it has occurred before.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.evaluation.adapters import without_prefix
from hf_scratch_gpt.evaluation.mode import context_length_of, measuring
from hf_scratch_gpt.model.cache_name import cache_argument, cache_of
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt.

    Args:
        text (`str`): The answer without special tokens.
        ended (`bool`): Whether the model stopped by an end token, rather than by the limit.
        tokens (`int`): Number of tokens generated, the end token included.
        token_ids (`tuple[int, ...]`): These tokens.
    """

    text: str
    ended: bool
    tokens: int
    token_ids: tuple[int, ...] = dataclasses.field(repr=False, default=())


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model's generation config and the tokenizer's end token."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


def suppressed_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """What may never be generated: special tokens that are no end token, and ids beyond the tokenizer's vocabulary."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    beyond = range(len(tokenizer), model.config.vocab_size)
    return sorted((special | set(beyond)) - set(end_token_ids(model, tokenizer)))


def _beginning(prompt: Sequence[dict[str, Any]], length: int = 40) -> str:
    text = str(prompt[-1]["content"])
    return repr(text if len(text) <= length else text[:length] + "...")


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Sequence[dict[str, Any]]], max_new_tokens: int, context_length: int | None
) -> list[list[int]]:
    """Token ids of each prompt with the mark of the assistant's turn.

    Raises:
        ValueError: if a prompt and `max_new_tokens` do not fit into `context_length`; names the prompt and lengths.
    """
    encoded = []
    for index, prompt in enumerate(prompts):
        token_ids = list(encode_conversation(tokenizer, list(prompt), add_generation_prompt=True)["input_ids"])
        if context_length is not None and len(token_ids) + max_new_tokens > context_length:
            raise ValueError(
                f"prompt {index} ({_beginning(prompt)}): {len(token_ids)} tokens and an answer of up to "
                f"{max_new_tokens} do not fit into the model's context of {context_length} tokens; shorten the prompt "
                "or lower max_new_tokens"
            )
        encoded.append(token_ids)
    return encoded


def _uniforms(encoded: Sequence[Sequence[int]], count: int, seed: int) -> np.ndarray:
    """Uniform numbers (prompts x count); a row depends on seed, prompt and its occurrence only."""
    seen: Counter[bytes] = Counter()
    rows = np.empty((len(encoded), count))
    for row, token_ids in enumerate(encoded):
        key = hashlib.sha256(np.asarray(token_ids, dtype=np.int64).tobytes()).digest()
        state = [seed, seen[key], *np.frombuffer(key, dtype=np.uint32).tolist()]
        rows[row] = np.random.default_rng(state).random(count)
        seen[key] += 1
    return rows


def _choose(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor | None) -> torch.Tensor:
    """The next token of each row: the likeliest, or the one where the cumulative probability passes the uniform."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the last sum, which rounding leaves a little beside 1, so that the result is always a token.
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp_max(
        logits.shape[-1] - 1
    )


class _Batch:
    """Prompts that are decoded together with a key-value cache, left-padded; rows that have ended are dropped."""

    def __init__(self, model: Any, encoded: Sequence[Sequence[int]], ends: Sequence[int], suppressed: Sequence[int]):
        device = model.device
        self.model, self.cache, virtual = without_prefix(model, len(encoded))
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        width = max(len(token_ids) for token_ids in encoded)
        pads = [width - len(token_ids) for token_ids in encoded]
        rows = [[0] * pad + list(token_ids) for pad, token_ids in zip(pads, encoded, strict=True)]
        self.input_ids = torch.tensor(rows, device=device)
        columns = torch.arange(width, device=device)[None]
        self.mask = (columns >= torch.tensor(pads, device=device)[:, None]).long()
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0) + virtual
        self.mask = torch.nn.functional.pad(self.mask, (virtual, 0), value=1)
        self.alive = torch.arange(len(rows), device=device)
        self.cache_argument = cache_argument(self.model)

    def next_logits(self) -> torch.Tensor:
        """Logits (alive rows x vocabulary) of the next token, in fp32, with suppressed tokens at minus infinity."""
        output = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: self.cache},
        )
        self.cache = cache_of(output)
        logits = output.logits[:, -1].float()
        logits[:, self.suppressed] = -torch.inf
        return logits

    def advance(self, tokens: torch.Tensor) -> None:
        """Append a token to each row that is alive, and drop the rows that it ends."""
        going = ~torch.isin(tokens, self.ends)
        self.input_ids = tokens[:, None]
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1
        if going.all():
            return
        kept = going.nonzero()[:, 0]
        self.input_ids, self.mask, self.positions = self.input_ids[kept], self.mask[kept], self.positions[kept]
        self.alive = self.alive[kept]
        if len(kept):
            self.cache.batch_select_indices(kept)


def _decode(batch: _Batch, max_new_tokens: int, temperature: float, uniforms: torch.Tensor | None) -> list[list[int]]:
    generated: list[list[int]] = [[] for _ in range(len(batch.alive))]
    for step in range(max_new_tokens):
        drawn = None if uniforms is None else uniforms[batch.alive, step]
        tokens = _choose(batch.next_logits(), temperature, drawn)
        for row, token in zip(batch.alive.tolist(), tokens.tolist(), strict=True):
            generated[row].append(token)
        batch.advance(tokens)
        if not len(batch.alive):
            break
    return generated


def generate_from_ids(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Answer]:
    """Continue each list of token ids; everything else as in `generate_answers`.

    Raises:
        ValueError: if an argument is out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or batch_size < 1:
        raise ValueError(
            f"expected max_new_tokens >= 1, temperature >= 0 and batch_size >= 1, "
            f"found {max_new_tokens}, {temperature} and {batch_size}"
        )
    ends, suppressed = end_token_ids(model, tokenizer), suppressed_token_ids(model, tokenizer)
    uniforms = torch.from_numpy(_uniforms(encoded, max_new_tokens, seed)) if temperature > 0 else None
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers: dict[int, Answer] = {}
    with measuring(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _Batch(model, [encoded[index] for index in chosen], ends, suppressed)
            drawn = None if uniforms is None else uniforms[chosen].to(model.device)
            for index, token_ids in zip(chosen, _decode(batch, max_new_tokens, temperature, drawn), strict=True):
                text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[index] = Answer(text, token_ids[-1] in ends, len(token_ids), tuple(token_ids))
    return [answers[index] for index in range(len(encoded))]


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[dict[str, Any]]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Answer]:
    """Answer each prompt (a list of chat messages); special tokens other than end tokens are never generated.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Conversations that end with a user's message. Message contents can never become control tokens.
        max_new_tokens (`int`): Longest answer in tokens.
        temperature (`float`, *optional*, defaults to `0.0`): 0 takes the likeliest token; above, tokens are drawn.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws. An answer depends on the seed, its prompt and how
            often the prompt occurred before, never on the other prompts.
        batch_size (`int`, *optional*, defaults to `64`): Prompts decoded together.

    Raises:
        ValueError: if a prompt is too long for the model's context, or an argument is out of range.
    """
    encoded = encode_prompts(tokenizer, prompts, max_new_tokens, context_length_of(model))
    return generate_from_ids(model, tokenizer, encoded, max_new_tokens, temperature, seed, batch_size)
