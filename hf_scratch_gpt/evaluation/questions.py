"""The questions that models are asked: rows of tasks or of a user's own data, zero-shot and few-shot.

A row has `prompt` and `completion` (lists of messages) and, where it comes from our tasks, `family` and `answer`. Rows
of other data get one family, `all`, and the completion's text as their answer; the same checker then serves both.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.rows import read_rows
from hf_scratch_gpt.evaluation.text import separator_id
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_text

Row = dict[str, Any]
FAMILY_OF_OTHER_DATA = "all"


def read_required(path: str | Path, required: Sequence[str]) -> list[Row]:
    """The rows of a file, at least one.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if a row is malformed or lacks a `required` field; names the file and the place.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; make it with the stage 'prepare', tasks included")
    rows = []
    for place, row in read_rows(path):
        missing = [name for name in required if row.get(name) is None]
        if missing:
            raise ValueError(f"{path}, {place}: field '{missing[0]}' is missing")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def with_answers(rows: Iterable[Row]) -> list[Row]:
    """Rows that all have `id`, `family` and `answer`, filled in where missing: the completion answers."""
    filled = []
    for index, row in enumerate(rows):
        family, answer = row.get("family"), row.get("answer")
        filled.append(
            {
                **row,
                "id": str(row.get("id") or index),
                "family": FAMILY_OF_OTHER_DATA if family is None else family,
                "answer": row["completion"][-1]["content"] if answer is None else answer,
            }
        )
    return filled


def pick(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of `items`, drawn by `seed`, in their own order; all of them if `count` is 0."""
    if count <= 0 or count >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def pick_texts(texts: Sequence[str], byte_limit: int, seed: int) -> list[str]:
    """Texts in an order drawn by `seed`, as many as fit into `byte_limit` bytes (at least one); all if it is 0."""
    if byte_limit <= 0:
        return list(texts)
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    chosen: list[str] = []
    total = 0
    for text in shuffled:
        total += len(text.encode("utf-8"))
        if chosen and total > byte_limit:
            break
        chosen.append(text)
    return chosen


def _question(row: Row) -> str:
    return row["prompt"][-1]["content"]


class FewShotPrompts:
    """Plain-text prompts with solved examples of the same family, as in the GPT-3 paper (Brown et al., 2020).

    Plain text, since a base model has never seen the chat markup; the same text goes to every model.

    Args:
        examples: Rows of the training part.
        shots (`int`): Examples before each question; fewer where the context is too short.
        seed (`int`): Seed of the choice of examples.
    """

    def __init__(self, examples: Sequence[Row], shots: int, seed: int):
        self.shots, self.seed = shots, seed
        self._by_family: defaultdict[str, list[Row]] = defaultdict(list)
        for row in examples:
            self._by_family[row["family"]].append(row)

    def _examples_for(self, row: Row) -> list[Row]:
        known = self._by_family.get(row["family"], [])
        generator = random.Random(f"{self.seed} {_question(row)}")
        return generator.sample(known, min(self.shots, len(known)))

    def text(self, row: Row, examples: Sequence[Row]) -> str:
        """The prompt's text: examples, then the question, ending where the answer begins."""
        solved = [f"Question: {_question(example)}\nAnswer: {example['answer']}\n\n" for example in examples]
        return "".join(solved) + f"Question: {_question(row)}\nAnswer:"

    def encode(self, tokenizer: Any, row: Row, max_tokens: int) -> tuple[list[int], int]:
        """Token ids of the prompt, a document of its own, and the number of examples that fitted into `max_tokens`.

        Raises:
            ValueError: if the question alone does not fit.
        """
        examples = self._examples_for(row)
        while True:
            token_ids = [separator_id(tokenizer), *encode_text(tokenizer, self.text(row, examples))]
            if len(token_ids) <= max_tokens:
                return token_ids, len(examples)
            if not examples:
                raise ValueError(
                    f"question {row.get('id', _question(row)[:40])!r}: {len(token_ids)} tokens, and only {max_tokens} "
                    f"are left beside the answer; shorten it or lower max_new_tokens"
                )
            examples = examples[1:]


def first_line(text: str) -> str:
    """The answer in a base model's continuation, which goes on with the next question: its first line with text."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
