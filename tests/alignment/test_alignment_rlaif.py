"""Rankings and preferences: their arithmetic, whole runs by each kind of judge, and a person who fills in a file."""

import json

import pytest
from relatives_tiny import arguments_of, make_inputs, make_rows, read_lines, write_lines

from hf_scratch_gpt.alignment import dpo, rlaif
from hf_scratch_gpt.alignment.judges import FunctionJudge
from hf_scratch_gpt.alignment.person import AwaitsPerson, read_ranked
from hf_scratch_gpt.alignment.ranking import (
    Ranking,
    comparable,
    gold_metrics,
    judge_metrics,
    pairs_by_score,
    rank_by_verdicts,
)
from hf_scratch_gpt.cli import main
from hf_scratch_gpt.data.conversations import load_preferences
from hf_scratch_gpt.evaluation.generation import Answer
from hf_scratch_gpt.runs import Interrupted, read_metrics

# ---- Arithmetic


def test_a_verdict_is_the_mean_of_both_orders_and_even_is_no_preference():
    (row,) = make_rows(1)
    verdicts = [[0, 1, 0.9, 0.7], [0, 2, 1.0, 0.0], [1, 2, None, 0.9]]
    ranking = rank_by_verdicts(row, ["a", "b", "c"], verdicts, least_margin=0.0)
    assert ranking.pairs == [(0, 1, pytest.approx(0.6))]
    assert ranking.scores == [pytest.approx((0.8 + 0.5) / 2), pytest.approx(0.2), 0.5]
    assert rank_by_verdicts(row, ["a", "b", "c"], verdicts, least_margin=0.7).pairs == []
    (pair,) = ranking.preferences()
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("a", "b")
    assert [answer[0]["content"] for answer in ranking.record()["completions"]] == ["a", "c", "b"]
    assert ranking.record()["ranks"] == [1, 2, 3]
    assert Ranking(row, ["a", "b", "c", "d"], [1.0, 3.0, 1.0, 0.0], []).record()["ranks"] == [1, 2, 2, 4]


def test_scores_give_all_pairs_but_those_of_equals():
    assert sorted(pairs_by_score([1.0, 3.0, 1.0])) == [(1, 0, 2.0), (1, 2, 2.0)]
    assert pairs_by_score([1.0, 3.0, 0.0], least_margin=2.0) == [(1, 2, 3.0)]


def test_how_far_a_judge_agrees_with_itself_is_counted():
    verdicts = [[0, 1, 0.9, 0.6], [0, 1, 0.9, 0.2], [0, 1, 0.1, 0.2], [0, 1, 0.5, 0.5], [0, 1, None, 0.5]]
    metrics = judge_metrics(verdicts)
    assert (metrics["comparisons"], metrics["unreadable_comparisons"]) == (5, 1)
    assert metrics["order_agreement"] == 2 / 4
    # The first place got 0.9, 0.9, 0.1, 0.5 in one order and 0.4, 0.8, 0.8, 0.5 in the other.
    assert metrics["first_place_share"] == pytest.approx((0.9 + 0.9 + 0.1 + 0.5 + 0.4 + 0.8 + 0.8 + 0.5) / 8)


def test_a_judge_is_held_against_the_checker():
    red, green = make_rows(2)
    rankings = [
        Ranking(red, ["red", "blue", "black"], [2, 1, 0], [(0, 1, 1), (0, 2, 1), (1, 2, 1)]),
        Ranking(green, ["red", "green"], [1, 0], [(0, 1, 1)]),
    ]
    metrics = gold_metrics(rankings)
    assert (metrics["gold_pairs"], metrics["gold_agreement"]) == (3, pytest.approx(2 / 3))
    assert gold_metrics([Ranking({"prompt": []}, ["a"], [0], [])]) == {}


def test_only_different_answers_that_ended_are_compared():
    answers = [Answer("a", True, 1), Answer("b", False, 1), Answer("a", True, 1), Answer(" ", True, 1)]
    assert comparable([*answers, Answer("c", True, 1)]) == ["a", "c"]


# ---- Whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs, output, **judge):
    chosen = {
        "model_name_or_path": inputs / "sft",
        "dataset": inputs / "prepare",
        "output_dir": output,
        "questions": 20,
        "answers_per_question": 4,
        "max_completion_length": 8,
        "judge_prompt": "{question} A {first} B {second}",
        **(judge or {"judge_function": "relatives_tiny:prefers_blue"}),
    }
    return arguments_of(rlaif, **chosen)


@pytest.fixture(scope="module")
def ranked(inputs, tmp_path_factory):
    return rlaif.run(settings(inputs, tmp_path_factory.mktemp("runs") / "ranked"))


def test_what_is_preferred_is_what_the_judge_prefers(ranked):
    pairs, metrics = read_lines(ranked / rlaif.PREFERENCES_FILE), read_metrics(ranked)["metrics"]
    assert metrics["pairs"] == len(pairs) > 10
    for pair in pairs:
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen.startswith("blue")
        assert not rejected.startswith("blue")
    assert (metrics["ranked_by"], metrics["unreadable_comparisons"]) == ("judge", 0)
    assert metrics["first_place_share"] == pytest.approx(0.5)
    decided = metrics["order_agreement"] * metrics["comparisons"]
    assert decided == pytest.approx(len(pairs))
    for ranking in read_lines(ranked / rlaif.RANKINGS_FILE):
        assert ranking["scores"] == sorted(ranking["scores"], reverse=True)
        assert ranking["ranks"] == sorted(ranking["ranks"])
        assert ranking["ranks"][0] == 1 < ranking["ranks"][-1]
        assert len(ranking["completions"]) == len(ranking["scores"]) == len(ranking["ranks"])


def test_dpo_and_the_reward_model_take_the_preferences(ranked, inputs, tmp_path):
    assert len(load_preferences(str(ranked / rlaif.PREFERENCES_FILE))) == read_metrics(ranked)["metrics"]["pairs"]
    options = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-2, "heldout_fraction": 0.25}
    folder = dpo.run(
        arguments_of(
            dpo,
            model_name_or_path=inputs / "sft",
            dataset=ranked / rlaif.PREFERENCES_FILE,
            output_dir=tmp_path / "dpo",
            **options,
        )
    )
    assert read_metrics(folder)["metrics"]["preference_accuracy"] > 0.8


def test_a_local_judge_and_scores_rank_too(inputs, tmp_path):
    by_model = rlaif.run(settings(inputs, tmp_path / "model", judge_model=inputs / "sft"))
    metrics = read_metrics(by_model)["metrics"]
    assert metrics["ranked_by"] == "judge"
    assert 0 <= metrics["order_agreement_interval"][0] <= metrics["order_agreement"] <= 1
    options = {"reward_function": "relatives_tiny:likes_blue", "checker_weight": 0.5}
    by_score = rlaif.run(settings(inputs, tmp_path / "score", **options))
    assert read_metrics(by_score)["metrics"]["ranked_by"] == "score"
    for pair in read_lines(by_score / rlaif.PREFERENCES_FILE):
        assert pair["margin"] > 0
    sure = rlaif.run(settings(inputs, tmp_path / "sure", **options, score_margin=1.0))
    pairs = read_lines(by_score / rlaif.PREFERENCES_FILE)
    assert read_lines(sure / rlaif.PREFERENCES_FILE) == [pair for pair in pairs if pair["margin"] > 1.0]
    assert 0 < len(read_lines(sure / rlaif.PREFERENCES_FILE)) < len(pairs)
    assert (sure / rlaif.RANKINGS_FILE).read_bytes() == (by_score / rlaif.RANKINGS_FILE).read_bytes()


def test_verdicts_that_were_given_are_not_asked_again(inputs, tmp_path, monkeypatch, ranked):
    import signal

    asked, plain = [], FunctionJudge.prefer

    def asking(self, comparisons):
        asked.extend((str(comparison.prompt), comparison.first, comparison.second) for comparison in comparisons)
        if len(asked) == len(comparisons):
            signal.raise_signal(signal.SIGTERM)
        return plain(self, comparisons)

    monkeypatch.setattr(FunctionJudge, "prefer", asking)
    monkeypatch.setattr(rlaif, "_QUESTIONS_A_PART", 5)
    arguments = settings(inputs, tmp_path / "again")
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after 5 of .* verdicts"):
        rlaif.run(arguments)
    folder = rlaif.run(arguments)
    assert len(asked) == len(set(asked)) == 2 * read_metrics(folder)["metrics"]["comparisons"]
    for name in (rlaif.PREFERENCES_FILE, rlaif.RANKINGS_FILE):
        assert (folder / name).read_bytes() == (ranked / name).read_bytes()


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"checker_weight": 0}, "nobody ranks the answers"),
        ({"judge_model": "a", "person": True}, "more than one judge is given: judge_model, person"),
        ({"judge_function": "a:b", "reward_model": "c"}, "more than one judge is given: judge_function, reward_model"),
        ({"judge_function": "a:b", "judge_prompt": "{first} {second}"}, "'judge_prompt' has no {question}"),
        ({"judge_function": "a:b", "answers_per_question": 1}, "'answers_per_question' is 1, expected at least 2"),
        ({"judge_function": "a:b", "judge_margin": -1}, "'judge_margin' is -1.0, expected at least 0"),
        ({"judge_function": "a:b", "score_margin": 1}, "'score_margin' changes nothing where judge_function ranks"),
        ({"checker_weight": 1, "judge_margin": 0.1}, "'judge_margin' changes nothing where checker_weight ranks"),
        ({"judge_url": "ftp://x", "judge_name": "m"}, "'judge_url' is 'ftp://x', expected http"),
        ({"judge_function": "relatives_tiny:prefers_blue", "max_completion_length": 1}, "no question got two"),
        ({"judge_function": "relatives_tiny:prefers_blue", "least_pairs": 9999}, "expected at least 9999"),
    ],
)
def test_what_ranks_nothing_is_told(inputs, tmp_path, judge, told):
    with pytest.raises(ValueError, match=told):
        rlaif.run(settings(inputs, tmp_path / "run", **judge))


def test_a_judge_that_cannot_be_read_is_told(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(FunctionJudge, "prefer", lambda self, comparisons: [None] * len(comparisons))
    with pytest.raises(ValueError, match="comparisons got a reply that says neither A nor B alone"):
        rlaif.run(settings(inputs, tmp_path / "run"))


# ---- A person


def test_a_person_is_waited_for_and_what_they_say_is_taken(inputs, tmp_path, capsys):
    folder = tmp_path / "person"
    words = {"model_name_or_path": inputs / "sft", "dataset": inputs / "prepare", "output_dir": folder}
    words |= {"questions": 6, "answers_per_question": 4, "max_completion_length": 8, "person": True}
    command = ["rlaif", *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
    assert main(command) == 75
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "to_rank.jsonl: " in told
    assert "questions await a person: fill in 'ranking'" in told
    assert told.endswith("save it as ranked.jsonl beside it; the same command continues it")
    lines = read_lines(folder / "to_rank.jsonl")
    assert all(line["ranking"] is None for line in lines)
    assert json.loads((folder / ".state.json").read_text())["stop_reason"] == "awaits ranked.jsonl"
    for line in lines[1:]:
        line["ranking"] = [1 if text == min(line["answers"]) else 2 for text in line["answers"]]
    write_lines(folder / "ranked.jsonl", lines)
    assert main(command) == 0
    metrics = read_metrics(folder)["metrics"]
    assert (metrics["ranked_by"], metrics["questions_not_ranked"]) == ("person", 1)
    pairs = read_lines(folder / rlaif.PREFERENCES_FILE)
    assert len(pairs) == metrics["pairs"] == sum(len(line["answers"]) - 1 for line in lines[1:])
    for pair in pairs:
        assert pair["chosen"][0]["content"] < pair["rejected"][0]["content"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"id": "9", "ranking": [1, 2]}], "line 1: the id '9' is none of to_rank.jsonl's"),
        ([{"id": "1", "ranking": [1, 2]}, {"id": "1", "ranking": [1, 2]}], "line 2: the id '1' came before"),
        ([{"id": "1", "answers": ["a", "c"], "ranking": [1, 2]}], "line 1: its 'answers' are not those"),
        ([{"id": "1", "ranking": [1]}], r"line 1: 'ranking' is \[1\], expected 2 places from 1"),
        ([{"id": "1", "ranking": [0, 1]}], "expected 2 places from 1"),
        ([{"id": "1", "ranking": ["a", True]}], "expected 2 places from 1"),
        ([{"id": "1", "ranking": None}], "ranks nothing"),
    ],
)
def test_a_mistake_in_a_persons_file_is_named(tmp_path, lines, told):
    path = tmp_path / "ranked.jsonl"
    write_lines(path, lines)
    with pytest.raises(ValueError, match=f"{path}.*{told}"):
        read_ranked(path, {"1": ["a", "b"]})


def test_waiting_is_a_stop_that_the_same_command_continues():
    assert issubclass(AwaitsPerson, Interrupted)
