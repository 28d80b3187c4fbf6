"""The recipes of PPO's relatives and of the loop parse as they stand, and run to a model that chats at toy size."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from hf_scratch_gpt import pipeline
from hf_scratch_gpt.cli import STAGES, main
from hf_scratch_gpt.reporting.verdicts import stage_rows
from hf_scratch_gpt.runs import parse_arguments, read_metrics

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path.insert(0, str(Path(__file__).parent / "alignment"))
from relatives_tiny import make_inputs  # noqa: E402

LORA = {"lora_r": 4, "max_steps": 2}
SAMPLED = {"questions": 12, "answers_per_question": 4, "max_completion_length": 8}
ONLINE = {**LORA, "per_device_train_batch_size": 8, "max_completion_length": 8, "eval_prompts": 4}
# What makes a recipe small; everything else in it stays as it is.
TOY = {
    "rlaif": SAMPLED,
    "dpo": {**LORA, "per_device_train_batch_size": 4},
    "kto": {
        **{**LORA, "own_answer_questions": 20, "own_answers_per_question": 24, "own_answer_tokens": 8},
        **{"per_device_train_batch_size": 4},
    },
    "grpo": ONLINE,
    "rloo": ONLINE,
    "best_of_n": {**LORA, **SAMPLED, "per_device_train_batch_size": 4, "eval_prompts": 4},
}
SAMPLES = {
    "kto": lambda settings: settings.own_answer_questions * settings.own_answers_per_question,
    "rlaif": lambda settings: settings.questions * settings.answers_per_question,
    "best_of_n": lambda settings: settings.questions * settings.answers_per_question,
    "ppo": lambda settings: settings.max_steps * settings.per_device_train_batch_size // settings.num_ppo_epochs,
    "grpo": lambda settings: settings.max_steps * settings.per_device_train_batch_size // settings.num_iterations,
}
SAMPLES["rloo"] = SAMPLES["grpo"]


def parse(stage, path):
    return parse_arguments(importlib.import_module(STAGES[stage][0]).Arguments, [str(path)])


def test_all_recipes_of_the_relatives_are_run_here():
    assert {path.stem for path in (RECIPES / "relatives").glob("*.yaml")} == set(TOY)


@pytest.mark.parametrize("stage", ["ppo", "kto", "grpo", "rloo", "best_of_n", "rlaif"])
def test_all_methods_sample_as_many_answers(stage):
    folder = "quickstart" if stage == "ppo" else "relatives"
    assert SAMPLES[stage](parse(stage, RECIPES / folder / f"{stage}.yaml")) == 1536


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The recipes, at toy size, on a tiny road; run as `scratch-gpt run` runs a folder."""
    folder = tmp_path_factory.mktemp("relatives")
    inputs = make_inputs(folder / "quickstart")
    (folder / "recipes" / "relatives").mkdir(parents=True)
    for stage, changes in TOY.items():
        text = (RECIPES / "relatives" / f"{stage}.yaml").read_text(encoding="utf-8")
        recipe = yaml.safe_load(text.replace("runs/quickstart", str(inputs))) | changes
        (folder / "recipes" / "relatives" / f"{stage}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert pipeline.main([str(folder / "recipes" / "relatives"), "--output-dir", str(folder / "out")]) == 0
    return folder


@pytest.mark.parametrize("stage", [stage for stage in TOY if stage != "rlaif"])
def test_each_recipe_runs_to_a_model_that_chats(road, stage, capsys):
    folder = road / "out" / stage
    assert read_metrics(folder)["metrics"]["steps"] == 2
    assert main(["chat", str(folder), "--prompt", "Which is red, 1?", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_the_report_tells_each_of_them(road):
    report = json.loads((road / "out" / "report.json").read_text(encoding="utf-8"))
    rows = {row.stage: row for row in stage_rows(report)}
    assert set(rows) == set(TOY)
    for stage in ("grpo", "rloo", "best_of_n"):
        metrics = read_metrics(road / "out" / stage)["metrics"]
        assert rows[stage].measure == "gold reward, held-out"
        assert (rows[stage].before, rows[stage].after) == (metrics["heldout_gold_start"], metrics["heldout_gold"])
    assert rows["rlaif"].after == read_metrics(road / "out" / "rlaif")["metrics"]["pairs"]
    assert rows["kto"].measure == "answers told apart, held-out"


def test_dpo_is_trained_on_what_was_ranked(road):
    ranked = read_metrics(road / "out" / "rlaif")["metrics"]["pairs"]
    trained = read_metrics(road / "out" / "dpo")["metrics"]
    assert trained["pairs"] + trained["heldout_pairs"] == ranked


def test_the_loops_recipe_runs_a_round(road, capsys):
    recipe = yaml.safe_load((RECIPES / "iterate" / "iterate.yaml").read_text(encoding="utf-8"))
    parse("iterate", RECIPES / "iterate" / "iterate.yaml")
    small = {
        "rank": SAMPLED,
        "reward": {**LORA, "per_device_train_batch_size": 8},
        "ppo": {
            **{**LORA, "max_steps": 2, "rollout_batch_size": 16, "per_device_train_batch_size": 8, "eval_prompts": 4},
            **{"max_new_tokens": 8, "bf16": False},
        },
    }
    flags = {"output_dir": road / "out" / "iterate", "rounds": 1, "max_completion_length": 8, "eval_prompts": 4}
    for step, changes in small.items():
        path = RECIPES.parent / recipe[f"{step}_recipe"]
        text = path.read_text(encoding="utf-8").replace("runs/quickstart", str(road / "quickstart"))
        (road / f"{step}.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | changes), encoding="utf-8")
        flags[f"{step}_recipe"] = road / f"{step}.yaml"
    for name in ("model_name_or_path", "dataset", "first_preferences"):
        flags[name] = recipe[name].replace("runs/quickstart", str(road / "quickstart"))
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["iterate", str(RECIPES / "iterate" / "iterate.yaml"), *words]) == 0
    assert len(read_metrics(flags["output_dir"])["metrics"]["rounds"]) == 1
    capsys.readouterr()
    assert main(["chat", str(flags["output_dir"]), "--prompt", "Which is red, 1?", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
