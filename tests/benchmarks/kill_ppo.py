"""Kill PPO at random moments, again and again: the final weights must be those of a run left in peace.

    python tests/benchmarks/kill_ppo.py              # 20 kills, over four kinds of run and one and two processes
    python tests/benchmarks/kill_ppo.py --kills 4 --kind lora-shared --processes 2 --seed 7

Each trial starts the same command (`scratch-gpt ppo`), waits for a random moment and sends SIGKILL: to the process, or
of two processes (gloo) to the launcher or to either rank. A checkpoint is written at every third step of rollouts of
eight, so that kills hit moments inside and between rollouts, in sampling, in training and in a save. A run that ends
before its kills are spent is compared and begun anew.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill_pretraining import checkpoints_of, kill_one, start

KINDS = {
    "full-separate": {"peft": "none", "critic": "separate"},
    "full-shared": {"peft": "none", "critic": "shared"},
    "lora-separate": {"peft": "lora", "critic": "separate"},
    "lora-shared": {"peft": "lora", "critic": "shared"},
}
STEPS, STEPS_PER_ROLLOUT = 96, 8
_FURTHEST_SAVE = 12  # of the 32 of a run
COLOURS = ["red", "green", "blue", "black", "white"]


def make_inputs(folder: Path) -> Path:
    """A tiny chat model, a reward model and prompts."""
    from transformers import set_seed

    from hf_scratch_gpt.model import (
        ScratchGPTConfig,
        ScratchGPTForCausalLM,
        ScratchGPTForSequenceClassification,
        ScratchGPTTokenizer,
    )

    tokenizer = ScratchGPTTokenizer.train(["Which is red green blue black white? user assistant"] * 9, vocab_size=300)
    set_seed(0)
    config = ScratchGPTConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ScratchGPTForCausalLM(config).save_pretrained(folder / "sft")
    config.update({"num_labels": 1, "reward_mean": 0.1, "reward_std": 0.5})
    ScratchGPTForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": [{"role": "user", "content": f"Which is {COLOURS[number % 5]}?"}]} for number in range(40)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def write_recipe(folder: Path, name: str, kind: str, processes: int) -> Path:
    """A recipe of a run of some seconds; JSON is YAML."""
    recipe = {
        "output_dir": str(folder / name),
        "model_name_or_path": str(folder / "sft"),
        "reward_model": str(folder / "reward"),
        "dataset": str(folder / "prompts.jsonl"),
        "eval_prompts": 0,
        "max_steps": STEPS,
        "rollout_batch_size": 16,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": 4 // processes,
        "max_new_tokens": 6,
        "learning_rate": 5e-3,
        "kl_target": 2.0,
        "save_steps": 3,
        "logging_steps": 4,
        "bf16": False,
        "ptx_dataset": str(folder / "text.jsonl"),
        "ptx_length": 16,
        "ptx_batch_size": 4 // processes,
        "ptx_coef": 0.1,
        **KINDS[kind],
    }
    (folder / "text.jsonl").write_text('{"text": "red is not green and black is not white"}\n' * 20, encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def launch(recipe: Path, processes: int, log: Path):
    """The command of a user."""
    return start(recipe, processes, log, "ppo")


def wait_for_moment(process, folder: Path, draw: random.Random) -> None:
    """Return at a random moment of the training: some time after one of the next saves, which itself takes a while."""
    for _ in range(draw.randint(1, _FURTHEST_SAVE)):
        before = checkpoints_of(folder)
        while process.poll() is None and not checkpoints_of(folder) - before:
            time.sleep(0.002)
    time.sleep(draw.choice([0, draw.uniform(0, 0.05), draw.uniform(0, 1.0)]))


def finish(recipe: Path, processes: int, log: Path) -> dict[str, torch.Tensor]:
    """Let the run end, and return its weights, the critic's among them."""
    process = launch(recipe, processes, log)
    if process.wait() != 0:
        raise SystemExit(f"the run did not end well:\n{log.read_text()[-4000:]}")
    folder = Path(json.loads(recipe.read_text())["output_dir"])
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["steps"] == STEPS
    assert not list(folder.rglob(".*.tmp")), "a killed writer's files are left"
    critic = folder / "value_model"
    weights = load_file(folder / "model.safetensors")
    return {
        **weights,
        **{f"critic.{n}": v for path in critic.glob("*.safetensors") for n, v in load_file(path).items()},
    }


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, or 0."""
    return max(
        (int(name.rpartition("-")[2]) for name in checkpoints_of(folder) if name.startswith("checkpoint-")), default=0
    )


def compare(folder: Path, kind: str, processes: int, kills: int, draw: random.Random) -> Counter[str]:
    """`kills` kills of runs of one kind; returns who was killed how often, and where."""
    name = f"{kind}-{processes}"
    log = folder / f"{name}.log"
    told: Counter[str] = Counter()
    whole = finish(write_recipe(folder, f"{name}-whole", kind, processes), processes, log)
    done = 0
    while done < kills:
        told["runs"] += 1
        recipe = write_recipe(folder, f"{name}-killed-{told['runs']}", kind, processes)
        output = Path(json.loads(recipe.read_text())["output_dir"])
        while done < kills and not (output / "metrics.json").exists():
            process = launch(recipe, processes, log)
            wait_for_moment(process, output, draw)
            who = kill_one(process, processes, draw)
            if who is None:
                continue
            done += 1
            step = newest_step(output)
            told[who] += 1
            told["resumed between rollouts" if step % STEPS_PER_ROLLOUT == 0 else "resumed inside a rollout"] += 1
            print(f"{name}: kill {done} of {kills}: {who}, newest checkpoint {step}", flush=True)
        killed = finish(recipe, processes, log)
        different = [name for name, value in whole.items() if not torch.equal(value, killed[name])]
        if different:
            raise SystemExit(f"{output}: differs from the uninterrupted run's in {different}")
        print(f"{name}: run {told['runs']}: {len(whole)} tensors equal bit for bit", flush=True)
    return told


def main() -> None:
    """Run all kinds and print one line of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kind", choices=KINDS, help="only this kind; all by default")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only runs on so many; both by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    groups = [
        (kind, processes)
        for processes in ([options.processes] if options.processes else [1, 2])
        for kind in ([options.kind] if options.kind else KINDS)
    ]
    os.environ["TQDM_DISABLE"] = "1"
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = make_inputs(Path(name))
        for number, (kind, processes) in enumerate(groups):
            kills = options.kills // len(groups) + (number < options.kills % len(groups))
            if kills == 0:
                continue
            begin = time.monotonic()
            told = compare(folder, kind, processes, kills, draw)
            seconds = time.monotonic() - begin
            print(
                f"{kind}, {processes} process(es), {seconds:.0f} s: {kills} kills, all equal: {dict(told)}", flush=True
            )


if __name__ == "__main__":
    main()
