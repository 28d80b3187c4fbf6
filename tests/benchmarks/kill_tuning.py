"""Kill tuning runs at random moments, again and again: the final weights must be those of runs left in peace.

    python tests/benchmarks/kill_tuning.py                 # 10 kills of each of sft (LoRA, full), reward and dpo
    python tests/benchmarks/kill_tuning.py --kills 3 --kind reward --seed 7

Each trial starts the command of a user, waits for a random moment (start-up included) and sends SIGKILL. A checkpoint
is written every few steps, so that many kills hit one that is being written. A run that ends before the kills are
spent is compared and begun anew.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "finetuning"))

from finetuning_tiny import make_base, make_rows, write_rows

STEPS = 60
# What can differ between a run and its continuation: dropout, modules trained whole, rows of the embedding, and the
# order of the second epoch and those after it.
LORA = {"peft": "lora", "lora_r": 4, "lora_dropout": 0.1, "lora_modules_to_save": ["model.norm"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-lora": ("sft", LORA),
    "sft-full": ("sft", {"peft": "none"}),
    "sft-dora-unpacked": ("sft", {**LORA, "peft": "dora", "packing": False}),
    "sft-prefix": ("sft", {"peft": "prefix", "prefix_tokens": 4}),
    "sft-adapter": ("sft", {"peft": "adapter"}),
    "reward": ("reward", LORA),
    "dpo": ("dpo", LORA),
}
USUAL = ("sft-lora", "sft-full", "reward", "dpo")


def make_material(folder: Path) -> dict[str, str]:
    """A tiny base model, conversations and preferences."""
    rows = make_rows(40)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    return {
        "base": str(make_base(folder / "base")),
        "sft": write_rows(folder / "rows.jsonl", rows),
        "pairs": write_rows(folder / "pairs.jsonl", pairs),
    }


def write_recipe(folder: Path, name: str, kind: str, material: dict[str, str], steps: int = STEPS) -> Path:
    """A recipe of a run of some seconds that saves at every third step."""
    stage, settings = KINDS[kind]
    recipe = {
        **{"output_dir": str(folder / name), "model_name_or_path": material["base"], "bf16": False},
        **{"dataset": material["sft" if stage == "sft" else "pairs"], "heldout_fraction": 0.2},
        **{"max_steps": steps, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def start(recipe: Path, kind: str, log: Path) -> subprocess.Popen:
    """The command of a user."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_scratch_gpt", KINDS[kind][0], str(recipe)]
    with open(log, "ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=recipe.parent)


def output_of(recipe: Path) -> Path:
    """The folder that a recipe's run writes."""
    return Path(json.loads(recipe.read_text())["output_dir"])


def checkpoints_of(folder: Path) -> set[str]:
    """Names below the run's checkpoints, unfinished ones included."""
    return {path.name for path in (folder / "checkpoints").glob("*checkpoint-*")}


def wait_for_moment(process: subprocess.Popen, folder: Path, draw: random.Random) -> None:
    """Return at a random moment: one in ten in the start-up, else in training, often during a save."""
    if draw.random() < 0.1:
        time.sleep(draw.uniform(0, 10))
        return
    before = checkpoints_of(folder)
    while process.poll() is None and not checkpoints_of(folder) - before:
        time.sleep(0.002)
    time.sleep(draw.choice([0, draw.uniform(0, 0.05), draw.uniform(0, 2)]))


def kill(process: subprocess.Popen) -> bool:
    """Send SIGKILL and wait; `False` if the process ended first."""
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def finish(recipe: Path, kind: str, log: Path) -> dict[str, torch.Tensor]:
    """Let the run end, and return its weights: those of its model, and of its adapter if it has one."""
    if start(recipe, kind, log).wait() != 0:
        raise SystemExit(f"the run did not end well:\n{log.read_text()[-4000:]}")
    folder = output_of(recipe)
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert metrics["steps"] == json.loads(recipe.read_text())["max_steps"]
    assert not list(folder.rglob(".*.tmp")), "a killed writer's files are left"
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def compare(folder: Path, kind: str, material: dict[str, str], kills: int, seed: int) -> Counter[str]:
    """`kills` kills of runs of one kind; returns what was hit."""
    draw, log = random.Random(seed), folder / f"{kind}.log"
    told: Counter[str] = Counter()
    whole = finish(write_recipe(folder, f"{kind}-whole", kind, material), kind, log)
    done = 0
    while done < kills:
        told["runs"] += 1
        recipe = write_recipe(folder, f"{kind}-{told['runs']}", kind, material)
        output = output_of(recipe)
        while done < kills and not (output / "metrics.json").exists():
            process = start(recipe, kind, log)
            wait_for_moment(process, output, draw)
            if not kill(process):
                continue
            done += 1
            left = sorted(checkpoints_of(output))
            unfinished = [name for name in left if not (output / "checkpoints" / name / "manifest.json").exists()]
            told["kills in the middle of a save"] += bool(unfinished)
            print(f"{kind}: kill {done} of {kills}: {left}, of these unfinished {unfinished}", flush=True)
        killed = finish(recipe, kind, log)
        assert whole.keys() == killed.keys()
        different = [name for name, value in whole.items() if not torch.equal(value, killed[name])]
        if different:
            raise SystemExit(f"{output}: differs from the uninterrupted run's in {different}")
        print(f"{kind}: run {told['runs']}: {len(whole)} tensors equal bit for bit", flush=True)
    return told


def main() -> None:
    """Run the kinds that were asked for and print one line of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material = make_material(folder)
        for kind in options.kind or USUAL:
            begin = time.monotonic()
            told = compare(folder, kind, material, options.kills, options.seed)
            print(
                f"{kind}, {time.monotonic() - begin:.0f} s: {options.kills} kills, all equal: {dict(told)}", flush=True
            )


if __name__ == "__main__":
    main()
