"""Measures one model after the other on the same material; `comparison` turns the records into statements."""

import logging
from collections.abc import Sequence
from typing import Any

from hf_scratch_gpt.data.tasks import gold_reward, is_exact
from hf_scratch_gpt.evaluation.arguments import EvaluateArguments
from hf_scratch_gpt.evaluation.generation import (
    Answer,
    encode_prompts,
    generate_answers,
    generate_from_ids,
    suppressed_token_ids,
)
from hf_scratch_gpt.evaluation.intervals import wilson
from hf_scratch_gpt.evaluation.likelihood import Pair, answer_divergences, answer_log_probabilities
from hf_scratch_gpt.evaluation.material import Material
from hf_scratch_gpt.evaluation.mode import context_length_of
from hf_scratch_gpt.evaluation.models import load_model, load_reward_model
from hf_scratch_gpt.evaluation.questions import FewShotPrompts, first_line
from hf_scratch_gpt.evaluation.rewards import score_conversations
from hf_scratch_gpt.evaluation.text import bits_per_byte
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

logger = logging.getLogger(__name__)


def measure_reward_model(folder: str, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of held-out pairs whose chosen answer scores higher than the rejected one, with Wilson's interval.

    Raises:
        ValueError: if there are no pairs.
    """
    if not pairs:
        raise ValueError("no held-out preference pairs to measure the reward model on: leave 'reward_model' out")
    model, tokenizer = load_reward_model(folder)
    chosen = score_conversations(model, tokenizer, [row["prompt"] + row["chosen"] for row in pairs])
    rejected = score_conversations(model, tokenizer, [row["prompt"] + row["rejected"] for row in pairs])
    right = [left > right for left, right in zip(chosen, rejected, strict=True)]
    margins = [left - right for left, right in zip(chosen, rejected, strict=True)]
    return {
        "accuracy": wilson(sum(right), len(right)).as_dict(),
        "pairs": len(right),
        "mean_margin": sum(margins) / len(margins),
        "chance_level": 0.5,
    }


class Measurer:
    """Holds what is common to all models: the material, the reference model and the reward model."""

    def __init__(self, arguments: EvaluateArguments, material: Material):
        self.arguments, self.material = arguments, material
        self.few_shot = FewShotPrompts(material.examples, arguments.few_shot, arguments.seed)
        self._reference: tuple[Any, Any] | None = None
        self._reward_model: tuple[Any, Any] | None = None

    def measure(self, name: str, folder: str) -> dict[str, Any]:
        """The record of one model, see `comparison`; plain JSON values."""
        model, tokenizer = load_model(folder)
        arguments, material = self.arguments, self.material
        prompts = [row["prompt"] for row in material.rows]
        record: dict[str, Any] = {
            "parameters": model.num_parameters(),
            "text": bits_per_byte(model, tokenizer, material.texts).as_dict() if material.texts else None,
        }
        greedy = generate_answers(model, tokenizer, prompts, arguments.max_new_tokens, batch_size=arguments.batch_size)
        record["greedy"] = [self._judge(row, answer) for row, answer in zip(material.rows, greedy, strict=True)]
        record["few_shot"] = self._ask_few_shot(model, tokenizer) if self._asks_few_shot(name) else None
        record["sampled"] = self._sample(name, model, tokenizer, prompts)
        record["pair_log_ratios"] = self._pair_log_ratios(model, tokenizer)
        return record

    def _judge(self, row: dict[str, Any], answer: Answer) -> dict[str, Any]:
        return {
            "text": answer.text,
            "ended": answer.ended,
            "tokens": answer.tokens,
            "exact": bool(is_exact(row, answer.text)),
            "gold": float(gold_reward(row, answer.text)),
        }

    def _asks_few_shot(self, name: str) -> bool:
        asked = self.arguments.few_shot_models or [self.arguments.model_names[0], self.arguments.reference]
        return self.arguments.few_shot > 0 and bool(self.material.examples) and name in asked

    def _ask_few_shot(self, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        longest = self.arguments.max_new_tokens
        room = (context_length_of(model) or 1024) - longest
        prompts = [self.few_shot.encode(tokenizer, row, room) for row in self.material.rows]
        encoded = [token_ids for token_ids, _ in prompts]
        answers = generate_from_ids(model, tokenizer, encoded, longest, batch_size=self.arguments.batch_size)
        return [
            {
                "text": first_line(answer.text),
                "exact": bool(is_exact(row, first_line(answer.text))),
                "examples": examples,
            }
            for row, answer, (_, examples) in zip(self.material.rows, answers, prompts, strict=True)
        ]

    def _sample(self, name: str, model: Any, tokenizer: Any, prompts: list[Any]) -> list[list[dict[str, Any]]]:
        """Several answers to each question: gold reward, divergence from the reference, learnt reward."""
        arguments, count = self.arguments, self.arguments.samples_per_prompt
        if count < 1:
            return []
        repeated = [prompt for prompt in prompts for _ in range(count)]
        rows = [row for row in self.material.rows for _ in range(count)]
        answers = generate_answers(
            model,
            tokenizer,
            repeated,
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
        judged = [self._judge(row, answer) for row, answer in zip(rows, answers, strict=True)]
        self._add(judged, "kl", self._divergences(name, model, tokenizer, repeated, answers))
        self._add(judged, "reward", self._learnt_rewards(repeated, answers))
        return [judged[start : start + count] for start in range(0, len(judged), count)]

    @staticmethod
    def _add(judged: list[dict[str, Any]], field: str, values: list[float] | None) -> None:
        for entry, value in zip(judged, values or [], strict=False):
            entry[field] = value

    def _divergences(
        self, name: str, model: Any, tokenizer: Any, prompts: list[Any], answers: list[Answer]
    ) -> list[float] | None:
        """KL from the reference along each sampled answer; `None` if there is none or it reads other tokens."""
        arguments = self.arguments
        if name == arguments.reference or arguments.reference not in arguments.model_names:
            return None
        if self._reference is None:
            folder = arguments.models[arguments.model_names.index(arguments.reference)]
            self._reference = load_model(folder)
        reference, its_tokenizer = self._reference
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            logger.warning("%s and %s have different tokenizers: no KL between them", name, arguments.reference)
            return None
        encoded = encode_prompts(tokenizer, prompts, arguments.max_new_tokens, None)
        pairs = [(token_ids, answer.token_ids) for token_ids, answer in zip(encoded, answers, strict=True)]
        suppressed = suppressed_token_ids(model, tokenizer)
        return answer_divergences(model, reference, pairs, suppressed, arguments.temperature)

    def _learnt_rewards(self, prompts: list[Any], answers: list[Answer]) -> list[float] | None:
        if not self.arguments.reward_model:
            return None
        if self._reward_model is None:
            self._reward_model = load_reward_model(self.arguments.reward_model)
        model, tokenizer = self._reward_model
        conversations = [
            [*prompt, {"role": "assistant", "content": answer.text}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return score_conversations(model, tokenizer, conversations)

    def _pair_log_ratios(self, model: Any, tokenizer: Any) -> list[float]:
        """log p(chosen) - log p(rejected) of each held-out pair; pairs beyond the context are refused by name."""
        if not self.material.pairs:
            return []
        sides = [
            answer_log_probabilities(model, [self._split(model, tokenizer, row, side) for row in self.material.pairs])
            for side in ("chosen", "rejected")
        ]
        return [chosen - rejected for chosen, rejected in zip(*sides, strict=True)]

    @staticmethod
    def _split(model: Any, tokenizer: Any, row: dict[str, Any], side: str) -> Pair:
        """Token ids of the prompt and of the answer with its end token."""
        encoded = encode_conversation(tokenizer, row["prompt"] + row[side])
        token_ids, marks = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        limit = context_length_of(model)
        if limit is not None and len(token_ids) > limit:
            raise ValueError(f"pair {row.get('id')}: {len(token_ids)} tokens, the model's context is {limit}")
        end = len(marks) - marks[::-1].index(1)
        begin = end - marks[:end][::-1].index(0)
        return token_ids[:begin], token_ids[begin:end]
