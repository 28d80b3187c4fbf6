"""DPO on the model's own answers: right ones against wrong ones, of questions that it answered both ways."""

import json
from pathlib import Path

import pytest
import torch
from alignment_tiny import make_model, write_preferences, write_recipe
from safetensors.torch import load_file

from hf_scratch_gpt.alignment import dpo
from hf_scratch_gpt.alignment.own_answers import OWN_ANSWERS_FILE, pairs_of
from hf_scratch_gpt.evaluation.generation import Answer, generate_answers
from hf_scratch_gpt.evaluation.models import load_model
from hf_scratch_gpt.runs import parse_arguments, read_metrics

QUESTION = {
    "prompt": [{"role": "user", "content": "Two and two?"}],
    "completion": [{"role": "assistant", "content": "four"}],
    "answer": "four",
}


def said(text, ended=True):
    return Answer(text, ended, 3)


def rejected(answers):
    pairs = pairs_of(QUESTION, answers)
    assert all(pair["prompt"] == QUESTION["prompt"] for pair in pairs)
    assert all(pair["chosen"] == QUESTION["completion"] for pair in pairs)
    return [pair["rejected"][0]["content"] for pair in pairs]


def test_each_different_wrong_answer_is_rejected_once_where_a_right_one_was_given():
    assert rejected([said("five"), said(" four."), said("six"), said("five")]) == ["five", "six"]


@pytest.mark.parametrize(
    "answers",
    [
        [said("four"), said("four.")],  # always right
        [said("five"), said("six")],  # never right
        [said("four", ended=False), said("five")],  # right so far, but it did not stop
        [said("four"), said("five and so on", ended=False), said("  ")],  # no whole wrong answer
    ],
)
def test_a_question_that_was_not_answered_both_ways_gives_no_pair(answers):
    assert rejected(answers) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "sft")


def ask(number):
    return [{"role": "user", "content": f"What do you say, number {number}?"}]


@pytest.fixture(scope="module")
def questions(model, tmp_path_factory):
    """Questions whose answer is one that the untrained model really gives, so that it is sometimes right."""
    loaded, tokenizer = load_model(str(model))
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    prompts = [ask(number) for number in range(12) for _ in range(150)]
    answers = generate_answers(loaded, tokenizer, prompts, 8, temperature=1.0, seed=42, batch_size=240)
    rows = []
    for number in range(12):
        own = [answer.text for answer in answers[150 * number : 150 * number + 150] if answer.ended]
        answer = next((text for text in own if text.strip()), "nothing")
        rows.append({"prompt": ask(number), "completion": [{"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(**more):
    own = {"own_answer_questions": 12, "own_answers_per_question": 150, "own_answer_tokens": 8}
    return {**own, "max_steps": 4, "lora_modules_to_save": ["model.norm"], **more}


def align(folder, model, questions, **more):
    recipe = write_recipe(folder, model, questions, **settings(**more))
    return dpo.run(parse_arguments(dpo.Arguments, [recipe]))


def test_it_trains_on_pairs_of_its_own_making_and_trains_the_norm_whole(model, questions, tmp_path):
    folder = align(tmp_path / "dpo", model, questions)
    pairs = [json.loads(line) for line in (folder / OWN_ANSWERS_FILE).read_text().splitlines()]
    truth = {
        row["prompt"][0]["content"]: row["completion"]
        for row in map(json.loads, Path(questions).read_text().splitlines())
    }
    assert pairs
    assert all(pair["chosen"] == truth[pair["prompt"][0]["content"]] != pair["rejected"] for pair in pairs)
    metrics = read_metrics(folder)["metrics"]
    assert metrics["preferences"] == "own answers"
    assert metrics["pairs"] + metrics["heldout_pairs"] == len(pairs)
    start, end = (load_file(path / "model.safetensors") for path in (model, folder))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if "_proj" in name} | {"model.norm.weight"}


def test_answers_that_were_given_are_not_asked_again(model, questions, tmp_path, monkeypatch):
    first = align(tmp_path / "first", model, questions)
    folder = tmp_path / "second"
    monkeypatch.setattr(dpo, "train_and_save", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        align(folder, model, questions)
    assert (folder / OWN_ANSWERS_FILE).read_bytes() == (first / OWN_ANSWERS_FILE).read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr("hf_scratch_gpt.alignment.own_answers.generate_answers", lambda *arguments: 1 / 0)
    align(folder, model, questions)


def test_a_model_that_is_never_right_is_told(model, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"Number {number}?", "answer": "a long answer that nobody guesses"} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match="gave 0 pairs of a right and a wrong answer, not enough for one batch of 4; ask more"
    ):
        align(tmp_path / "dpo", model, str(path), own_answers_per_question=2)


def test_a_prepare_folders_preferences_serve_where_own_answers_do_not(model, tmp_path, caplog):
    tasks = tmp_path / "prepare" / "tasks"
    tasks.mkdir(parents=True)
    rows = [{"question": f"Number {number}?", "answer": "a long answer that nobody guesses"} for number in range(3)]
    (tasks / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_preferences(tasks / "preferences_train.jsonl")
    write_preferences(tasks / "preferences_heldout.jsonl", count=6)
    folder = align(tmp_path / "dpo", model, str(tasks.parent), own_answers_per_question=2)
    assert "the data set's own preferences are taken instead" in caplog.text
    metrics = read_metrics(folder)["metrics"]
    assert metrics["preferences"] == "dataset"
    assert (metrics["pairs"], metrics["heldout_pairs"]) == (40, 6)


def test_numbers_that_make_no_pairs_are_refused_by_name(model, questions, tmp_path):
    with pytest.raises(ValueError, match="'own_answers_per_question' is 1, expected at least 2"):
        align(tmp_path / "dpo", model, questions, own_answers_per_question=1)
