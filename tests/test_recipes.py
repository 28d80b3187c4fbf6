"""Every recipe that comes with the package parses against what is installed, and takes two steps on a tiny model.

Recipes are found, not listed. Each runs as it is but for its size and its data: what it reads from `runs/` is made by
the recipe that writes it, and what is somebody's own (a file, a model of the Hub) is replaced by something tiny.
"""

import dataclasses
import importlib
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from hf_scratch_gpt.cli import STAGES
from hf_scratch_gpt.reporting.card_settings import CARD_SETTINGS, load_settings, read_settings
from hf_scratch_gpt.runs import parse_arguments, read_metrics
from hf_scratch_gpt.runs.arguments import read_recipe
from hf_scratch_gpt.runs.process import reset_libraries
from hf_scratch_gpt.runs.values import nearest

ROOT = Path(__file__).resolve().parents[1] / "recipes"
LAUNCHER = ROOT / "accelerate"
RECIPES = sorted(path for path in ROOT.rglob("*.yaml") if LAUNCHER not in path.parents and path.name != CARD_SETTINGS)
CARDS = sorted(ROOT.rglob(CARD_SETTINGS))
PROFILES = sorted(LAUNCHER.glob("*.yaml"))
# Run by tests/test_relatives_recipes.py, whose stages sample and score.
ELSEWHERE = ("relatives", "iterate")
STEPS, TASKS = 2, 60
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
# What makes a stage small; a setting that a stage does not have would be refused.
SMALL = {
    "tokenizer": {"vocab_size": 1024, "heldout_fraction": 0.2},
    "prepare": {"heldout_fraction": 0.2},
    "pretrain": {
        **{"max_minutes": 0, "max_steps": STEPS, "batch_size": 4, "compile": "false", "evaluation_bytes": 2000},
        "model_overrides": MODEL | {"num_key_value_heads": 1},
    },
    "sft": {"max_steps": STEPS, "allow_dropped_rows": True},
    "classify": {"max_steps": STEPS},
    "reward": {"max_steps": STEPS, "allow_dropped_rows": True},
    "dpo": {"max_steps": STEPS, "allow_dropped_rows": True},
    "ppo": {
        **{"max_steps": STEPS, "rollout_batch_size": 8, "per_device_train_batch_size": 8, "num_ppo_epochs": 1},
        "max_new_tokens": 4,
    },
    "evaluate": {"questions": 8, "pairs": 8, "samples_per_prompt": 1, "max_new_tokens": 4, "text_bytes": 2000},
}
# Settings that cost time only where a recipe gives them.
SMALLER = {"own_answer_questions": 8, "own_answers_per_question": 2, "own_answer_tokens": 4, "context_length": 256}
SMALLER |= {"per_device_train_batch_size": 4, "responses_per_prompt": 2}
SOURCES = ("shutil", "textwrap", "string", "fractions", "statistics", "bisect")
NEEDS_A_GPU = {"peft": ("qlora",)}


def stage_of(path: Path) -> str:
    return path.stem.partition("-")[0]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def arguments_of(path: Path, values: dict, folder: Path):
    """The settings of `values`, by the stage's own parser."""
    recipe = folder / f"{path.parent.name}-{path.stem}.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    module = importlib.import_module(STAGES[stage_of(path)][0])
    return module, parse_arguments(module.Arguments, [str(recipe)])


class Road:
    """Runs recipes at tiny size below one folder, each once, and those before it that it reads from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writers = {read_recipe(path)["output_dir"]: path for path in RECIPES}
        self.done: dict[Path, Path] = {}
        (folder / "corpus").mkdir()
        for stem in SOURCES:
            shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{stem}.py", folder / "corpus" / f"{stem}.py")
        self.files = {"conversations": folder / "talk.jsonl", "preferences": folder / "pairs.jsonl"}
        rows = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four") * 8]
        self._write("conversations", rows)
        pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
        self._write("preferences", pairs)
        self.files["labels"] = folder / "labels.tsv"
        texts = [f"{'ham' if number % 3 else 'spam'}\tmessage number {number}\n" for number in range(40)]
        self.files["labels"].write_text("".join(texts), encoding="utf-8")

    def _write(self, kind: str, rows: list[dict]) -> None:
        self.files[kind].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(self, path: Path) -> Path:
        """The finished folder of a recipe."""
        if path not in self.done:
            values = self.shrunk(path)  # runs those before it
            reset_libraries()  # before transformers' settings take hold of the global state
            module, arguments = arguments_of(path, values, self.folder)
            self.done[path] = module.run(arguments)
        return self.done[path]

    def shrunk(self, path: Path) -> dict:
        """The recipe's settings with small sizes, and with inputs that are there."""
        stage, values = stage_of(path), read_recipe(path)
        module = importlib.import_module(STAGES[stage][0])
        fields = {field.name for field in dataclasses.fields(module.Arguments)}
        values |= SMALL.get(stage, {"max_steps": STEPS} if "max_steps" in fields else {})
        values |= {name: value for name, value in SMALLER.items() if name in read_recipe(path)}
        for name in module.Arguments.input_fields:
            if values.get(name):
                given = values[name]
                values[name] = (
                    [self.input(stage, name, item) for item in given]
                    if isinstance(given, list)
                    else self.input(stage, name, given)
                )
        return values | {"output_dir": str(self.folder / values["output_dir"])}

    def input(self, stage: str, name: str, value: str) -> str:
        """What stands for one input: the folder that another recipe writes, or something tiny of that kind."""
        if value in self.writers:
            return str(self.run(self.writers[value]))
        assert not value.startswith("runs/"), f"no recipe writes {value}"
        if name in ("sources", "stream"):
            return str(self.folder / "corpus")
        if "model" in name:
            return str(self.run(self.writers["runs/quickstart/pretrain"]))
        kinds = {"sft": "conversations", "classify": "labels", "reward": "preferences", "dpo": "preferences"}
        return str(self.files[kinds.get(stage, "conversations")])


def keep_few_tasks(write_tasks):
    """`prepare`'s tasks, of which only a few rows stay: encoding all of them would take most of the time here."""

    def write(folder, *arguments):
        told = write_tasks(folder, *arguments)
        for path in Path(folder).rglob("*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[:: len(lines) // TASKS or 1][:TASKS]), encoding="utf-8")
        return told

    return write


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    from hf_scratch_gpt.data import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "write_tasks", keep_few_tasks(tasks.write_tasks))
        yield Road(tmp_path_factory.mktemp("recipes"))


def test_there_are_recipes_of_every_stage():
    assert {stage_of(path) for path in RECIPES} == set(STAGES)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name not in ELSEWHERE], ids=name_of)
def test_a_recipe_takes_two_steps_on_a_tiny_model(road, path):
    recipe = read_recipe(path)
    for name, values in NEEDS_A_GPU.items():
        if recipe.get(name) in values:
            pytest.skip(f"{name}: {recipe[name]} needs a GPU")
    folder = road.run(path)
    report = read_metrics(folder)
    assert report["stage"] == stage_of(path)
    if "max_steps" in SMALL.get(stage_of(path), {}):
        assert report["metrics"]["steps"] == STEPS
    # Nothing of the recipe but sizes and places was changed.
    ran, changed = read_recipe(folder / "recipe.yaml"), road.shrunk(path)
    assert {name: value for name, value in ran.items() if changed.get(name) != value} == {}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_an_unknown_key_of_a_recipe_is_refused_with_the_nearest_known_one(path, tmp_path):
    recipe = read_recipe(path)
    arguments_of(path, recipe, tmp_path)  # as it stands, it parses
    module = importlib.import_module(STAGES[stage_of(path)][0])
    known = [field.name for field in dataclasses.fields(module.Arguments) if field.init]
    for key in recipe:
        wrong = key[:2] + key[3:]  # a letter is missing
        assert f"'{key}'" in nearest(wrong, known)
        values = {wrong if name == key else name: value for name, value in recipe.items()}
        with pytest.raises(ValueError, match=f"unknown setting '{wrong}'; did you mean '{key}'"):
            arguments_of(path, values, tmp_path)


@pytest.mark.parametrize("path", CARDS, ids=name_of)
def test_the_settings_of_a_card_are_known_ones(path):
    assert load_settings(read_settings(path.parent)).license


@pytest.mark.parametrize("path", PROFILES, ids=name_of)
def test_accelerates_own_loader_reads_every_profile(path):
    """It refuses keys that it does not know; what each says is tested with the launches."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= 1
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(config.to_dict()) | {"deepspeed_config"}
