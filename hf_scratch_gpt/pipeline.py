"""Runs a recipe folder stage by stage, skipping what is up to date, and tells the outcome.

    scratch-gpt quickstart [--output-dir DIR] [--budget-minutes 15]
    scratch-gpt run RECIPES [--output-dir DIR] [--budget-minutes M] [--until STAGE]

RECIPES is a folder with one YAML a stage, by path or by the name of one that comes with the package. Its paths begin
with `runs/<name of the folder>/`, so that each recipe also runs by hand; `--output-dir` moves that root. Stages run in
this process, one after the other, and pass nothing on in memory: what each needs it reads from the folders before it.
"""

import argparse
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_scratch_gpt.cli import STAGES, write_stage_page
from hf_scratch_gpt.reporting.card_settings import CARD_SETTINGS
from hf_scratch_gpt.runs import parse_arguments, read_metrics
from hf_scratch_gpt.runs.arguments import nearest, read_recipe
from hf_scratch_gpt.runs.command_line import CommandParser
from hf_scratch_gpt.runs.files import shipped_folder
from hf_scratch_gpt.runs.hardware import release_freed_memory
from hf_scratch_gpt.runs.identity import METRICS
from hf_scratch_gpt.runs.process import reset_libraries

# The settings that a budget stretches or shrinks, and the minutes that the recipes as written aim at on two cores.
SCALED_SETTINGS = ("max_minutes", "max_steps")
RECIPE_MINUTES = 15.0


@dataclass
class StagePlan:
    """One stage of a recipe folder: its name, its recipe, and the flags that move or scale it."""

    stage: str
    recipe: Path
    flags: list[str]
    output_dir: Path


def find_recipes(name: str) -> Path:
    """The folder of a recipe given by path, or by the name of one that comes with the package.

    Raises:
        FileNotFoundError: if it is neither; the message lists the names that exist.
    """
    if Path(name).is_dir():
        return Path(name)
    shipped = shipped_folder("recipes")
    if (shipped / name).is_dir():
        return shipped / name
    names = sorted(path.name for path in shipped.iterdir() if (path / "pretrain.yaml").is_file())
    raise FileNotFoundError(f"no recipe folder '{name}'; by name there are: {', '.join(names) or 'none'}")


def _move(value: Any, old_root: str, new_root: str) -> Any:
    """`value` with paths below `old_root` moved below `new_root`."""
    if isinstance(value, list):
        return [_move(item, old_root, new_root) for item in value]
    if isinstance(value, str) and (value == old_root or value.startswith(old_root + "/")):
        return new_root + value[len(old_root) :]
    return value


def _scale(key: str, value: Any, factor: float) -> Any:
    if key not in SCALED_SETTINGS or factor == 1.0 or not isinstance(value, int | float) or value <= 0:
        return value
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def plan_stages(recipes: Path, output_dir: str | Path | None, scale: float = 1.0) -> list[StagePlan]:
    """The stages of a recipe folder in the order of the road, with their paths moved below `output_dir`.

    Raises:
        ValueError: if a file is not named after a stage, a recipe has no `output_dir`, or there is none at all.
    """
    old_root = f"runs/{recipes.resolve().name}"
    new_root = Path(output_dir).as_posix() if output_dir else old_root
    plans = []
    for path in sorted(recipes.glob("*.yaml")):
        if path.name == CARD_SETTINGS:
            continue
        stage = path.stem.partition("-")[0]
        if stage not in STAGES:
            raise ValueError(f"{path}: no stage is called '{stage}'{nearest(stage, list(STAGES))}")
        recipe = read_recipe(path)
        if not recipe.get("output_dir"):
            raise ValueError(f"{path}: 'output_dir' is missing")
        flags: list[str] = []
        for key, value in recipe.items():
            changed = _scale(key, _move(value, old_root, new_root), scale)
            if changed != value:
                flags += [f"--{key}", *map(str, changed if isinstance(changed, list) else [changed])]
        plans.append(StagePlan(stage, path, flags, Path(_move(recipe["output_dir"], old_root, new_root))))
    if not plans:
        raise ValueError(f"{recipes}: holds no recipe (one YAML a stage, such as pretrain.yaml)")
    return sorted(plans, key=lambda plan: (list(STAGES).index(plan.stage), plan.recipe.name))


def _parse_plan(plan: StagePlan) -> tuple[Any, Any]:
    module = importlib.import_module(STAGES[plan.stage][0])
    return module, parse_arguments(module.Arguments, [str(plan.recipe), *plan.flags], f"scratch-gpt {plan.stage}")


def _run_id(folder: Path) -> str | None:
    return read_metrics(folder)["run_id"] if (folder / METRICS).is_file() else None


def run_stages(plans: Sequence[StagePlan]) -> float:
    """Run the stages in order; returns the seconds of all of them, those of earlier, interrupted tries included.

    Every recipe is parsed before the first stage starts, so that a wrong key in the last one costs no training.
    """
    began, earlier = time.monotonic(), 0.0
    for plan in plans:
        _parse_plan(plan)
    for number, plan in enumerate(plans, start=1):
        before, start = _run_id(plan.output_dir), time.monotonic()
        print(f"[{number}/{len(plans)}] {plan.stage}: {STAGES[plan.stage][1]}", flush=True)
        reset_libraries()
        # Parsed again, because transformers' settings hold on to the global state that was just reset.
        module, arguments = _parse_plan(plan)
        folder = module.run(arguments)
        write_stage_page(plan.stage, folder)
        release_freed_memory()
        metrics, spent = read_metrics(folder), time.monotonic() - start
        earlier += max(0.0, metrics["seconds"] - spent)
        note = "is up to date" if metrics["run_id"] == before else f"done in {metrics['seconds']:.0f} s"
        print(f"    {note}: {folder}", flush=True)
    return time.monotonic() - began + earlier


def _make_parser(command: str) -> CommandParser:
    parser = CommandParser(prog=f"scratch-gpt {command}", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if command == "run":
        parser.add_argument("recipes", help="recipe folder, by path or by name")
        parser.add_argument("--until", choices=list(STAGES), help="stop after this stage")
    parser.add_argument("--output-dir", help="where the run folders go (default: runs/<name of the recipe folder>)")
    parser.add_argument("--budget-minutes", type=float, default=RECIPE_MINUTES, help="scales the training stages")
    return parser


def _run_command(recipes: str, output_dir: str | None, budget_minutes: float, until: str | None) -> int:
    from hf_scratch_gpt.reporting import stage_table, write_report
    from hf_scratch_gpt.reporting.card import write_cards
    from hf_scratch_gpt.reporting.card_settings import load_settings, read_settings

    if not budget_minutes > 0:
        raise ValueError(f"--budget-minutes is {budget_minutes}: give a number above 0")
    folder = find_recipes(recipes)
    root = Path(output_dir) if output_dir else Path("runs") / folder.resolve().name
    plans = plan_stages(folder, root, budget_minutes / RECIPE_MINUTES)
    if until:
        last = list(STAGES).index(until)
        plans = [plan for plan in plans if list(STAGES).index(plan.stage) <= last]
    load_settings(read_settings(folder))  # a mistake in it is told now, not after the training
    wall_seconds = run_stages(plans)
    report = write_report(root, wall_seconds)
    cardless = write_cards(root, folder)
    is_masked = report["stages"].get("pretrain", {}).get("objective") == "masked"
    if is_masked:
        use = f'try it: pipeline("fill-mask", "{root / "pretrain"}")'
    elif plans[-1].stage == "classify":
        use = f'try it: pipeline("text-classification", "{plans[-1].output_dir}")'
    else:
        use = f"talk to it: scratch-gpt chat {root}"
    print(f"\n{stage_table(report)}\n\nreport: {root / 'report.html'}")
    print("".join(f"no card: {reason}\n" for reason in cardless) + use)
    return 0


def main(arguments: Sequence[str]) -> int:
    """`scratch-gpt run RECIPES …`"""
    parsed = _make_parser("run").parse_args(arguments)
    return _run_command(parsed.recipes, parsed.output_dir, parsed.budget_minutes, parsed.until)


def quickstart(arguments: Sequence[str]) -> int:
    """`scratch-gpt quickstart …`: the recipe folder `quickstart`."""
    parsed = _make_parser("quickstart").parse_args(arguments)
    return _run_command("quickstart", parsed.output_dir, parsed.budget_minutes, None)
