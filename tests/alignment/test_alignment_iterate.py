"""The loop of rank, reward model and PPO: two rounds, killed in the middle, and with a person in it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from relatives_tiny import arguments_of, make_inputs, make_rows, read_lines, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_scratch_gpt.alignment import iterate
from hf_scratch_gpt.alignment.person import AwaitsPerson
from hf_scratch_gpt.runs import read_metrics

STEPS = {
    "rank": {
        "reward_function": "relatives_tiny:likes_blue",
        "questions": 12,
        "answers_per_question": 4,
        "max_completion_length": 8,
    },
    "reward": {"per_device_train_batch_size": 8, "max_steps": 30, "learning_rate": 0.01, "save_steps": 3},
    "ppo": {
        "total_episodes": 32,
        "rollout_batch_size": 16,
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 1,
        "max_new_tokens": 8,
        "critic": "shared",
        "learning_rate": 0.01,
        "save_steps": 1,
        "eval_prompts": 0,
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    for step, recipe in STEPS.items():
        (folder / f"{step}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def settings(inputs, output, **changed):
    return {
        "model_name_or_path": inputs / "sft",
        "dataset": inputs / "prepare",
        "first_preferences": inputs / "prepare",
        "output_dir": output,
        "max_completion_length": 8,
        **{f"{step}_recipe": inputs / f"{step}.yaml" for step in STEPS},
        **changed,
    }


@pytest.fixture(scope="module")
def iterated(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "loop"
    return iterate.run(arguments_of(iterate, **settings(inputs, output)))


def test_each_round_ranks_with_the_policy_of_the_last_and_learns_from_all_so_far(iterated, inputs):
    pairs = [len(read_lines(iterated / f"round-{number}" / "rank" / "preferences.jsonl")) for number in (1, 2)]
    given = [len(read_lines(iterated / f"round-{number}" / "preferences.jsonl")) for number in (1, 2)]
    assert given == [40 + pairs[0], 40 + pairs[0] + pairs[1]]

    def made_from(folder, setting):
        return read_metrics(iterated / folder)["inputs"][setting]

    def run_of(folder):
        return read_metrics(iterated / folder)["run_id"]

    assert made_from("round-1/rank", "model_name_or_path")["path"] == str(inputs / "sft")
    for step in ("rank", "ppo"):
        assert made_from(f"round-2/{step}", "model_name_or_path")["run_id"] == run_of("round-1/ppo")
    for number in (1, 2):
        reward = run_of(f"round-{number}/reward")
        assert made_from(f"round-{number}/ppo", "reward_model")["run_id"] == reward
        assert made_from(f"round-{number}/reward", "model_name_or_path")["path"] == str(inputs / "sft")


def test_each_round_is_told_and_the_last_policy_is_the_stages_own(iterated):
    metrics = read_metrics(iterated)["metrics"]
    first, second = metrics["rounds"]
    assert (first["round"], second["round"]) == (1, 2)
    for told in (first, second):
        low, high = told["reward_accuracy_interval"]
        assert low <= told["reward_accuracy"] <= high
        assert told["heldout_kl"] > 0
        answers = read_lines(iterated / f"round-{told['round']}" / "heldout_answers.jsonl")
        assert told["heldout_gold"] == pytest.approx(sum(answer["gold"] for answer in answers) / 6)
    assert first["gold_gain_of_round"] == first["heldout_gold_gain"]
    assert second["gold_gain_of_round"] == pytest.approx(second["heldout_gold"] - first["heldout_gold"])
    assert metrics["last_round_raised_gold"] == (second["gold_gain_of_round_interval"][0] > 0)
    assert metrics["heldout_gold"] == second["heldout_gold"]
    last, own = (load_file(path / "model.safetensors") for path in (iterated / "round-2" / "ppo", iterated))
    assert last.keys() == own.keys()
    assert all(last[name].equal(own[name]) for name in last)
    assert AutoModelForCausalLM.from_pretrained(iterated).generation_config.eos_token_id


def finished(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_a_loop_that_was_killed_goes_on_in_the_stage_that_it_was_in(iterated, inputs, tmp_path):
    """A real process, really killed, while the second round's reward model trains."""
    output = tmp_path / "loop"
    words = [word for name, value in settings(inputs, output).items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "hf_scratch_gpt", "iterate", *words]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until = time.monotonic() + 600
        while not list((output / "round-2" / "reward" / "checkpoints").glob("checkpoint-*/manifest.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "round-2" / "ppo").exists()
    before = finished(output / "round-1") | finished(output / "round-2" / "rank")
    assert iterate.run(arguments_of(iterate, **settings(inputs, output))) == output
    assert before == {path: time_ns for path, time_ns in finished(output).items() if path in before}
    for name in ("model.safetensors", "round-2/reward/model.safetensors", "round-2/preferences.jsonl"):
        assert (output / name).read_bytes() == (iterated / name).read_bytes()
    made = (output / "metrics.json").stat().st_mtime_ns
    iterate.run(arguments_of(iterate, **settings(inputs, output)))
    assert (output / "metrics.json").stat().st_mtime_ns == made


def test_a_person_can_be_in_the_loop(inputs, tmp_path):
    recipe = tmp_path / "person.yaml"
    recipe.write_text(yaml.safe_dump({**STEPS["rank"], "reward_function": "", "person": True}))
    questions = write_lines(tmp_path / "questions.jsonl", make_rows(30))
    arguments = settings(inputs, tmp_path / "loop", rounds=1, rank_recipe=recipe, dataset=questions, eval_prompts=0)
    with pytest.raises(AwaitsPerson, match=r"round-1/rank/to_rank\.jsonl: \d+ questions await a person"):
        iterate.run(arguments_of(iterate, **arguments))
    folder = tmp_path / "loop" / "round-1" / "rank"
    lines = read_lines(folder / "to_rank.jsonl")
    for line in lines:
        line["ranking"] = [1 + place for place in range(len(line["answers"]))]
    write_lines(folder / "ranked.jsonl", lines)
    metrics = read_metrics(iterate.run(arguments_of(iterate, **arguments)))["metrics"]
    (told,) = metrics["rounds"]
    assert told["new_pairs"] == sum(len(line["answers"]) * (len(line["answers"]) - 1) // 2 for line in lines)
    assert "heldout_gold" not in told


def test_a_mistake_in_a_later_steps_recipe_costs_nothing(inputs, tmp_path):
    recipe = tmp_path / "ppo.yaml"
    recipe.write_text("kl_coeff: 0.1\n")
    with pytest.raises(ValueError, match=r"ppo\.yaml: unknown setting 'kl_coeff'; did you mean 'kl_coef'"):
        iterate.run(arguments_of(iterate, **settings(inputs, tmp_path / "loop", ppo_recipe=recipe)))
    assert not (tmp_path / "loop").exists()
    with pytest.raises(ValueError, match="'rounds' is 0, expected at least 1"):
        iterate.run(arguments_of(iterate, **settings(inputs, tmp_path / "loop", rounds=0)))


def test_a_recipe_that_comes_with_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(iterate.find_recipe("recipes/quickstart/ppo.yaml")).is_file()
    assert iterate.find_recipe("recipes/quickstart/nothing.yaml") == "recipes/quickstart/nothing.yaml"
    assert iterate.find_recipe("mine.yaml") == "mine.yaml"
