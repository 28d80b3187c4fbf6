"""Judges: which of two answers is the better one, asked in both orders.

A judge that reads two answers favours a place, often the first (Zheng et al. 2023,
https://huggingface.co/papers/2306.05685, section 3.3). So every comparison is asked twice with the places exchanged,
and what counts is the mean of both.
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hf_scratch_gpt.alignment.scoring import checked_numbers, load_function
from hf_scratch_gpt.evaluation.mode import context_length_of, measuring
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation, encode_text

logger = logging.getLogger(__name__)

JUDGE_PROMPT = (
    "Which answer to the question is better: correct, complete and to the point?\n\n"
    "Question: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nReply with A or B only."
)
LETTERS = ("A", "B")
_PLACES = re.compile(r"\{(question|first|second)\}")
_BATCH = 32  # comparisons read at once; which ones never changes a verdict


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A prompt (messages) and two answers to it, in the order in which the judge reads them."""

    prompt: list[dict[str, Any]]
    first: str
    second: str

    def turned(self) -> "Comparison":
        """The same with the answers' places exchanged."""
        return Comparison(self.prompt, self.second, self.first)

    def text(self, template: str) -> str:
        """What the judge reads; braces in question and answers stay what they are."""
        values = {"question": conversation_text(self.prompt), "first": self.first, "second": self.second}
        return _PLACES.sub(lambda match: values[match.group(1)], template)


def conversation_text(prompt: Sequence[dict[str, Any]]) -> str:
    """A prompt as text: a lone question as it is, a longer conversation with its roles."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class Judge(Protocol):
    """Gives for each comparison the probability that the first answer is the better one; `None` for no verdict."""

    def prefer(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """One verdict a comparison, in their order."""
        ...


class ModelJudge:
    """A local chat model: how likely it is to reply A rather than B.

    Args:
        folder (`str`): Its folder or Hub id.
        template (`str`): What it reads, see `JUDGE_PROMPT`.

    Raises:
        OSError, ValueError: if it cannot be loaded, has no chat template, or begins A and B with one token.
    """

    def __init__(self, folder: str, template: str):
        from hf_scratch_gpt.evaluation.models import load_model

        self.folder, self.template = folder, template
        self.model, self.tokenizer = load_model(folder)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"judge {folder}: its tokenizer has no chat template")
        self.longest = context_length_of(self.model) or sys.maxsize
        self.letters = [encode_text(self.tokenizer, letter)[0] for letter in LETTERS]
        if self.letters[0] == self.letters[1]:
            raise ValueError(f"judge {folder}: its tokenizer begins the replies A and B with one and the same token")

    def prefer(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """P(A) / (P(A) + P(B)) as the first token of the reply; `None` for what is longer than the context."""
        encoded = [self._encode(comparison) for comparison in comparisons]
        fitting = [index for index, ids in enumerate(encoded) if len(ids) <= self.longest]
        if len(fitting) < len(encoded):
            longest = max(map(len, encoded))
            logger.warning(
                "judge %s: %d of %d comparisons are too long for it (up to %d tokens in a context of %d)",
                self.folder, len(encoded) - len(fitting), len(encoded), longest, self.longest,
            )  # fmt: skip
        order = sorted(fitting, key=lambda index: len(encoded[index]))
        verdicts: list[float | None] = [None] * len(encoded)
        with measuring(self.model):
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                width = max(len(encoded[index]) for index in batch)
                rows = [encoded[index] + [0] * (width - len(encoded[index])) for index in batch]
                ends = torch.tensor([len(encoded[index]) - 1 for index in batch], device=self.model.device)
                # Under a causal mask what stands to the right of a row's end changes nothing before it.
                logits = self.model(input_ids=torch.tensor(rows, device=self.model.device), use_cache=False).logits
                replies = logits[torch.arange(len(batch), device=ends.device), ends][:, self.letters].double()
                for index, chance in zip(batch, replies.softmax(dim=-1)[:, 0].tolist(), strict=True):
                    verdicts[index] = chance
        return verdicts

    def _encode(self, comparison: Comparison) -> list[int]:
        messages = [{"role": "user", "content": comparison.text(self.template)}]
        return list(encode_conversation(self.tokenizer, messages, add_generation_prompt=True)["input_ids"])


class FunctionJudge:
    """A function of the user's: `function(prompts, firsts, seconds)` gives the chance that the first is better."""

    def __init__(self, name: str):
        self.name = name
        self.function = load_function(name, "judge_function")

    def prefer(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """Its verdicts, checked.

        Raises:
            ValueError: if it raises, or does not give one number from 0 to 1 a comparison.
        """
        prompts = [comparison.prompt for comparison in comparisons]
        firsts, seconds = ([getattr(comparison, side) for comparison in comparisons] for side in ("first", "second"))
        who = f"judge function '{self.name}'"
        try:
            verdicts = self.function(prompts, firsts, seconds)
        except Exception as error:
            raise ValueError(f"{who} raised {type(error).__name__}: {error}") from error
        numbers = checked_numbers(verdicts, len(comparisons), who)
        bad = next((number for number in numbers if not 0 <= number <= 1), None)
        if bad is not None:
            raise ValueError(f"{who} returned {bad}, expected the chance from 0 to 1 that the first answer is better")
        return list(numbers)


def read_letter(reply: str) -> float | None:
    """1 where a reply says A, 0 where it says B, `None` where it says both, neither, or a word that begins so."""
    found = set(re.findall(r"(?<![A-Za-z])[AB](?![A-Za-z'])", reply))
    return None if len(found) != 1 else float(found == {LETTERS[0]})


def ask_both_ways(judge: Judge, comparisons: Sequence[Comparison]) -> list[tuple[float | None, float | None]]:
    """For each comparison the chance of its first answer, read in its own place and in the other."""
    straight = judge.prefer(comparisons)
    turned = judge.prefer([comparison.turned() for comparison in comparisons])
    return [(ours, None if theirs is None else 1 - theirs) for ours, theirs in zip(straight, turned, strict=True)]
