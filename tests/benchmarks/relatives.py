"""PPO and its relatives at equal samples on one road: held-out gold rewards in one table.

    python tests/benchmarks/relatives.py --road runs/quickstart --questions 400 --out runs/relatives-table

Every method starts from the road's tuned model, samples `--samples` answers to training questions, and is scored (or
labelled, or ranked) by the road's reward model and checker as its recipe says. Then every model answers the same
held-out questions once at temperature 1, with the same random numbers. Rows: the start, `dpo`, `ppo`, `kto`, `grpo`,
`rloo`, `best_of_n` (tuned on the best of 8), `rlaif` (DPO on ranked answers), and the start's best of 8 at answer
time, whose KL is the bound. `OUT/relatives.json` has all of it, `OUT/METHOD` the models, each of which must chat.

A recipe's settings are chosen on other held-out questions than the table's:

    python tests/benchmarks/relatives.py --road runs/quickstart --only rloo --set learning_rate=3e-3 --skip 400 --out O
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GROUP, OWN_ANSWERS = 8, 6  # answers a question where answers are compared, and where they are paired or labelled


def commands(road: Path, out: Path, samples: int, steps: int | None) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(row, stage, recipe, settings) of every run, in order; `steps` shortens the training of the offline ones."""
    paths = {"model_name_or_path": road / "sft", "dataset": road / "prepare"}
    scored = {"reward_model": road / "reward"}
    offline = {} if steps is None else {"max_steps": steps}
    own = {"own_answer_questions": samples // OWN_ANSWERS, "own_answers_per_question": OWN_ANSWERS}
    asked = {"questions": samples // GROUP, "answers_per_question": GROUP}
    passes = {"max_steps": samples * 2 // 64}  # every sample is used twice, in steps of 64
    ranked = {"dataset": out / "ranked" / "preferences.jsonl", "eval_dataset": road / "prepare"}
    return [
        ("dpo", "dpo", "quickstart/dpo", {**paths, **own, **offline}),
        ("ppo", "ppo", "quickstart/ppo", {**paths, **scored, **passes}),
        ("kto", "kto", "relatives/kto", {**paths, **own, **offline}),
        ("grpo", "grpo", "relatives/grpo", {**paths, **scored, **passes}),
        ("rloo", "rloo", "relatives/rloo", {**paths, **scored, **passes}),
        ("best_of_n", "best_of_n", "relatives/best_of_n", {**paths, **scored, **asked, **offline}),
        ("ranked", "rlaif", "relatives/rlaif", {**paths, **scored, **asked}),
        ("rlaif", "dpo", "relatives/dpo", {**paths, **offline, **ranked}),
    ]


def scratch_gpt(*words: Any) -> str:
    """Run a command in a process of its own; returns what it printed.

    Raises:
        RuntimeError: with what it said, if it failed.
    """
    command = [sys.executable, "-m", "hf_scratch_gpt", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:5])} failed: {done.stderr[-2000:]}")
    return done.stdout


def train(row: str, stage: str, recipe: str, settings: dict[str, Any], out: Path) -> float:
    """Run one method, unless it is done; returns the CPU seconds that it took."""
    before = os.times()
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    scratch_gpt(stage, ROOT / "recipes" / f"{recipe}.yaml", *flags, "--output_dir", out / row)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(road: Path, folder: Path, questions: slice, seed: int) -> dict[str, Any]:
    """One row: held-out gold reward, gain, KL and share ended, with intervals."""
    from hf_scratch_gpt.alignment.measuring import measure_policy, read_checked_rows
    from hf_scratch_gpt.alignment.scoring import ModelScorer
    from hf_scratch_gpt.evaluation.models import load_model

    rows = read_checked_rows(str(road / "prepare"), "heldout")[questions]
    policy, tokenizer = load_model(str(folder))
    settings = SimpleNamespace(model_name_or_path=str(road / "sft"), max_completion_length=32, seed=seed)
    measured, _ = measure_policy(settings, policy, tokenizer, rows, [(ModelScorer(str(road / "reward")), 1.0)])
    return {name.removeprefix("heldout_"): value for name, value in measured.items()}


def best_at_answer_time(folder: Path) -> dict[str, Any]:
    """The start's best of n on held-out questions, as `best_of_n` measured it."""
    last = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]["heldout_by_n"][-1]
    return {**{name: value for name, value in last.items() if name != "score"}, "kl": last["kl_bound"]}


def chats(folder: Path, question: str) -> str:
    """What the model says to a question.

    Raises:
        RuntimeError: if it says nothing, or cannot be talked to.
    """
    said = scratch_gpt("chat", folder, "--prompt", question, "--max_new_tokens", 32).strip()
    if not said:
        raise RuntimeError(f"{folder}: says nothing to {question!r}")
    return said


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def cell(row: dict[str, Any], name: str, digits: int) -> str:
        if name not in row:
            return "–"
        low, high = row.get(f"{name}_interval", (None, None))
        text = f"{row[name]:.{digits}f}"
        return text if low is None else f"{text} ({low:.{digits}f} to {high:.{digits}f})"

    lines = [
        "| model | gold reward | gain on the start | KL | ended | CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [cell(row, *of) for of in (("gold", 3), ("gold_gain", 3), ("kl", 2), ("share_ended", 3))]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {cell(row, 'cpu_seconds', 0)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all methods, measure them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--road", type=Path, required=True, help="a quickstart road with prepare, sft and reward")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=400, help="held-out questions")
    parser.add_argument("--skip", type=int, default=0, help="so many held-out questions before them")
    parser.add_argument("--samples", type=int, default=1536, help="answers that each method samples")
    parser.add_argument("--steps", type=int, help="shortens the training of the offline methods, for a trial")
    parser.add_argument("--only", nargs="*", help="rows to run; ranked belongs to rlaif")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="of each method, but not ranked")
    parser.add_argument("--seed", type=int, default=7)
    parsed = parser.parse_args()
    road, out = parsed.road.resolve(), parsed.out.resolve()
    if parsed.samples % 256:
        parser.error(f"--samples is {parsed.samples}, expected a multiple of 256, which PPO and GRPO sample at a time")
    out.mkdir(parents=True, exist_ok=True)
    question = json.loads((road / "prepare" / "tasks" / "heldout.jsonl").read_text().splitlines()[0])["prompt"]
    questions = slice(parsed.skip, parsed.skip + parsed.questions)
    changed = dict(setting.split("=", 1) for setting in parsed.set)
    rows: list[dict[str, Any]] = [{"name": "start", **measure(road, road / "sft", questions, parsed.seed)}]
    for name, stage, recipe, settings in commands(road, out, parsed.samples, parsed.steps):
        if parsed.only and name not in parsed.only:
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        cpu_seconds = train(name, stage, recipe, settings if name == "ranked" else {**settings, **changed}, out)
        if name == "ranked":
            continue  # preferences, no model
        measured = measure(road, out / name, questions, parsed.seed)
        said = chats(out / name, question[0]["content"])
        rows.append({"name": name, "cpu_seconds": cpu_seconds, "says": said, **measured})
        if name == "best_of_n":
            rows.append({"name": f"start, best of {GROUP}", **best_at_answer_time(out / name)})
        asked = {"samples": parsed.samples, "questions": [questions.start, questions.stop]}
        report = {**asked, "changed": changed, "rows": rows}
        (out / "relatives.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
