"""What a policy's own answers to held-out prompts are worth, beside those of the model that it started from."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from hf_scratch_gpt.alignment.ppo.stage import read_prompt_rows
from hf_scratch_gpt.alignment.scoring import (
    CHECKER,
    MISSING_END,
    CheckerScorer,
    Row,
    Scorer,
    are_task_questions,
)
from hf_scratch_gpt.evaluation.generation import Answer, encode_prompts, generate_answers, suppressed_token_ids
from hf_scratch_gpt.evaluation.intervals import Interval, bootstrap_mean, paired_difference, wilson
from hf_scratch_gpt.evaluation.likelihood import answer_divergences
from hf_scratch_gpt.finetuning.models import load_model
from hf_scratch_gpt.finetuning.tokenise import tokenise
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation
from hf_scratch_gpt.runs import write_text

ANSWERS_FILE = "heldout_answers.jsonl"
_BATCH = 128  # answers sampled together; which ones never changes an answer


@dataclasses.dataclass
class MeasuringArguments:
    """How a stage measures its policy.

    Args:
        eval_prompts (`int`, *optional*, defaults to `256`): Held-out prompts on which the policy is measured, the
            first ones of `eval_dataset`, or of the prepare folder's held-out tasks; 0 measures none.
    """

    eval_prompts: int = dataclasses.field(
        default=256, metadata={"help": "Held-out prompts on which the trained policy is measured; 0 for none."}
    )


def load_prompt_rows(arguments: Any) -> tuple[list[Row], list[Row]]:
    """The rows to answer in training and those held out: `prompt` as messages, and all other columns.

    Raises:
        ValueError: naming a row that is no prompt, or a file without rows.
        OSError: if the data is missing.
    """
    rows = read_checked_rows(arguments.dataset, "train")
    heldout: list[Row] = []
    if arguments.eval_prompts > 0:
        if arguments.eval_dataset or Path(arguments.dataset).is_dir():
            heldout = read_checked_rows(arguments.eval_dataset or arguments.dataset, "heldout")
        elif arguments.heldout_fraction > 0 and len(rows) > 1:
            random.Random(arguments.seed).shuffle(rows)
            count = max(1, round(arguments.heldout_fraction * len(rows)))
            rows, heldout = rows[count:], rows[:count]
    return rows, heldout[: arguments.eval_prompts]


def read_checked_rows(source: str, split: str) -> list[Row]:
    """`read_prompt_rows`, at least one, each with a prompt that is a conversation.

    Raises:
        FileNotFoundError: if a local source is missing.
        ValueError: naming the row and what was found.
    """
    rows = read_prompt_rows(source, split)
    if not rows:
        raise ValueError(f"{source}: holds no rows")
    for number, row in enumerate(rows, start=1):
        prompt = row.get("prompt")
        if not (isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)):
            raise ValueError(
                f"{source}, row {number}: 'prompt' is {prompt!r:.60}, expected text or messages with 'role' and "
                "'content'"
            )
    return rows


def keep_fitting(
    rows: Sequence[Row], tokenizer: Any, longest_answer: int, max_length: int, origin: str, allow_dropped: bool = False
) -> tuple[list[Row], list[list[int]]]:
    """The rows whose prompt leaves room for the longest answer in `max_length` tokens, and their prompts' ids.

    Raises:
        ValueError: naming `origin` and a row, if all rows or more than 1% are too long (the latter unless
            `allow_dropped`).
    """

    def encode(row: Row) -> dict[str, Any]:
        ids = list(encode_conversation(tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"])
        return {"place": row["place"], "input_ids": ids, "length": len(ids) + longest_answer}

    numbered = ({"place": place, "prompt": row["prompt"]} for place, row in enumerate(rows))
    kept, _ = tokenise(
        numbered, encode, f"{origin}, answers of up to {longest_answer} tokens", max_length, allow_dropped
    )
    return [rows[place] for place in kept["place"]], list(kept["input_ids"])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= set(value)


@dataclasses.dataclass
class PolicyAnswers:
    """One sampled answer to each row, with what it got."""

    rows: Sequence[Row]
    answers: list[Answer]
    scores: dict[str, list[float]]

    def write(self, folder: Path) -> None:
        """As `heldout_answers.jsonl`."""
        lines = [
            {
                "prompt": row["prompt"],
                "completion": answer.text,
                "ended": answer.ended,
                **{name: values[place] for name, values in self.scores.items()},
            }
            for place, (row, answer) in enumerate(zip(self.rows, self.answers, strict=True))
        ]
        write_text(folder / ANSWERS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def measure_policy(
    arguments: Any, policy: Any, tokenizer: Any, rows: Sequence[Row], scorers: Sequence[tuple[Scorer, float]]
) -> tuple[dict[str, Any], PolicyAnswers]:
    """Sample one answer to each of `rows` at temperature 1 from `policy` and from `arguments.model_name_or_path`.

    Returns:
        Held-out metrics, and the policy's answers: gold reward (where the rows are task questions) of the policy, of
        the start, and their difference, paired by question; KL from the start along the answers (nats); what each
        scorer says of them; share ended; all with 95% intervals.
    """
    longest, seed = arguments.max_completion_length, arguments.seed
    start = load_model(AutoModelForCausalLM, arguments.model_name_or_path, tokenizer).to(policy.device)
    prompts = [row["prompt"] for row in rows]
    answers = generate_answers(policy, tokenizer, prompts, longest, 1.0, seed, _BATCH)
    scores = score_answers(rows, answers, [scorer for scorer, _ in scorers])
    encoded = encode_prompts(tokenizer, prompts, longest, None)
    pairs = [(ids, answer.token_ids) for ids, answer in zip(encoded, answers, strict=True)]
    kl = answer_divergences(policy, start, pairs, suppressed_token_ids(policy, tokenizer))
    metrics: dict[str, Any] = {"heldout_prompts": len(rows)}
    for name, values in scores.items():
        metrics |= with_interval(f"heldout_{name}", bootstrap_mean(values))
    metrics |= with_interval("heldout_kl", bootstrap_mean(kl))
    metrics |= with_interval("heldout_share_ended", wilson(sum(answer.ended for answer in answers), len(answers)))
    metrics["heldout_response_length"] = sum(answer.tokens for answer in answers) / len(answers)
    if CHECKER in scores:
        before = generate_answers(start, tokenizer, prompts, longest, 1.0, seed, _BATCH)
        gold = CheckerScorer().score(rows, [answer.text for answer in before], [answer.ended for answer in before])
        metrics |= with_interval("heldout_gold_start", bootstrap_mean(gold))
        metrics |= with_interval("heldout_gold_gain", paired_difference(scores[CHECKER], gold))
    return metrics, PolicyAnswers(rows, answers, {**scores, "kl": kl})


def score_answers(rows: Sequence[Row], answers: Sequence[Answer], scorers: Sequence[Scorer]) -> dict[str, list[float]]:
    """What each scorer says of the answers; the checker's verdict is added where it can judge them."""
    texts, ended = [answer.text for answer in answers], [answer.ended for answer in answers]
    asked = [scorer for scorer in scorers if scorer.name != MISSING_END]
    if are_task_questions(rows) and all(scorer.name != CHECKER for scorer in asked):
        asked.append(CheckerScorer())
    return {scorer.name: scorer.score(rows, texts, ended) for scorer in asked}


def with_interval(name: str, interval: Interval) -> dict[str, Any]:
    """A measure under its name, and its 95% interval under `<name>_interval`."""
    return {name: interval.mean, f"{name}_interval": [interval.low, interval.high]}
