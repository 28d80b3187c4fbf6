"""Best of n: the estimate by counting all choices, what is chosen, and that nothing is asked twice."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relatives_tiny import arguments_of, make_inputs, make_rows, read_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment import best_of_n, sampling
from hf_scratch_gpt.alignment.sampling import unique_prompts
from hf_scratch_gpt.alignment.selection import best_of, kl_bound, powers_of_two
from hf_scratch_gpt.data.conversations import load_conversations
from hf_scratch_gpt.evaluation.generation import Answer, generate_answers
from hf_scratch_gpt.runs import Interrupted, read_metrics

# ---- The mathematics


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 10**6)), min_size=1, max_size=7, unique_by=lambda row: row[1]),
    st.data(),
)
def test_the_estimate_is_the_mean_over_all_choices(rows, data):
    values, scores = [row[0] for row in rows], [row[1] for row in rows]
    count = data.draw(st.integers(1, len(rows)))
    choices = list(itertools.combinations(range(len(rows)), count))
    expected = sum(values[max(chosen, key=scores.__getitem__)] for chosen in choices) / len(choices)
    assert best_of(values, scores, count) == pytest.approx(expected, abs=1e-9)


def test_the_bound_by_hand():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(0.6931472 - 0.5)
    assert kl_bound(16) == pytest.approx(math.log(16) - 15 / 16)
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(("values", "count"), [([1.0], 2), ([1.0, 2.0], 0), ([1.0, 2.0, 3.0], 1)])
def test_a_best_that_does_not_exist_is_refused(values, count):
    with pytest.raises(ValueError, match="does not exist"):
        best_of(values, [0.0] * min(2, len(values)), count)


# ---- The choice


def said(text, ended=True):
    return Answer(text, ended, 3)


def test_the_best_scored_answer_that_ended_is_chosen():
    rows = make_rows(3)
    sampled = [
        [said("a"), said("b"), said("c", ended=False)],
        [said("a", ended=False), said("b", ended=False), said("c", ended=False)],
        [said("a"), said(" "), said("b", ended=False)],
    ]
    chosen = best_of_n.choose(rows, sampled, [[1.0, 2.0, 9.0], [1.0, 2.0, 3.0], [1.0, 0.5, 9.0]])
    assert [(row["id"], row["completion"][0]["content"], row["score"]) for row in chosen] == [
        ("0", "b", 2.0),
        ("2", "a", 1.0),
    ]


def test_what_the_best_is_worth_rises_with_n_under_the_checker_itself():
    rows = make_rows(2)  # red, green
    sampled = [[said("red"), said("blue"), said("blue"), said("x", False)], [said("green"), said("red")] * 2]
    told = best_of_n.worth_by_n(rows, sampled, [[1.0, 0.0, 0.1, 0.0], [1.0, 0.0, 1.1, 0.1]])
    assert [entry["n"] for entry in told] == [1, 2, 4]
    assert told[0]["gold"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert told[1]["gold"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert told[2]["gold"] == 1.0
    assert told[0]["share_ended"] == pytest.approx((3 / 4 + 1) / 2)
    assert [entry["kl_bound"] for entry in told] == [kl_bound(count) for count in (1, 2, 4)]


def test_a_prompt_that_comes_twice_is_asked_once():
    rows = make_rows(3)
    assert unique_prompts([*rows, rows[1]]) == rows


# ---- The stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def arguments_for(inputs, output, **changed):
    chosen = {
        "model_name_or_path": inputs / "sft",
        "dataset": inputs / "prepare",
        "output_dir": output,
        "reward_function": "relatives_tiny:likes_blue",
        "answers_per_question": 16,
        "max_completion_length": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "bf16": False,
        **changed,
    }
    return arguments_of(best_of_n, **chosen)


@pytest.fixture(scope="module")
def tuned(inputs, tmp_path_factory):
    return best_of_n.run(arguments_for(inputs, tmp_path_factory.mktemp("runs") / "best"))


def test_the_chosen_answers_are_a_data_set_of_what_was_sampled(tuned, inputs):
    chosen = read_lines(tuned / best_of_n.CHOSEN_FILE)
    metrics = read_metrics(tuned)["metrics"]
    assert (metrics["questions"], metrics["answers"], metrics["chosen"]) == (30, 480, len(chosen))
    assert metrics["score_of_chosen"] == pytest.approx(sum(row["score"] for row in chosen) / len(chosen))
    assert metrics["score_of_chosen"] > metrics["score_of_all"] + 0.3
    loaded = load_conversations(str(tuned / best_of_n.CHOSEN_FILE))
    assert [row["completion"] for row in loaded] == [row["completion"] for row in chosen]
    model, tokenizer = (kind.from_pretrained(inputs / "sft") for kind in (AutoModelForCausalLM, AutoTokenizer))
    answers = generate_answers(model, tokenizer, [chosen[0]["prompt"]] * 16, 8, 1.0, seed=42)
    assert chosen[0]["completion"][0]["content"] in [answer.text for answer in answers if answer.ended]


def test_tuning_makes_what_was_chosen_likelier(tuned):
    metrics = read_metrics(tuned)["metrics"]
    by_n = metrics["heldout_by_n"]
    assert [entry["n"] for entry in by_n] == [1, 2, 4, 8, 16]
    assert by_n[-1]["score"] > by_n[0]["score"]
    assert metrics["heldout_reward_function"] >= by_n[0]["score"]
    assert metrics["steps"] == 20
    assert (tuned / "model.safetensors").is_file()
    assert (tuned / "heldout_answers.jsonl").is_file()


def test_without_tuning_only_the_answers_are_written(inputs, tmp_path, tuned):
    folder = best_of_n.run(arguments_for(inputs, tmp_path / "best", tune=False, eval_prompts=0))
    assert (folder / best_of_n.CHOSEN_FILE).read_bytes() == (tuned / best_of_n.CHOSEN_FILE).read_bytes()
    assert not (folder / "model.safetensors").exists()
    assert "heldout_by_n" not in read_metrics(folder)["metrics"]


def test_answers_that_were_given_are_not_asked_again(inputs, tmp_path, monkeypatch, tuned):
    """Stopped by a signal between two parts, then killed in the tuning: no part is sampled twice."""
    import signal

    monkeypatch.setattr(sampling, "_ANSWERS_A_PART", 64)
    plain, asked = sampling.generate_answers, []

    def asking(model, tokenizer, prompts, *rest):
        asked.extend(prompt[0]["content"] for prompt in prompts)
        if len(asked) == 3 * 64:
            signal.raise_signal(signal.SIGTERM)
        return plain(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(sampling, "generate_answers", asking)
    arguments = arguments_for(inputs, tmp_path / "best")
    with pytest.raises(Interrupted, match="stopped by SIGTERM after 12 of 30 answers"):
        best_of_n.run(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(best_of_n, "train_and_save", lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            best_of_n.run(arguments)
    folder = best_of_n.run(arguments)
    counts = {prompt: asked.count(prompt) for prompt in asked}
    assert set(counts.values()) == {16}
    assert len(counts) == 36  # 30 questions and 6 that are held out
    for name in (best_of_n.CHOSEN_FILE, "model.safetensors"):
        assert (folder / name).read_bytes() == (tuned / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"answers_per_question": 0}, "'answers_per_question' is 0, expected at least 1"),
        ({"temperature": 0}, r"'temperature' is 0\.0, expected above 0"),
        ({"max_completion_length": 1}, "none of the 30 questions got an answer that ended within 1 tokens"),
    ],
)
def test_what_chooses_nothing_is_told(inputs, tmp_path, changed, told):
    with pytest.raises(ValueError, match=told):
        best_of_n.run(arguments_for(inputs, tmp_path / "best", **changed))
