"""The pipeline plans a recipe folder as its files say, and names what is wrong before any stage runs."""

from pathlib import Path

import pytest

from hf_scratch_gpt import pipeline
from hf_scratch_gpt.cli import STAGES


def write_recipes(folder: Path, **recipes: str) -> Path:
    folder.mkdir(exist_ok=True)
    for stage, text in recipes.items():
        (folder / f"{stage}.yaml").write_text(text)
    return folder


def test_stages_run_in_the_order_of_the_road_whatever_their_file_names(tmp_path):
    recipes = write_recipes(tmp_path / "mine", **{stage: f"output_dir: runs/mine/{stage}" for stage in sorted(STAGES)})
    assert [plan.stage for plan in pipeline.plan_stages(recipes, None)] == list(STAGES)


def test_output_dir_moves_every_path_below_the_root_and_no_other(tmp_path):
    recipes = write_recipes(
        tmp_path / "mine",
        prepare="output_dir: runs/mine/prepare\nsources: [runs/mine, data/runs/mine, runs/mineral]\nseed: 1",
    )
    (plan,) = pipeline.plan_stages(recipes, "elsewhere")
    assert plan.flags == [
        *("--output_dir", "elsewhere/prepare"),
        *("--sources", "elsewhere", "data/runs/mine", "runs/mineral"),
    ]
    assert plan.output_dir == Path("elsewhere/prepare")


def test_a_budget_scales_steps_and_minutes_and_nothing_else(tmp_path):
    recipes = write_recipes(
        tmp_path / "mine",
        pretrain="output_dir: runs/mine/pretrain\nmax_minutes: 6.0\nbatch_size: 32",
        sft="output_dir: runs/mine/sft\nmax_steps: 100",
    )
    pretrain, sft = pipeline.plan_stages(recipes, None, scale=0.5)
    assert pretrain.flags == ["--max_minutes", "3.0"]
    assert sft.flags == ["--max_steps", "50"]


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"pretrian": "output_dir: x"}, "did you mean 'pretrain'"),
        ({"pretrain": "seed: 1"}, "'output_dir' is missing"),
        ({}, "holds no recipe"),
    ],
)
def test_a_wrong_recipe_folder_is_named(tmp_path, recipes, message):
    with pytest.raises(ValueError, match=message):
        pipeline.plan_stages(write_recipes(tmp_path / "mine", **recipes), None)


def test_a_recipe_folder_that_does_not_exist_lists_those_that_do():
    with pytest.raises(FileNotFoundError, match="quickstart"):
        pipeline.find_recipes("nonesuch")


@pytest.mark.parametrize("minutes", ["0", "-3", "many"])
def test_a_budget_that_is_no_positive_number_is_refused(minutes):
    with pytest.raises(ValueError, match="budget-minutes"):
        pipeline.quickstart(["--budget-minutes", minutes])
