"""One run, spread in other ways: the same windows, the same losses, and one kind of checkpoint for all."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pretraining_tiny import TINY_MODEL
from safetensors.torch import load_file

from hf_scratch_gpt.pretraining.pretrain import Arguments

STEPS, STOP = 6, 3
SETTINGS = {"max_steps": STEPS, "logging_steps": 1, "grad_clip": 0.5, "checkpoint_seconds": 0.0, "batch_size": 8}
JOBS = {
    "alone": (1, "none", {}),
    "ddp": (2, "ddp", {}),
    "fsdp": (2, "fsdp", {"num_processes": 2, "distributed": "fsdp"}),
    # Uneven slices: 3 processes do not divide the widths of 32 and 64.
    "fsdp on 3": (3, "fsdp", {"batch_size": 6}),
    "alone, 6": (1, "none", {"batch_size": 6}),
    "muon alone": (1, "none", {"optimizer": "muon"}),
    "muon fsdp": (2, "fsdp", {"optimizer": "muon"}),
    # Each process has other padding: the mean is over the targets of all.
    "packed alone": (1, "none", {"packing": "best_fit"}),
    "packed ddp": (2, "ddp", {"packing": "best_fit"}),
    "packed fsdp": (2, "fsdp", {"packing": "best_fit"}),
    "masked alone": (1, "none", {"objective": "masked"}),
    "masked fsdp": (2, "fsdp", {"objective": "masked", "gradient_accumulation_steps": 2}),
}
CONTINUED = {
    "ddp 2 to 1": ("stopped ddp", 1, "none"),
    "ddp 2 to 4": ("stopped ddp", 4, "ddp"),
    "ddp 2 to fsdp 2": ("stopped ddp", 2, "fsdp"),
    "fsdp 2 to 1": ("stopped fsdp", 1, "none"),
    "fsdp 2 to fsdp 4": ("stopped fsdp", 4, "fsdp"),
    "fsdp 2 to ddp 2": ("stopped fsdp", 2, "ddp"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, masked_folder):
    """Output folders by name, all made by one script that pays for its imports once."""
    root = tmp_path_factory.mktemp("spread")
    common = {"dataset_dir": str(masked_folder), "model_overrides": TINY_MODEL, "context_length": 32}
    common |= {"warmup_steps": 2, "precision": "fp32", "compile": "false", "evaluation_bytes": 1000}
    common |= {"optimizer": "adamw", **SETTINGS}

    def job(name, processes, kind, changes, **more):
        arguments = {**common, **changes, "output_dir": str(root / name.replace(" ", "-"))}
        assert {field.name for field in dataclasses.fields(Arguments)} >= arguments.keys()
        return {"processes": processes, "kind": kind, "arguments": arguments, **more}

    jobs = [job(name, *rest) for name, rest in JOBS.items()]
    jobs += [job(f"stopped {kind}", 2, kind, {}, stop_at=STOP) for kind in ("ddp", "fsdp")]
    for name, (source, processes, kind) in CONTINUED.items():
        jobs.append(job(name, processes, kind, {}, copy_from=str(root / source.replace(" ", "-"))))
    path = root / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("process_groups.py")
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return lambda name: root / name.replace(" ", "-")


def read_losses(folder):
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def read_windows(folder):
    """The windows of each step, in the order of the ranks."""
    steps = {}
    for path in sorted(folder.parent.glob(f"{folder.name}.windows.*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["windows"])
    return steps


def assert_same_run(folder, reference, tolerance=1e-5):
    losses, expected = read_losses(folder), read_losses(reference)
    assert losses.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, (loss, norm) in expected.items():
        assert losses[step][0] == pytest.approx(loss, abs=tolerance)
        assert losses[step][1] == pytest.approx(norm, rel=10 * tolerance)
    assert json.loads((folder / "config.json").read_text()) == json.loads((reference / "config.json").read_text())
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == load_file(reference / "model.safetensors").keys()
    measured = [json.loads((path / "metrics.json").read_text())["metrics"] for path in (folder, reference)]
    for name in ("heldout_bits_per_byte", "random_init_bits_per_byte"):
        if name in measured[1]:
            assert measured[0][name] == pytest.approx(measured[1][name], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("ddp", "alone"),
        ("fsdp", "alone"),
        ("fsdp on 3", "alone, 6"),
        ("packed ddp", "packed alone"),
        ("packed fsdp", "packed alone"),
        ("masked fsdp", "masked alone"),
    ],
)
def test_losses_do_not_depend_on_how_a_run_is_spread(runs, name, reference):
    assert_same_run(runs(name), runs(reference))
    assert read_windows(runs(name)) == read_windows(runs(reference))


def test_muon_orthogonalises_whole_matrices_of_a_sharded_model(runs):
    # Its bf16 iterations round a difference of 1e-7 up to 1e-3 of an update; slices alone would be far off.
    assert_same_run(runs("muon fsdp"), runs("muon alone"), tolerance=1e-3)


@pytest.mark.parametrize("name", CONTINUED)
def test_a_checkpoint_continues_on_other_processes_with_the_same_data(runs, name):
    folder = runs(name)
    assert_same_run(folder, runs("alone"))
    windows, expected = read_windows(folder), read_windows(runs("alone"))
    assert windows == {step: expected[step] for step in range(STOP, STEPS)}


def test_metrics_tell_how_a_run_was_spread(runs):
    for name, expected in (("alone", (1, "none")), ("ddp", (2, "ddp")), ("fsdp 2 to fsdp 4", (4, "fsdp"))):
        metrics = json.loads((runs(name) / "metrics.json").read_text())["metrics"]
        assert (metrics["processes"], metrics["distributed"]) == expected
