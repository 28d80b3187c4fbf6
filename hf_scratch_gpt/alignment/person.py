"""Rankings by a person: a file goes out, the run stops, and goes on when the filled-in file is there.

`to_rank.jsonl` has a line a question: `id`, `prompt`, `answers` (texts) and `ranking`, which is `null`. The person
saves it as `ranked.jsonl` beside it, with `ranking` a list of one place for each answer in the order of `answers`: 1
for the best, the same place for answers that are as good as each other. A line whose ranking stays `null` is passed
over.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.alignment.ranking import Ranking, pairs_by_score
from hf_scratch_gpt.alignment.scoring import Row
from hf_scratch_gpt.data.rows import read_rows
from hf_scratch_gpt.runs import Interrupted, StageRun, write_text

TO_RANK_FILE, RANKED_FILE = "to_rank.jsonl", "ranked.jsonl"


class AwaitsPerson(Interrupted):
    """The run stopped because it is a person's turn."""


def rankings_of_person(stage_run: StageRun, rows: Sequence[Row], texts: Sequence[list[str]]) -> list[Ranking]:
    """The rankings that a person gave; questions that were passed over are left out.

    Raises:
        AwaitsPerson: if `ranked.jsonl` is not there yet; `to_rank.jsonl` is.
        ValueError: naming the line and what is wrong with it.
    """
    ranked = stage_run.folder / RANKED_FILE
    if not ranked.is_file():
        path = stage_run.folder / TO_RANK_FILE
        lines = (
            {"id": name, "prompt": row["prompt"], "answers": answers, "ranking": None}
            for name, row, answers in zip(_names(rows), rows, texts, strict=True)
        )
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        stage_run.note_stop(f"awaits {RANKED_FILE}", 0)
        raise AwaitsPerson(
            f"{path}: {len(rows)} questions await a person: fill in 'ranking' (one place an answer, 1 is the best) "
            f"and save it as {RANKED_FILE} beside it"
        )
    by_name = {name: (row, answers) for name, row, answers in zip(_names(rows), rows, texts, strict=True)}
    places = read_ranked(ranked, {name: answers for name, (_, answers) in by_name.items()})
    rankings = []
    for name, ranking in places.items():
        row, answers = by_name[name]
        scores = [-float(place) for place in ranking]
        rankings.append(Ranking(row, answers, scores, pairs_by_score(scores)))
    return rankings


def _names(rows: Sequence[Row]) -> list[str]:
    return [f"{number:05}" for number in range(1, len(rows) + 1)]


def read_ranked(path: Path, answers: dict[str, list[str]]) -> dict[str, list[int]]:
    """The places that `path` gives to the answers of each question that it ranks.

    Raises:
        ValueError: naming the line, if its question is unknown or came before, its answers are others than those that
            were to be ranked, or its ranking is no list of one place an answer; or if nothing is ranked.
    """
    ranked: dict[str, list[int]] = {}
    for where, line in read_rows(path):
        name, ranking = str(line.get("id")), line.get("ranking")
        if name not in answers or name in ranked:
            reason = "came before" if name in ranked else f"is none of {TO_RANK_FILE}'s"
            raise ValueError(f"{path}, {where}: the id '{name}' {reason}")
        if line.get("answers", answers[name]) != answers[name]:
            raise ValueError(f"{path}, {where}: its 'answers' are not those of {TO_RANK_FILE}; change 'ranking' only")
        if ranking is None:
            continue
        if not _is_ranking(ranking, len(answers[name])):
            raise ValueError(
                f"{path}, {where}: 'ranking' is {ranking!r}, expected {len(answers[name])} places from 1 (the best), "
                "one for each answer"
            )
        ranked[name] = ranking
    if not ranked:
        raise ValueError(f"{path}: ranks nothing; every 'ranking' is null")
    return ranked


def _is_ranking(value: Any, count: int) -> bool:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(isinstance(place, int) and not isinstance(place, bool) and place >= 1 for place in value)
