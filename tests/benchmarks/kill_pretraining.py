"""Kill a pretraining run at random moments, again and again: the final weights must be those of a run left in peace.

    python tests/benchmarks/kill_pretraining.py              # 50 kills, half of them of runs on two processes
    python tests/benchmarks/kill_pretraining.py --kills 10 --processes 2 --seed 7

Each trial starts the same command, waits for a random moment (start-up included) and sends SIGKILL: to the process, or
of two processes (gloo) to the launcher or to either rank. A checkpoint is written every few steps, so that many kills
hit one that is being written. A run that ends before the kills are spent is compared and begun anew.
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

import psutil
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretraining"))

from conftest import _prepare
from pretraining_tiny import TINY_MODEL

STEPS = 400
LAUNCHER = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
LAUNCHER += " --main_process_port 0 --mixed_precision no --dynamo_backend no -m hf_scratch_gpt"


def write_recipe(folder: Path, name: str, dataset: Path) -> Path:
    """A recipe of a run of some seconds that saves at every third step."""
    recipe = {
        **{"output_dir": str(folder / name), "dataset_dir": str(dataset), "model_overrides": TINY_MODEL},
        **{"context_length": 32, "batch_size": 4, "max_steps": STEPS, "precision": "fp32", "compile": "false"},
        **{"checkpoint_steps": 3, "checkpoint_seconds": 0.0, "evaluation_bytes": 1000},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def start(recipe: Path, processes: int, log: Path, stage: str = "pretrain") -> subprocess.Popen:
    """The command of a user, on one or two processes."""
    module = LAUNCHER.split() if processes == 2 else ["hf_scratch_gpt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *module, stage, str(recipe)], env=environment, stdout=file, stderr=file
        )


def ranks_of(launcher: int) -> dict[str, psutil.Process]:
    """The processes that a launcher has started, by rank."""
    found = {}
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "RANK" in environment:
            found[f"rank {environment['RANK']}"] = child
    return found


def kill_one(process: subprocess.Popen, processes: int, draw: random.Random) -> str | None:
    """Kill the process, the launcher, or a rank; wait until all are gone, and return who it was."""
    try:
        family = {"launcher": psutil.Process(process.pid), **ranks_of(process.pid)}
        who = draw.choice(sorted(family))
        family[who].send_signal(signal.SIGKILL)
    except psutil.Error:
        return None  # it ended first
    process.wait()
    _, alive = psutil.wait_procs(list(family.values()), timeout=120)
    if alive:
        raise SystemExit(f"{who} was killed, and {len(alive)} others went on: {[one.cmdline() for one in alive]}")
    return who if processes == 2 else "process"


def checkpoints_of(folder: Path) -> set[str]:
    """Names below the run's checkpoints, unfinished ones included."""
    return {path.name for path in (folder / "checkpoints").glob("*")}


def wait_for_moment(process: subprocess.Popen, folder: Path, draw: random.Random) -> None:
    """Return at a random moment: one in five in the start-up, else in training, often during a save."""
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 8))
        return
    before = checkpoints_of(folder)
    while process.poll() is None and not checkpoints_of(folder) - before:
        time.sleep(0.002)
    time.sleep(draw.choice([0, draw.uniform(0, 0.02), draw.uniform(0, 1.5)]))


def finish(recipe: Path, processes: int, log: Path) -> dict[str, torch.Tensor]:
    """Let the run end, and return its weights."""
    process = start(recipe, processes, log)
    if process.wait() != 0:
        raise SystemExit(f"the run did not end well:\n{log.read_text()[-4000:]}")
    folder = Path(json.loads(recipe.read_text())["output_dir"])
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["steps"] == STEPS
    assert not list(folder.rglob(".*.tmp")), "a killed writer's files are left"
    return load_file(folder / "model.safetensors")


def compare(folder: Path, dataset: Path, processes: int, kills: int, seed: int) -> Counter[str]:
    """`kills` kills of runs on `processes` processes; returns who was killed how often, and what was hit."""
    draw, log = random.Random(seed), folder / f"log-{processes}.txt"
    told: Counter[str] = Counter()
    whole = finish(write_recipe(folder, f"whole-{processes}", dataset), processes, log)
    done = 0
    while done < kills:
        told["runs"] += 1
        recipe = write_recipe(folder, f"killed-{processes}-{told['runs']}", dataset)
        output = Path(json.loads(recipe.read_text())["output_dir"])
        while done < kills and not (output / "metrics.json").exists():
            process = start(recipe, processes, log)
            wait_for_moment(process, output, draw)
            who = kill_one(process, processes, draw)
            if who is None:
                continue
            done += 1
            told[who] += 1
            left = sorted(checkpoints_of(output))
            told["kills in the middle of a save"] += any(name.endswith(".tmp") for name in left)
            print(f"kill {done} of {kills}, {processes} process(es): {who} {left}", flush=True)
        killed = finish(recipe, processes, log)
        different = [name for name, value in whole.items() if not torch.equal(value, killed[name])]
        if different:
            raise SystemExit(f"{output}: differs from the uninterrupted run's in {different}")
        print(f"run {told['runs']}: {len(whole)} tensors equal bit for bit", flush=True)
    return told


def main() -> None:
    """Run both kinds and print one line of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only runs on so many; both by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = [options.processes] if options.processes else [1, 2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = _prepare(folder / "prepared", mask_token=False)
        for number, processes in enumerate(kinds):
            kills = options.kills // len(kinds) + (number < options.kills % len(kinds))
            begin = time.monotonic()
            told = compare(folder, dataset, processes, kills, options.seed)
            print(f"{processes} process(es), {time.monotonic() - begin:.0f} s: {kills} kills, all equal: {dict(told)}")


if __name__ == "__main__":
    main()
