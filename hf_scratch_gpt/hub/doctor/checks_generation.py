"""Checks of generation: greedy decoding, the end token, and the settings that a server would take."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_scratch_gpt.hub.doctor.outcome import TOLERANCE, Checks, Finding, all_of
from hf_scratch_gpt.hub.doctor.subject import Subject
from hf_scratch_gpt.model.cache_name import CACHE_NAME

CHECKS = Checks()
_PROMPT, _NEW = 6, 8


@contextlib.contextmanager
def _settings(subject: Subject, **settings: Any) -> Iterator[None]:
    """Greedy generation without the checkpoint's own settings, which `generate` would mix in."""
    from transformers import GenerationConfig

    own = subject.model.generation_config
    subject.model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=_NEW, **settings)
    try:
        yield
    finally:
        subject.model.generation_config = own


def _prompts(subject: Subject) -> torch.Tensor:
    return subject.ids[:, :_PROMPT]


def _needs_generate(subject: Subject) -> None:
    if not subject.model.can_generate():
        raise TypeError(f"{type(subject.model).__name__} cannot generate: it does not inherit GenerationMixin")


def _generate(subject: Subject, prompts: torch.Tensor, **settings: Any) -> torch.Tensor:
    with _settings(subject, **settings):
        return subject.model.generate(prompts, attention_mask=torch.ones_like(prompts))[:, prompts.shape[1] :]


@CHECKS.add(
    "generate-greedy",
    expected="generate() without sampling = the argmax of the whole sequence's logits, again and again",
    remedy=f"inherit GenerationMixin, and check prepare_inputs_for_generation and the cache, passed as `{CACHE_NAME}`",
)
def generate_greedy(subject: Subject) -> Finding:
    """Whether greedy `generate` gives the tokens that forwards without a cache choose."""
    _needs_generate(subject)
    prompts = _prompts(subject)
    generated = _generate(subject, prompts, pad_token_id=0)
    sequence = prompts
    for step in range(_NEW):
        if generated.shape[1] <= step:
            return Finding(False, f"generate() stopped after {step} of {_NEW} tokens, with no end token set")
        logits = subject.logits(sequence)[:, -1]
        chosen = generated[:, step : step + 1]
        # Two tokens may be equally likely: then either is right.
        behind = (logits.max(-1).values - logits.gather(-1, chosen)[:, 0]).max().item() / subject.spread
        if behind > TOLERANCE:
            return Finding(False, f"token {step + 1} of generate() is {behind:.1e} of the spread behind the argmax")
        sequence = torch.cat([sequence, chosen], dim=1)
    return Finding(True, f"{_NEW} tokens of 2 prompts equal")


@CHECKS.add(
    "generate-end-token",
    expected="a row ends at its end token and is padded from there on, the other goes on",
    remedy="do not override generate(), or stop each row at generation_config.eos_token_id",
)
def generate_end_token(subject: Subject) -> Finding:
    """Whether `generate` stops at an end token."""
    _needs_generate(subject)
    prompts = _prompts(subject)
    free = _generate(subject, prompts, pad_token_id=0).tolist()
    end = free[0][2]
    pad = next(i for i in range(subject.vocab_size) if i not in {*free[0], *free[1]})
    expected = []
    for row in free:
        kept = row[: row.index(end) + 1] if end in row else row
        expected.append(kept)
    longest = max(map(len, expected))
    expected = [row + [pad] * (longest - len(row)) for row in expected]
    found = _generate(subject, prompts, pad_token_id=pad, eos_token_id=end).tolist()
    if found != expected:
        return Finding(False, f"rows {found} instead of {expected} for the end token {end}")
    return Finding(True, f"stopped after {expected[0].index(end) + 1} tokens")


@CHECKS.add(
    "generation-config",
    expected="end tokens in the vocabulary and known to the tokenizer, a pad token that is none of them, lengths "
    "within the context",
    remedy="set eos_token_id, pad_token_id and max_length in generation_config.json; give padding a token of its own",
)
def generation_config(subject: Subject) -> Finding:
    """Whether the generation settings name end and padding tokens that exist and differ."""
    config, ends = subject.model.generation_config, sorted(subject.end_token_ids())
    pad, rows = config.pad_token_id, subject.vocab_size
    findings = [
        Finding(bool(ends), "no end token (eos_token_id): generation only stops at its length limit"),
        Finding(all(0 <= end < rows for end in ends), f"end tokens {ends} of {rows} tokens"),
        Finding(pad is not None, "no pad_token_id: batches are padded with the end token"),
        Finding(pad not in ends, f"pad_token_id {pad} is an end token"),
        Finding(pad is None or 0 <= pad < rows, f"pad_token_id {pad} of {rows} tokens"),
    ]
    for name in ("max_length", "max_new_tokens"):
        limit, context = getattr(config, name), subject.context
        fits = limit is None or context is None or limit <= context
        findings.append(Finding(fits, f"{name} {limit} is more than the {context} positions"))
    if subject.tokenizer is not None and (end := subject.tokenizer.eos_token_id) is not None:
        findings.append(Finding(end in ends, f"the tokenizer's end token {end} is not among {ends}"))
    return all_of(*findings, Finding(True, f"end tokens {ends}, pad {pad}"))
