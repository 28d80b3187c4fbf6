"""Makes the rows: words the questions, draws them by split and by family, and writes them as JSON lines."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from hf_scratch_gpt.data.tasks.families import FREE, OF_DEFINITIONS, TUNING_SHARES, Pool, Question
from hf_scratch_gpt.data.tasks.functions import read_definitions
from hf_scratch_gpt.data.tasks.phrasings import WORDINGS
from hf_scratch_gpt.data.tasks.preferences import RejectedAnswers
from hf_scratch_gpt.data.tasks.splits import heldout_names, make_pools, words_of
from hf_scratch_gpt.runs import write_text

LONGEST_PROMPT = 330
# No single answer may make up more of a family than this, or guessing it would look like skill.
LARGEST_SHARE_OF_ONE_ANSWER = 0.2
HELDOUT_SHARES = {family: 0.04 if family == "module_closed_book" else 0.96 / 11 for family in TUNING_SHARES}
PREFERENCE_SHARES = {family: 0.03 if family == "module_closed_book" else 0.97 / 11 for family in TUNING_SHARES}


def write_tasks(
    folder: str | Path,
    seed: int = 42,
    train_rows: int = 20_000,
    heldout_rows: int = 1_000,
    train_pairs: int = 10_000,
    heldout_pairs: int = 800,
) -> dict[str, dict[str, int]]:
    """Write the embedded question set and its preference pairs, made from the running interpreter's standard library.

    The same seed and interpreter give the same bytes. Held-out rows use names, words, operands **and** wordings that
    occur in no tuning row. The sources that the questions are about may well be part of the text that a model was
    pretrained on, held-out names too: open-book questions show all that they need, so what is measured is reading;
    only `module_closed_book` measures what was remembered.

    Args:
        folder (`str` or `Path`): gets `train.jsonl`, `heldout.jsonl`, `preferences_train.jsonl` and
            `preferences_heldout.jsonl`.
        seed (`int`, *optional*, defaults to 42): decides the split and every draw.
        train_rows, heldout_rows, train_pairs, heldout_pairs (`int`, *optional*): rows wanted; a family that runs out
            gives fewer.

    Returns:
        `dict`: file name without ending -> family -> number of rows.

    Raises:
        ValueError: if the interpreter has no sources to read.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    definitions = read_definitions()
    pools = make_pools(definitions, seed)
    forbidden = heldout_names(definitions, seed)
    counts = {}
    for split, rows_wanted, pairs_wanted in (
        ("train", train_rows, train_pairs),
        ("heldout", heldout_rows, heldout_pairs),
    ):
        names = forbidden if split == "train" else set()
        shares = TUNING_SHARES if split == "train" else HELDOUT_SHARES
        rows = make_rows(pools[split], split, shares, rows_wanted, seed, names)
        asked = {row["prompt"][0]["content"] for row in rows} if split == "train" else set()
        pairs = make_pairs(pools[split], split, pairs_wanted, seed, names, asked)
        for name, made in ((split, rows), (f"preferences_{split}", pairs)):
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
            counts[name] = dict(sorted(Counter(row["family"] for row in made).items()))
    return counts


def make_rows(
    pool: Pool, split: str, shares: Mapping[str, float], total: int, seed: int, forbidden: set[str]
) -> list[dict[str, Any]]:
    """Task rows of a split in a random order, `shares` of `total` a family; none contains a word of `forbidden`."""
    rows = []
    for family, share in shares.items():
        random = Random(f"{seed}/{split}/{family}")
        wanted = round(total * share)
        drawn = _draw(pool, family, split, wanted, random, forbidden, set())
        rows += [_task_row(question, wording, prompt) for question, wording, prompt in drawn]
    Random(f"{seed}/{split}/order").shuffle(rows)
    return rows


def make_pairs(
    pool: Pool, split: str, total: int, seed: int, forbidden: set[str], asked: set[str]
) -> list[dict[str, Any]]:
    """Preference rows of a split; no prompt is one of `asked`."""
    rows = []
    for family, share in PREFERENCE_SHARES.items():
        random = Random(f"{seed}/preferences/{split}/{family}")
        rejected_answers = RejectedAnswers(pool, random)
        for question, wording, prompt in _draw(pool, family, split, round(total * share), random, forbidden, asked):
            drawn = rejected_answers.draw(question)
            if drawn and not words_of(drawn[1]) & forbidden:
                rows.append(_preference_row(question, wording, prompt, *drawn))
    Random(f"{seed}/preferences/{split}/order").shuffle(rows)
    return rows


def _draw(
    pool: Pool, family: str, split: str, wanted: int, random: Random, forbidden: set[str], asked: set[str]
) -> list[tuple[Question, str, str]]:
    """Up to `wanted` different (question, wording key, prompt) of one family."""
    drawn: list[tuple[Question, str, str]] = []
    seen, answers = set(asked), Counter[str]()
    most_of_one_answer = max(2, int(wanted * LARGEST_SHARE_OF_ONE_ANSWER))
    for question in _questions(pool, family, wanted, random):
        if len(drawn) >= wanted:
            break
        wording, prompt = _word(question, split, random)
        shown = words_of(prompt) | words_of(question.answer)
        if prompt in seen or len(prompt) > LONGEST_PROMPT or shown & forbidden:
            continue
        if answers[question.answer] >= most_of_one_answer:
            continue
        seen.add(prompt)
        answers[question.answer] += 1
        drawn.append((question, wording, prompt))
    return drawn


def _questions(pool: Pool, family: str, wanted: int, random: Random) -> Iterator[Question]:
    """Questions of a family without end in sight: every definition once in random order, then again, a few times."""
    if family in FREE:
        for _ in range(4 * wanted):
            if question := FREE[family](pool, random):
                yield question
        return
    for _ in range(4):
        for definition in random.sample(pool.definitions, len(pool.definitions)):
            if question := OF_DEFINITIONS[family](definition, pool, random):
                yield question


def _word(question: Question, split: str, random: Random) -> tuple[str, str]:
    """(key of the wording, prompt): one of the split's wordings, with the code before or after it."""
    wordings = WORDINGS[split][question.wording]
    index = random.randrange(len(wordings))
    text = wordings[index].format(name=question.name, **question.fields)
    if question.code:
        text = f"{question.code}\n{text}" if random.random() < 0.5 else f"{text}\n{question.code}"
    return f"{question.wording}/{split}-{index}", text


def _task_row(question: Question, wording: str, prompt: str) -> dict[str, Any]:
    return {
        **_identity(question, wording, prompt),
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": question.answer}],
        "answer": question.answer,
    }


def _preference_row(question: Question, wording: str, prompt: str, kind: str, rejected: str) -> dict[str, Any]:
    return {
        **_identity(question, wording, prompt),
        "kind": kind,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": question.answer}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "answer": question.answer,
    }


def _identity(question: Question, wording: str, prompt: str) -> dict[str, str]:
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return {"id": f"{question.family}-{digest}", "family": question.family, "phrasing": wording, "name": question.name}
