"""The loop of the InstructGPT paper, round after round: `scratch-gpt iterate recipe.yaml`.

Each round samples answers from the policy as it is, has them ranked, trains a new reward model on all preferences so
far, and aligns the policy against it by PPO (Ouyang et al. 2022, https://huggingface.co/papers/2203.02155, section
3.1: "more comparison data is collected on the current best policy, which is used to train a new RM and then a new
policy"). The three steps are the stages `rlaif`, `reward` and `ppo`, each in a folder of its own:
`round-1/rank`, `round-1/reward`, `round-1/ppo`. A run that was stopped goes on in the stage that it was in.
"""

import dataclasses
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hf_scratch_gpt.alignment.measuring import ANSWERS_FILE, MeasuringArguments, measure_policy, read_checked_rows
from hf_scratch_gpt.alignment.rlaif import PREFERENCES_FILE
from hf_scratch_gpt.alignment.scoring import CHECKER, ModelScorer
from hf_scratch_gpt.data.manifest import find_file
from hf_scratch_gpt.data.rows import read_rows
from hf_scratch_gpt.evaluation.intervals import paired_difference
from hf_scratch_gpt.evaluation.models import load_model
from hf_scratch_gpt.runs import (
    StageArguments,
    StageRun,
    parse_arguments,
    read_json,
    read_metrics,
    write_json,
    write_text,
)
from hf_scratch_gpt.runs.files import shipped_folder
from hf_scratch_gpt.runs.hardware import release_freed_memory
from hf_scratch_gpt.runs.process import reset_libraries, set_up_stage

_MODULES = {"rank": "rlaif", "reward": "reward", "ppo": "ppo.stage"}
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.py")
_NOT_OF_THE_MODEL = ("metrics.json", "recipe.yaml")


@dataclasses.dataclass
class IterateArguments(MeasuringArguments, StageArguments):
    """Settings of `iterate`: the start, and the recipes of the three steps.

    Args:
        model_name_or_path (`str`): The policy to start from, which reward models start from too.
        dataset (`str`): A `prepare` folder, or a local file with prompts, for sampling and PPO.
        eval_dataset (`str`, *optional*): Held-out prompts; unset: the prepare folder's.
        rounds (`int`, *optional*, defaults to `2`): Rounds.
        rank_recipe, reward_recipe, ppo_recipe (`str`): Recipes of `rlaif`, `reward` and `ppo`. What `iterate` itself
            decides (models, data, folders) is left out of them, or is overruled.
        first_preferences (`str`, *optional*): Preferences (a prepare folder, file or id) that are in every reward
            model's training beside the rounds' own.
        continue_policy (`bool`, *optional*, defaults to `True`): Each round's PPO goes on from the last round's
            policy, which its KL is then from; off starts from the first one again.
        max_completion_length (`int`, *optional*, defaults to `64`): Longest answer in measuring.
    """

    input_fields: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "dataset",
        "eval_dataset",
        "first_preferences",
        "rank_recipe",
        "reward_recipe",
        "ppo_recipe",
    )

    model_name_or_path: str = dataclasses.field(default="", metadata={"help": "The policy to start from."})
    dataset: str = dataclasses.field(default="", metadata={"help": "A prepare folder, or a file with prompts."})
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Held-out prompts; unset: the prepare folder's."}
    )
    rounds: int = dataclasses.field(default=2, metadata={"help": "Rounds."})
    rank_recipe: str = dataclasses.field(default="", metadata={"help": "Recipe of the stage rlaif."})
    reward_recipe: str = dataclasses.field(default="", metadata={"help": "Recipe of the stage reward."})
    ppo_recipe: str = dataclasses.field(default="", metadata={"help": "Recipe of the stage ppo."})
    first_preferences: str = dataclasses.field(
        default="", metadata={"help": "Preferences in every reward model's training beside the rounds' own."}
    )
    continue_policy: bool = dataclasses.field(
        default=True, metadata={"help": "Go on from the last round's policy; off starts from the first one again."}
    )
    max_completion_length: int = dataclasses.field(default=64, metadata={"help": "Longest answer in measuring."})

    def __post_init__(self) -> None:
        for name in ("rank_recipe", "reward_recipe", "ppo_recipe"):
            setattr(self, name, find_recipe(getattr(self, name)))

    def check_inputs(self) -> None:
        """Refuse settings without a model, data or recipes.

        Raises:
            ValueError: naming the setting.
        """
        for name in ("model_name_or_path", "dataset", "rank_recipe", "reward_recipe", "ppo_recipe"):
            if not getattr(self, name):
                raise ValueError(f"'{name}' is missing: {type(self).__dataclass_fields__[name].metadata['help']}")
        if self.rounds < 1:
            raise ValueError(f"'rounds' is {self.rounds}, expected at least 1")


Arguments = IterateArguments


def find_recipe(name: str) -> str:
    """A recipe by path, or the one of that path that comes with the package (`recipes/quickstart/ppo.yaml`)."""
    path = Path(name)
    if name and not path.exists() and path.parts[0] == "recipes":
        shipped = shipped_folder("recipes").joinpath(*path.parts[1:])
        return str(shipped) if shipped.is_file() else name
    return name


def run(arguments: IterateArguments) -> Path:
    """Run the rounds; the output folder holds the last round's policy, and each round's folders below it.

    Raises:
        ValueError: for unusable settings, recipes, models or data.
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it, or a person's ranking is awaited; the same call continues it.
    """
    arguments.check_inputs()
    for step in _MODULES:  # a mistake in the last one costs no training
        step_settings(arguments, step, Path(arguments.output_dir) / "round-1" / step, {})
    with StageRun(arguments, "iterate") as stage_run:
        if not stage_run.finished:
            _iterate(arguments, stage_run)
        return stage_run.folder


def _iterate(arguments: IterateArguments, stage_run: StageRun) -> None:
    policy, told = arguments.model_name_or_path, []
    for number in range(1, arguments.rounds + 1):
        folder = stage_run.folder / f"round-{number}"
        start = policy if arguments.continue_policy else arguments.model_name_or_path
        data = {"dataset": arguments.dataset}
        seed = {"seed": arguments.seed + number}
        ranked = run_step(
            arguments, "rank", folder / "rank", {"model_name_or_path": policy, **data, **seed}, stage_run.is_main
        )
        preferences = gather_preferences(arguments, stage_run, number)
        held_out = heldout_preferences(arguments.dataset)
        reward = run_step(
            arguments,
            "reward",
            folder / "reward",
            {
                "model_name_or_path": arguments.model_name_or_path,
                "dataset": str(preferences),
                **({"eval_dataset": held_out} if held_out else {}),
            },
            stage_run.is_main,
        )
        evaluation = {"eval_dataset": arguments.eval_dataset} if arguments.eval_dataset else {}
        ppo = run_step(
            arguments,
            "ppo",
            folder / "ppo",
            {"model_name_or_path": start, "reward_model": str(reward), **data, **evaluation, **seed},
            stage_run.is_main,
        )
        policy = str(ppo)
        if stage_run.is_main:
            told.append(_measure_round(arguments, stage_run, number, ranked, reward, ppo))
    if stage_run.is_main:
        reset_libraries()
        copy_model(Path(policy), stage_run.folder)
        stage_run.finish(_summary(arguments, told))


def step_settings(arguments: IterateArguments, step: str, folder: Path, decided: dict[str, Any]) -> tuple[Any, Any]:
    """The module of a step, and its settings: its recipe's, overruled by what `iterate` decides.

    Raises:
        OSError, ValueError: if the recipe is missing or wrong.
    """
    module = importlib.import_module(f"hf_scratch_gpt.alignment.{_MODULES[step]}")
    flags = [word for name, value in decided.items() for word in (f"--{name}", str(value))]
    recipe = getattr(arguments, f"{step}_recipe")
    settings = parse_arguments(module.Arguments, [recipe, "--output_dir", str(folder), *flags], f"iterate: {step}")
    return module, settings


def run_step(arguments: IterateArguments, step: str, folder: Path, decided: dict[str, Any], is_main: bool) -> Path:
    """Run a step, or find it finished; says so in a line."""
    reset_libraries()
    module, settings = step_settings(arguments, step, folder, decided)
    if is_main:
        print(f"iterate: {folder.parent.name}, {step}", flush=True)
    path = module.run(settings)
    release_freed_memory()
    return path


def gather_preferences(arguments: IterateArguments, stage_run: StageRun, number: int) -> Path:
    """`preferences.jsonl` of a round: the first ones, and those of all rounds up to it.

    A file that is the same already is not written again: its time is part of what the reward model's run is known by.
    """
    from hf_scratch_gpt.data.conversations import load_preferences

    path = stage_run.folder / f"round-{number}" / PREFERENCES_FILE
    if not stage_run.is_main:
        return path
    sources = [stage_run.folder / f"round-{earlier}" / "rank" / PREFERENCES_FILE for earlier in range(1, number + 1)]
    rows: list[dict[str, Any]] = []
    for source in [*([arguments.first_preferences] if arguments.first_preferences else []), *map(str, sources)]:
        rows += [dict(row) for row in load_preferences(source)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path


def heldout_preferences(dataset: str) -> str | None:
    """The prepare folder, if it holds preferences that are held out; they measure every round's reward model."""
    folder = Path(dataset)
    has_them = folder.is_dir() and find_file(folder, "tasks/preferences_heldout.jsonl") is not None
    return dataset if has_them else None


def _measure_round(
    arguments: IterateArguments, stage_run: StageRun, number: int, ranked: Path, reward: Path, ppo: Path
) -> dict[str, Any]:
    """What a round came to; kept in its folder, so that a finished round is not measured again."""
    kept = stage_run.folder / f"round-{number}" / "measures.json"
    if kept.is_file():
        return read_json(kept)
    reset_libraries()
    set_up_stage(stage_run, "fp32")
    ranking, of_reward, of_ppo = (read_metrics(path)["metrics"] for path in (ranked, reward, ppo))
    told: dict[str, Any] = {"round": number, "new_pairs": ranking["pairs"], "pairs": of_reward["pairs"]}
    told |= {name: ranking[name] for name in ("order_agreement", "gold_agreement") if name in ranking}
    told |= {
        f"reward_{name}": of_reward[f"heldout_{name}"]
        for name in ("accuracy", "accuracy_interval")
        if f"heldout_{name}" in of_reward
    }
    told["training_kl"] = of_ppo["kl"]
    rows = _heldout_rows(arguments)
    if rows:
        policy, tokenizer = load_model(str(ppo))
        measured, answers = measure_policy(arguments, policy, tokenizer, rows, [(ModelScorer(str(reward)), 1.0)])
        told |= measured
        if CHECKER in answers.scores:
            before = stage_run.folder / f"round-{number - 1}" / ANSWERS_FILE
            gain = measured["heldout_gold_gain"], measured["heldout_gold_gain_interval"]
            if number > 1:
                last = [line[CHECKER] for _, line in read_rows(before)]
                difference = paired_difference(answers.scores[CHECKER], last)
                gain = difference.mean, [difference.low, difference.high]
            told["gold_gain_of_round"], told["gold_gain_of_round_interval"] = gain
        answers.write(stage_run.folder / f"round-{number}")
    write_json(kept, told)
    return told


def _heldout_rows(arguments: IterateArguments) -> list[dict[str, Any]]:
    source = arguments.eval_dataset or (arguments.dataset if Path(arguments.dataset).is_dir() else None)
    if source is None or arguments.eval_prompts < 1:
        return []
    return read_checked_rows(source, "heldout")[: arguments.eval_prompts]


def _summary(arguments: IterateArguments, told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rounds; the last one's measures; and, where answers can be checked, whether it raised the gold reward."""
    metrics: dict[str, Any] = {"rounds": list(told), "continue_policy": arguments.continue_policy}
    metrics |= {name: value for name, value in told[-1].items() if name.startswith("heldout_")}
    if "heldout_gold" in told[-1]:
        metrics["best_round"] = max(told, key=lambda entry: entry["heldout_gold"])["round"]
        low = told[-1]["gold_gain_of_round_interval"][0]
        metrics["last_round_raised_gold"] = low > 0  # beyond its interval
    return metrics


def copy_model(source: Path, target: Path) -> None:
    """Copy a finished stage's model with its tokenizer, and nothing else of its run."""
    for pattern in _MODEL_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in _NOT_OF_THE_MODEL:
                shutil.copyfile(path, target / path.name)
