"""What answers are scored by in the stages that sample them: a reward model, the checker, a function of the user's.

A scorer gets whole rows of the data set, the answers' texts and whether each ended, and gives one number an answer.
The text is scored as the reward model was trained to read it: the whole conversation as the chat template renders it,
with the end token only where the answer really ended.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hf_scratch_gpt.data.tasks import gold_reward
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

Row = dict[str, Any]
CHECKER, MISSING_END = "gold", "missing_end"
_BATCH = 64  # conversations scored at once; which ones never changes a score


class Scorer(Protocol):
    """`name` is what it is called in logs; `score` gives one number for each answer."""

    name: str

    def score(self, rows: Sequence[Row], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The score of each answer `texts[i]` to `rows[i]["prompt"]`."""
        ...


@dataclasses.dataclass
class ScoringArguments:
    """What a stage that samples answers scores them by; the weighted sum of all that are given.

    Args:
        reward_model (`str`, *optional*): Folder or Hub id of a sequence classifier with one label. Its scores are
            shifted and scaled by the `reward_mean` and `reward_std` of its config.
        reward_function (`str`, *optional*): `module:function` of the user's own, called as TRL calls one, with
            `prompts`, `completions` (lists of messages) and each column of the data set; it gives one number each.
        reward_function_weight (`float`, *optional*, defaults to `1.0`): Its weight.
        checker_weight (`float`, *optional*, defaults to `0.0`): Weight of the checker's verdict on task questions; at
            0 it is only logged.
        missing_end_penalty (`float`, *optional*, defaults to `1.0`): Taken off the score of an answer that did not
            end.
    """

    reward_model: str = dataclasses.field(
        default="", metadata={"help": "Folder or Hub id of the reward model: one label."}
    )
    reward_function: str = dataclasses.field(
        default="", metadata={"help": "A function of yours as module:function, called as TRL calls a reward function."}
    )
    reward_function_weight: float = dataclasses.field(
        default=1.0, metadata={"help": "Weight of reward_function beside the reward model."}
    )
    checker_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the checker's verdict on task questions; 0 only logs it."}
    )
    missing_end_penalty: float = dataclasses.field(
        default=1.0, metadata={"help": "Taken off the score of an answer that did not end by an end token."}
    )

    def check_scoring(self) -> None:
        """Refuse settings that score nothing.

        Raises:
            ValueError: naming what is missing or out of range.
        """
        if not (self.reward_model or self.reward_function or self.checker_weight):
            raise ValueError(
                "nothing scores the answers: give a 'reward_model', a 'checker_weight' for task questions, or a "
                "'reward_function' of your own"
            )
        if self.missing_end_penalty < 0:
            raise ValueError(
                f"'missing_end_penalty' is {self.missing_end_penalty}, expected 0 or more: it is taken off"
            )


class ModelScorer:
    """A reward model with its own tokenizer; scores are normalised as its config says.

    Raises:
        OSError, ValueError: if the folder holds no reward model, or its config no usable mean and deviation.
    """

    name = "reward_model"

    def __init__(self, folder: str):
        from hf_scratch_gpt.evaluation.models import load_reward_model

        self.folder = folder
        self.model, self.tokenizer = load_reward_model(folder)
        config = self.model.config
        self.mean, self.std = float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0))
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"{folder}: reward_mean {self.mean}, reward_std {self.std}; expected a deviation above 0")

    def score(self, rows: Sequence[Row], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """Normalised rewards: 0 and deviation 1 for the answers that were preferred in its training.

        Raises:
            ValueError: if a conversation is longer than the reward model's context.
        """
        from hf_scratch_gpt.evaluation.mode import context_length_of
        from hf_scratch_gpt.finetuning.scoring import score_rewards

        encoded = [
            encode_answered(self.tokenizer, row["prompt"], text, has_ended)
            for row, text, has_ended in zip(rows, texts, ended, strict=True)
        ]
        limit, longest = context_length_of(self.model), max(map(len, encoded), default=0)
        if limit is not None and longest > limit:
            raise ValueError(
                f"reward model {self.folder}: a prompt and its answer have {longest} tokens, its context is {limit}; "
                "shorten the prompts or the answers"
            )
        raw = score_rewards(self.model, encoded, self.tokenizer.pad_token_id, _BATCH)
        return [(value - self.mean) / self.std for value in raw]


def encode_answered(tokenizer: Any, prompt: list[dict[str, Any]], text: str, ended: bool) -> list[int]:
    """Ids of a conversation with its answer; without the end token, and what follows it, where the answer has none."""
    messages = [*prompt, {"role": "assistant", "content": text}]
    ids = list(encode_conversation(tokenizer, messages)["input_ids"])
    if ended:
        return ids
    last = max((place for place, token in enumerate(ids) if token == tokenizer.eos_token_id), default=len(ids))
    return ids[:last]


class CheckerScorer:
    """The checker's reward in [0, 1] of answers to task questions."""

    name = CHECKER

    def score(self, rows: Sequence[Row], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """1 for the exact answer, less for a near miss; see `data.tasks.checker`."""
        return [gold_reward(row, text) for row, text in zip(rows, texts, strict=True)]


class MissingEndScorer:
    """-1 for an answer that did not end, else 0: TRL reads an answer without its end token, and would not know."""

    name = MISSING_END

    def score(self, rows: Sequence[Row], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """What the penalty's weight multiplies."""
        return [0.0 if has_ended else -1.0 for has_ended in ended]


class FunctionScorer:
    """A function of the user's own; `origin` names it in messages."""

    name = "reward_function"

    def __init__(self, function: Callable[..., Any], origin: str):
        self.function, self.origin = function, origin

    def score(self, rows: Sequence[Row], texts: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """Its scores, checked.

        Raises:
            ValueError: if it raises, or does not give one finite number an answer.
        """
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in rows] for name in names}
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        try:
            scores = self.function(prompts=[row["prompt"] for row in rows], completions=completions, **columns)
        except Exception as error:
            raise ValueError(f"reward function '{self.origin}' raised {type(error).__name__}: {error}") from error
        return checked_numbers(scores, len(rows), f"reward function '{self.origin}'")


def checked_numbers(values: Any, count: int, who: str) -> list[float]:
    """`values` as `count` finite numbers.

    Raises:
        ValueError: that says what `who` returned instead.
    """
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who} returned no list of numbers: {error}") from error
    if len(numbers) != count:
        raise ValueError(f"{who} returned {len(numbers)} numbers for {count} answers")
    bad = next((place for place, number in enumerate(numbers) if not math.isfinite(number)), None)
    if bad is not None:
        raise ValueError(f"{who} returned {numbers[bad]} for answer {bad}")
    return numbers


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that a `setting` names as `module:function`; nothing is imported but what the user named.

    Raises:
        ValueError: if the name has another form, or there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name.isidentifier() and all(map(str.isidentifier, module_name.split(".")))):
        raise ValueError(f"'{setting}' is '{name}', expected module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"'{setting}': cannot import '{module_name}' ({error}); is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"'{setting}': the module '{module_name}' has no function '{function_name}'")
    return function


def are_task_questions(rows: Sequence[Row]) -> bool:
    """Whether the checker can judge answers to all of `rows`."""
    return bool(rows) and all(row.get("answer") and "family" in row for row in rows)


def build_scorers(arguments: Any, rows: Sequence[Row]) -> list[tuple[Scorer, float]]:
    """The scorers that `ScoringArguments` ask for, each with its weight; the checker too where it only looks on.

    Args:
        rows: All rows that will be answered.

    Raises:
        OSError, ValueError: if one cannot be had, or the checker has rows that it cannot judge.
    """
    arguments.check_scoring()
    scorers: list[tuple[Scorer, float]] = []
    if arguments.reward_model:
        scorers.append((ModelScorer(arguments.reward_model), 1.0))
    if arguments.reward_function:
        function = load_function(arguments.reward_function, "reward_function")
        scorers.append((FunctionScorer(function, arguments.reward_function), arguments.reward_function_weight))
    if are_task_questions(rows):
        scorers.append((CheckerScorer(), arguments.checker_weight))
    elif arguments.checker_weight:
        raise ValueError(
            f"'checker_weight' is {arguments.checker_weight}, but {arguments.dataset} has rows that are no task "
            "questions (no 'answer' and 'family'), which the checker cannot judge"
        )
    scorers.append((MissingEndScorer(), arguments.missing_end_penalty))
    return scorers


def total_scores(
    scorers: Sequence[tuple[Scorer, float]], rows: Sequence[Row], texts: Sequence[str], ended: Sequence[bool]
) -> list[float]:
    """The weighted sum of what the scorers say; one of weight 0 is not asked."""
    totals = [0.0] * len(rows)
    for scorer, weight in scorers:
        if weight:
            scores = scorer.score(rows, texts, ended)
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
    return totals
