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

import numpy as np

from hf_scratch_gpt.data.rejected import REJECTED_FILE, RejectedRows
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation
from hf_scratch_gpt.runs.hardware import rank_and_world_size

logger = logging.getLogger(__name__)

_WHEREABOUTS = ("source_file", "source_row")
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

    def __call__(self, prompt: list[dict], completion: list[dict], tools: list[dict] | None = None) -> Answer:
        """Encode one row; the template announces `tools`, if there are any.

        Raises:
            ValueError: if the completion does not begin with an assistant message, or the template does not mark the
                assistant's tokens, or renders the prompt differently with and without an answer.
        """
        if not completion or completion[0]["role"] != "assistant":
            raise ValueError(
                "the completion does not begin with an assistant message, so there is nothing to train on"
            )
        whole = encode_conversation(self.tokenizer, prompt + completion, tools=tools)
        input_ids, mask = list(whole["input_ids"]), list(whole["assistant_masks"])
        if 1 not in mask:
            raise ValueError("the chat template marks no assistant tokens ({% generation %}): nothing to train on")
        start = self._answer_start(prompt, completion, tools, input_ids, mask)
        end = len(mask) - mask[::-1].index(1)
        return Answer(input_ids[:end], [0] * start + mask[start:end], start)

    def _answer_start(
        self,
        prompt: list[dict],
        completion: list[dict],
        tools: list[dict] | None,
        input_ids: list[int],
        mask: list[int],
    ) -> int:
        roles = (*(message["role"] for message in prompt + completion), *(["tools"] if tools else []))
        has_earlier_answers = any(message["role"] == "assistant" for message in prompt)
        if roles in self._checked_roles and not has_earlier_answers:
            return mask.index(1)
        prompt_ids = encode_conversation(self.tokenizer, prompt, add_generation_prompt=True, tools=tools)["input_ids"]
        start = len(prompt_ids)
        if input_ids[:start] != prompt_ids or not mask[start]:
            raise ValueError(
                "the chat template renders the prompt differently when an answer follows; use another one"
            )
        if mask.index(1) == start:  # some templates mark the end of the prompt too, which is not trained here
            self._checked_roles.add(roles)
        return start


@dataclasses.dataclass
class Examples:
    """Encoded rows to train on and, if there are any, held out.

    Args:
        train, heldout (`datasets.Dataset`): As `encode` made them.
        dropped (`int`): Training rows that were too long.
        rejected (`int`): Rows of all data that are malformed or teach nothing; `rejected.jsonl` lists both kinds.
    """

    train: Any
    heldout: Any | None
    dropped: int
    rejected: int = 0


def load_examples(
    arguments: Any,
    kind: str,
    encode: Callable[[dict], dict],
    max_length: int,
    own_rows: list[dict] | None = None,
    keep_columns: bool = False,
) -> Examples:
    """Load and encode a stage's `conversations`, `preferences` or `rankings`, with its held-out rows.

    Rows that are left out are listed in the run folder's `rejected.jsonl`, also where they stop the run. `own_rows`,
    if given, are trained on in place of the data set's. `keep_columns` shows `encode` the row's other columns too.

    Raises:
        ValueError: if a data set is empty, or too many rows are unusable (naming the first of them).
        OSError: if a data set is missing.
    """
    listed_in = Path(arguments.output_dir) / REJECTED_FILE
    rejected = RejectedRows(arguments.allow_rejected_rows, listed_in)
    from hf_scratch_gpt.data import conversations

    load = functools.partial(getattr(conversations, f"load_{kind}"), keep_columns=keep_columns, rejected=rejected)
    try:
        return _load_examples(arguments, load, encode, max_length, own_rows, rejected)
    finally:
        if rejected.rows and rank_and_world_size()[0] == 0:
            rejected.write(listed_in)


def _load_examples(
    arguments: Any,
    load: Callable[..., Any],
    encode: Callable[[dict], dict],
    max_length: int,
    own_rows: list[dict] | None,
    rejected: RejectedRows,
) -> Examples:
    from datasets import Dataset

    source, allow = arguments.dataset, arguments.allow_dropped_rows
    rows = load(source, arguments.dataset_split) if own_rows is None else Dataset.from_list(own_rows)
    heldout = _load_heldout(arguments, load)
    heldout_source = arguments.eval_dataset or source
    if heldout is None and arguments.heldout_fraction > 0 and len(rows) > 1:
        rows, heldout = hold_out(rows, arguments.heldout_fraction, arguments.seed)
    train, dropped = tokenise(rows, encode, f"{source} (training)", max_length, allow, rejected)
    if heldout is not None:
        heldout = tokenise(heldout, encode, f"{heldout_source} (held out)", max_length, allow, rejected)[0]
    return Examples(train, heldout, dropped, rejected.count("malformed") + rejected.count("useless"))


def hold_out(rows: Any, fraction: float, seed: int) -> tuple[Any, Any | None]:
    """Split rows into those to train on and a held-out `fraction`; what one source row gave stays on one side.

    The answers of one conversation, or the pairs of one ranking, on both sides would measure on what was trained.
    """
    places = rows["source_row"] if "source_row" in rows.column_names else range(len(rows))
    sources = list(dict.fromkeys(places))
    if len(sources) == len(rows):
        split = rows.train_test_split(test_size=max(1, round(fraction * len(rows))), seed=seed)
        return split["train"], split["test"]
    if len(sources) < 2:
        return rows, None
    order = np.random.default_rng(seed).permutation(len(sources))
    held = {sources[index] for index in order[: max(1, round(fraction * len(sources)))]}
    chosen: tuple[list[int], list[int]] = ([], [])
    for index, place in enumerate(places):
        chosen[place in held].append(index)
    return rows.select(chosen[False]), rows.select(chosen[True])


def _load_heldout(arguments: Any, load: Callable[..., Any]) -> Any | None:
    """The rows of `eval_dataset`, or of the prepare folder's held-out tasks; `None` if there are neither."""
    if not arguments.eval_dataset and not Path(arguments.dataset).is_dir():
        return None
    source = arguments.eval_dataset or arguments.dataset
    usual = "heldout" if Path(source).is_dir() else None if Path(source).is_file() else "test"
    return load(source, arguments.eval_split or usual)


def tokenise(
    rows: Iterable[dict],
    encode: Callable[[dict], dict],
    origin: str,
    max_length: int,
    allow_dropped: bool,
    rejected: RejectedRows | None = None,
) -> tuple[Any, int]:
    """Encode rows into a `datasets.Dataset`, dropping those longer than `max_length`; returns it and their number.

    `encode` gives a row's columns, with `length` in tokens. With `rejected`, rows that cannot be encoded are noted
    there, as are long ones, instead of raising at the first.

    Raises:
        ValueError: naming the row, if it cannot be encoded; or naming the first long one, if all rows or more than
            1% are too long (the latter unless `allow_dropped`).
    """
    from datasets import Dataset

    kept: list[dict] = []
    total, long_rows = 0, []
    left_out = RejectedRows() if rejected is None else rejected
    before = len(left_out.rows)
    for number, row in enumerate(rows, start=1):
        total = number
        file, place, name = _whereabouts(row, origin, number)
        try:
            encoded = encode(row)
        except (ValueError, TypeError, KeyError) as error:
            if rejected is None:
                raise ValueError(f"{origin}, {name}: {error}") from error
            rejected.add(file, "malformed", place, str(error), _content(row))
            continue
        if encoded["length"] > max_length:
            long_rows.append((name, encoded["length"]))
            left_out.add(file, "too long", place, f"{encoded['length']} tokens, and {max_length} fit", _content(row))
        else:
            kept.append(encoded)
    left_out.judge(left_out.rows[before:], total)
    _judge_long_rows(origin, total, long_rows, max_length, allow_dropped)
    if not kept:
        raise ValueError(f"{origin}: no usable rows are left of {total}")
    return Dataset.from_list(kept), len(long_rows)


def _whereabouts(row: dict, origin: str, number: int) -> tuple[str, str, str]:
    """The file and the place that a row comes from, and its name in messages."""
    file, place = (row.get(name) for name in _WHEREABOUTS)
    if file is None or place is None:
        return origin, f"row {number}", f"row {number} ({_beginning(row)})"
    return file, place, f"row {number} ({place}: {_beginning(row)})"


def _content(value: Any) -> Any:
    """A row without its whereabouts, and without the empty fields that a table gives to all messages."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if item is not None and name not in _WHEREABOUTS}
        return {name: _content(item) for name, item in kept.items()}
    return [_content(item) for item in value] if isinstance(value, list) else value


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
        answer = encode_answer(row["prompt"], row["completion"], row.get("tools"))
        labels = [token if trained else -100 for token, trained in zip(answer.input_ids, answer.mask, strict=True)]
        return {"input_ids": answer.input_ids, "labels": labels, "length": len(labels)}

    return encode


def preference_encoder(tokenizer: Any) -> Callable[[dict], dict]:
    """Row with `prompt`, `chosen`, `rejected` -> `prompt_ids`, `chosen_ids`, `rejected_ids` (answers), `length`."""

    encode_answer = AnswerEncoder(tokenizer)

    def encode(row: dict) -> dict:
        chosen = encode_answer(row["prompt"], row["chosen"], row.get("tools"))
        rejected = encode_answer(row["prompt"], row["rejected"], row.get("tools"))
        if chosen.input_ids == rejected.input_ids:
            raise ValueError("'chosen' and 'rejected' are the same")
        return {
            "prompt_ids": chosen.input_ids[: chosen.start],
            "chosen_ids": chosen.input_ids[chosen.start :],
            "rejected_ids": rejected.input_ids[rejected.start :],
            "length": max(len(chosen.input_ids), len(rejected.input_ids)),
        }

    return encode
