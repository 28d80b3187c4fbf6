"""Several answers to each of many prompts, part by part, so that a run that was killed does not ask again."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from hf_scratch_gpt.alignment.scoring import Row
from hf_scratch_gpt.evaluation.generation import Answer, generate_answers
from hf_scratch_gpt.runs import Interrupted, StageRun, read_json, write_json
from hf_scratch_gpt.runs.signals import StopRequest
from hf_scratch_gpt.runs.training import progress_bar

_ANSWERS_A_PART = 512  # sampled, then kept: what a kill can lose
_BATCH = 128  # answers sampled together; which ones never changes an answer


@dataclasses.dataclass
class SamplingArguments:
    """What a stage samples before it does anything else.

    Args:
        questions (`int`, *optional*, defaults to `1000`): Prompts of `dataset` that are answered, drawn by the seed; 0
            takes all.
        answers_per_question (`int`, *optional*, defaults to `8`): Answers to each.
        max_completion_length (`int`, *optional*, defaults to `64`): Longest answer in tokens.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of the sampling.
    """

    questions: int = dataclasses.field(default=1000, metadata={"help": "Prompts that are answered; 0 takes all."})
    answers_per_question: int = dataclasses.field(default=8, metadata={"help": "Answers to each prompt."})
    max_completion_length: int = dataclasses.field(default=64, metadata={"help": "Longest answer in tokens."})
    temperature: float = dataclasses.field(default=1.0, metadata={"help": "Temperature of the sampling."})

    def check_sampling(self, least: int) -> None:
        """Refuse numbers that sample nothing, or fewer than `least` answers to a question.

        Raises:
            ValueError: naming the setting.
        """
        bounds = (("questions", 0), ("answers_per_question", least), ("max_completion_length", 1))
        for name, smallest in bounds:
            if getattr(self, name) < smallest:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected at least {smallest}")
        if not self.temperature > 0:
            raise ValueError(f"'temperature' is {self.temperature}, expected above 0: else all answers are the same")

    def sampling(self) -> dict[str, Any]:
        """The last arguments of `sample_answers`."""
        return {
            "count": self.answers_per_question,
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "seed": self.seed,  # type: ignore[attr-defined]  # of the stage's settings
        }


def unique_prompts(rows: Sequence[Row]) -> list[Row]:
    """The first row of each different prompt: answers to one that comes twice would be drawn alike."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(json.dumps(row["prompt"], sort_keys=True), row)
    return list(first.values())


def in_parts(
    stage_run: StageRun, name: str, items: Sequence[Any], size: int, work: Callable[[Sequence[Any]], list[Any]]
) -> list[Any]:
    """`work` on `size` of the `items` at a time; one result an item, in their order.

    Args:
        stage_run: Whose `checkpoints` keep the parts that are done.
        name: What the results are, which begins the parts' file names.
        work: Gives plain JSON values, the same for the same items.

    Raises:
        Interrupted: if a signal stopped it; the parts that are done are kept.
    """
    results: list[Any] = []
    stage_run.checkpoints.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop, progress_bar(f"{stage_run.stage}: {name}", len(items)) as bar:
        for number, start in enumerate(range(0, len(items), size)):
            kept = stage_run.checkpoints / f"{name}-{number:05}.json"
            if kept.is_file():
                part = read_json(kept)
            else:
                part = work(items[start : start + size])
                if stage_run.is_main:
                    write_json(kept, part)
            results += part
            bar.update(len(results) - bar.n)
            if stop.requested:
                done = f"{len(results)} of {len(items)} {name}"
                raise Interrupted(f"{stage_run.folder}: stopped by {stop.requested} after {done}")
    return results


def sample_answers(
    stage_run: StageRun,
    name: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    count: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[Answer]]:
    """`count` answers to the prompt of each of `rows`, a pure function of the model, the rows and `seed`.

    Args:
        stage_run: Whose `checkpoints` keep the parts that are done.
        name: Begins the parts' file names.
        rows: With different prompts, see `unique_prompts`.

    Raises:
        ValueError: if a prompt does not fit the model's context.
        Interrupted: if a signal stopped it; what is sampled is kept.
    """

    def work(part: Sequence[Row]) -> list[Any]:
        prompts = [row["prompt"] for row in part for _ in range(count)]
        flat = generate_answers(model, tokenizer, prompts, max_new_tokens, temperature, seed, _BATCH)
        return [[vars(answer) for answer in flat[at : at + count]] for at in range(0, len(flat), count)]

    sampled = in_parts(stage_run, name, rows, max(1, _ANSWERS_A_PART // count), work)
    return [[Answer(**{**entry, "token_ids": tuple(entry["token_ids"])}) for entry in answers] for answers in sampled]
