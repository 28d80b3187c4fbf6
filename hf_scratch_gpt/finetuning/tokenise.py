"""Conversations and preferences as token ids, with the one rule about what is trained: the answer and its end token.

The prompt is what `add_generation_prompt=True` renders, so that a model is tuned in the very context that it answers
in. What follows the answer's end token (the template's newline) is cut off: nothing is trained there.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

logger = logging.getLogger(__name__)

DROPPED_SHARE = 0.01  # more long rows than this is a mistake in the data or in max_length, not a tail


@dataclasses.dataclass
class Answer:
    """A prompt and one answer to it as token ids; `mask` marks the trained ids, `start` is where the answer begins."""

    input_ids: list[int]
    mask: list[int]
    start: int


class AnswerEncoder:
    """Encodes prompts with answers; control tokens in the text stay text.

    That the template renders a prompt alike with and without an answer is checked once for each sequence of roles:
    encoding every prompt twice would double the work.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._checked_roles: set[tuple[str, ...]] = set()

    def __call__(self, prompt: list[dict], completion: list[dict]) -> Answer:
        """Encode one row.

        Raises:
            ValueError: if the completion does not begin with an assistant message, or the template does not mark the
                assistant's tokens, or renders the prompt differently with and without an answer.
        """
        if not completion or completion[0]["role"] != "assistant":
            raise ValueError(
                "the completion does not begin with an assistant message, so there is nothing to train on"
            )
        whole = encode_conversation(self.tokenizer, prompt + completion)
        input_ids, mask = list(whole["input_ids"]), list(whole["assistant_masks"])
        if 1 not in mask:
            raise ValueError("the chat template marks no assistant tokens ({% generation %}): nothing to train on")
        start = self._answer_start(prompt, completion, input_ids, mask)
        end = len(mask) - mask[::-1].index(1)
        return Answer(input_ids[:end], [0] * start + mask[start:end], start)

    def _answer_start(self, prompt: list[dict], completion: list[dict], input_ids: list[int], mask: list[int]) -> int:
        roles = tuple(message["role"] for message in prompt + completion)
        has_earlier_answers = any(message["role"] == "assistant" for message in prompt)
        if roles in self._checked_roles and not has_earlier_answers:
            return mask.index(1)
        prompt_ids = encode_conversation(self.tokenizer, prompt, add_generation_prompt=True)["input_ids"]
        start = len(prompt_ids)
        if input_ids[:start] != prompt_ids or not mask[start] or (mask.index(1) != start and not has_earlier_answers):
            raise ValueError(
                "the chat template renders the prompt differently when an answer follows; use another one"
            )
        self._checked_roles.add(roles)
        return start


@dataclasses.dataclass
class Examples:
    """Encoded rows to train on and, if there are any, held out; and how many training rows were too long."""

    train: Any
    heldout: Any | None
    dropped: int


def load_examples(
    arguments: Any,
    kind: str,
    encode: Callable[[dict], dict],
    max_length: int,
    own_rows: list[dict] | None = None,
    keep_columns: bool = False,
) -> Examples:
    """Load and encode a stage's `conversations`, `preferences` or `rankings`, with its held-out rows.

    `own_rows`, if given, are trained on in place of the data set's. `keep_columns` shows `encode` the row's other
    columns too.

    Raises:
        ValueError: if a data set is empty, or a row is unusable (named by its number and beginning).
        OSError: if a data set is missing.
    """
    from datasets import Dataset

    from hf_scratch_gpt.data import conversations

    load = functools.partial(getattr(conversations, f"load_{kind}"), keep_columns=keep_columns)
    source, allow = arguments.dataset, arguments.allow_dropped_rows
    rows = load(source, arguments.dataset_split) if own_rows is None else Dataset.from_list(own_rows)
    heldout = _load_heldout(arguments, load)
    heldout_source = arguments.eval_dataset or source
    if heldout is None and arguments.heldout_fraction > 0 and len(rows) > 1:
        count = max(1, round(arguments.heldout_fraction * len(rows)))
        split = rows.train_test_split(test_size=count, seed=arguments.seed)
        rows, heldout = split["train"], split["test"]
    train, dropped = tokenise(rows, encode, f"{source} (training)", max_length, allow)
    if heldout is None:
        return Examples(train, None, dropped)
    return Examples(train, tokenise(heldout, encode, f"{heldout_source} (held out)", max_length, allow)[0], dropped)


def _load_heldout(arguments: Any, load: Callable[..., Any]) -> Any | None:
    """The rows of `eval_dataset`, or of the prepare folder's held-out tasks; `None` if there are neither."""
    if not arguments.eval_dataset and not Path(arguments.dataset).is_dir():
        return None
    source = arguments.eval_dataset or arguments.dataset
    usual = "heldout" if Path(source).is_dir() else None if Path(source).is_file() else "test"
    return load(source, arguments.eval_split or usual)


def tokenise(
    rows: Iterable[dict], encode: Callable[[dict], dict], origin: str, max_length: int, allow_dropped: bool
) -> tuple[Any, int]:
    """Encode rows into a `datasets.Dataset`, dropping those longer than `max_length`; returns it and their number.

    `encode` gives a row's columns, with `length` in tokens.

    Raises:
        ValueError: naming the row, if it cannot be encoded; or naming the first long one, if all rows or more than
            1% are too long (the latter unless `allow_dropped`).
    """
    from datasets import Dataset

    kept: list[dict] = []
    total, long_rows = 0, []
    for number, row in enumerate(rows, start=1):
        total = number
        try:
            encoded = encode(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{origin}, row {number} ({_beginning(row)}): {error}") from error
        if encoded["length"] > max_length:
            long_rows.append((f"row {number} ({_beginning(row)})", encoded["length"]))
        else:
            kept.append(encoded)
    _judge_long_rows(origin, total, long_rows, max_length, allow_dropped)
    return Dataset.from_list(kept), len(long_rows)


def _beginning(row: dict, length: int = 40) -> str:
    """The first words of a row's prompt: numbers alone mislead where a file's row gives several or none."""
    messages = row.get("prompt")
    text = str(messages[-1].get("content", "")) if isinstance(messages, list) and messages else ""
    return repr(text if len(text) <= length else text[:length] + "...")


def _judge_long_rows(origin: str, total: int, long_rows: list, max_length: int, allow_dropped: bool) -> None:
    if not long_rows:
        return
    name, length = long_rows[0]
    first = f"{name} has {length} tokens, and {max_length} fit"
    if len(long_rows) == total:
        raise ValueError(f"{origin}: all {total} rows are too long ({first}); raise max_length or shorten the rows")
    if len(long_rows) > DROPPED_SHARE * total and not allow_dropped:
        raise ValueError(
            f"{origin}: {len(long_rows)} of {total} rows are too long ({first}); raise max_length, shorten the rows, "
            "or set allow_dropped_rows"
        )
    logger.warning("%s: dropping %d of %d rows that are too long (%s)", origin, len(long_rows), total, first)


def conversation_encoder(tokenizer: Any) -> Callable[[dict], dict]:
    """Row with `prompt` and `completion` -> `input_ids`, `labels` (-100 where nothing is trained), `length`."""

    encode_answer = AnswerEncoder(tokenizer)

    def encode(row: dict) -> dict:
        answer = encode_answer(row["prompt"], row["completion"])
        labels = [token if trained else -100 for token, trained in zip(answer.input_ids, answer.mask, strict=True)]
        return {"input_ids": answer.input_ids, "labels": labels, "length": len(labels)}

    return encode


def preference_encoder(tokenizer: Any) -> Callable[[dict], dict]:
    """Row with `prompt`, `chosen`, `rejected` -> `prompt_ids`, `chosen_ids`, `rejected_ids` (answers), `length`."""

    encode_answer = AnswerEncoder(tokenizer)

    def encode(row: dict) -> dict:
        chosen = encode_answer(row["prompt"], row["chosen"])
        rejected = encode_answer(row["prompt"], row["rejected"])
        if chosen.input_ids == rejected.input_ids:
            raise ValueError("'chosen' and 'rejected' are the same")
        return {
            "prompt_ids": chosen.input_ids[: chosen.start],
            "chosen_ids": chosen.input_ids[chosen.start :],
            "rejected_ids": rejected.input_ids[rejected.start :],
            "length": max(len(chosen.input_ids), len(rejected.input_ids)),
        }

    return encode
