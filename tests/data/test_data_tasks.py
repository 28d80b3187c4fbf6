import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from hf_scratch_gpt.data.tasks import chance_level, gold_reward, is_exact, write_tasks
from hf_scratch_gpt.data.tasks.families import TUNING_SHARES
from hf_scratch_gpt.data.tasks.phrasings import HELDOUT, TUNING
from hf_scratch_gpt.data.tasks.splits import words_of

NAMES = ("train", "heldout", "preferences_train", "preferences_heldout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    counts = write_tasks(folder)
    assert {name: sum(of.values()) for name, of in counts.items()} == {
        name: len((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) for name in NAMES
    }
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in NAMES
    }


def question(row):
    return row["prompt"][0]["content"]


def all_text(row):
    return " ".join(message["content"] for column in row.values() if isinstance(column, list) for message in column)


def test_heldout_names_occur_nowhere_in_tuning(data):
    seen = set()
    for row in data["train"] + data["preferences_train"]:
        seen |= words_of(all_text(row))
    pairs = {row["name"] for name in NAMES[::2] for row in data[name] if row["family"] == "arithmetic"}
    for row in data["heldout"] + data["preferences_heldout"]:
        if row["family"] == "arithmetic":
            assert row["name"] not in pairs
        else:
            assert row["name"] not in seen, row


def test_heldout_wordings_occur_nowhere_in_tuning(data):
    tuned = {row["phrasing"] for row in data["train"] + data["preferences_train"]}
    assert not tuned & {row["phrasing"] for row in data["heldout"] + data["preferences_heldout"]}
    assert TUNING.keys() == HELDOUT.keys()
    for kind in TUNING:
        assert len(set(TUNING[kind])) >= 8, kind
        assert len(set(HELDOUT[kind])) >= 3, kind
        known = [words_of(text.lower()) for text in TUNING[kind]]
        for text in HELDOUT[kind]:  # not the same words in another order or with other punctuation
            words = words_of(text.lower())
            assert max(len(words & other) / len(words | other) for other in known) < 0.75, (kind, text)


def test_operand_pairs_are_split_in_any_order(data):
    def operands(rows):
        return {frozenset(row["name"].split(",")) for row in rows if row["family"] == "arithmetic"}

    assert not operands(data["train"] + data["preferences_train"]) & operands(
        data["heldout"] + data["preferences_heldout"]
    )


def test_rows_have_the_agreed_columns_and_the_answer_is_exact(data):
    for name in NAMES:
        assert len({row["id"] for row in data[name]}) == len(data[name])
        for row in data[name]:
            assert row["prompt"][0]["role"] == "user"
            answer = row["chosen" if "chosen" in row else "completion"]
            assert answer == [{"role": "assistant", "content": row["answer"]}]
            assert is_exact(row, row["answer"])
            assert row["answer"] == row["answer"].strip() != ""
            assert row["answer"].isprintable()


def test_there_are_enough_rows_of_every_family_and_prompts_are_short(data):
    assert len(data["train"]) >= 12_000
    assert len(data["heldout"]) >= 900
    assert len(data["preferences_train"]) >= 4_000
    assert len(data["preferences_heldout"]) >= 700
    for name in NAMES:
        families = Counter(row["family"] for row in data[name])
        assert families.keys() == TUNING_SHARES.keys()
        assert max(families.values()) <= 0.2 * len(data[name])
        # 3 bytes a token: 128 tokens at most, about 40 on average
        assert max(len(question(row)) for row in data[name]) <= 384
        assert sum(len(question(row)) for row in data[name]) / len(data[name]) <= 180


def test_tuning_prompts_are_all_different_and_none_is_a_preference_prompt(data):
    prompts = [question(row) for row in data["train"]]
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & {question(row) for row in data["preferences_train"]}


def test_no_constant_answer_gets_far(data):
    assert chance_level(data["heldout"]) <= 0.12


def test_open_book_questions_show_their_answer(data):
    for row in data["heldout"]:
        if row["family"] in (
            "summary",
            "signature",
            "returns",
            "module_of",
            "class_base",
            "raises",
            "parameter",
            "default",
        ):
            assert row["answer"] in question(row)
        if row["family"] == "module_closed_book":
            assert "\n" not in question(row)


def test_arithmetic_answers_are_right(data):
    for row in data["heldout"] + data["train"]:
        if row["family"] == "arithmetic":
            small, large = map(int, row["name"].split(","))
            assert int(row["answer"]) == (small + large if "sum" in row["phrasing"] else large - small)


def test_rejected_answers_are_wrong_and_plausible(data):
    kinds = Counter()
    for row in data["preferences_train"] + data["preferences_heldout"]:
        rejected = row["rejected"][0]["content"]
        assert rejected
        assert not is_exact(row, rejected)
        assert gold_reward(row, rejected) <= 0.5
        kinds[row["kind"]] += 1
    assert all(count / kinds.total() >= 0.1 for count in kinds.values())
    assert len(kinds) == 4


@pytest.mark.parametrize("name", ["preferences_train", "preferences_heldout"])
def test_length_does_not_tell_the_preferred_answer(data, name):
    lengths = [(len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"])) for row in data[name]]
    longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths) / len(lengths)
    assert 0.4 <= longer <= 0.6
    chosen, rejected = (sum(side) / len(lengths) for side in zip(*lengths, strict=True))
    assert abs(chosen - rejected) <= 0.15 * chosen


def test_the_same_seed_gives_the_same_bytes_in_another_process(folder, tmp_path):
    code = "import sys; from hf_scratch_gpt.data.tasks import write_tasks; write_tasks(sys.argv[1])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()


def test_another_seed_splits_other_names(data, tmp_path):
    write_tasks(tmp_path, seed=1, train_rows=200, heldout_rows=200, train_pairs=50, heldout_pairs=50)
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["name"] for row in rows} - {row["name"] for row in data["heldout"]}
