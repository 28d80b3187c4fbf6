"""One run, spread in other ways: the same windows, the same losses, and one kind of checkpoint for all."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    "average alone": (1, "none", {"ema_decay": 0.5, "evaluation_steps": 2}),
    "average fsdp": (2, "fsdp", {"ema_decay": 0.5, "evaluation_steps": 2}),
}
# Batches of random tokens, with a checkpoint of step 80 to go back to.
POISONED = {"poisoned alone": (1, "none"), "poisoned ddp": (2, "ddp"), "poisoned fsdp": (2, "fsdp")}
POISON, LONG = (90, 100), {"max_steps": 120, "checkpoint_steps": 20, "evaluation_bytes": 0, "batch_size": 4}
STREAMED = {"stream alone": (1, "none"), "stream fsdp": (2, "fsdp")}
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
    jobs += [job(name, *how, LONG, poison=POISON) for name, how in POISONED.items()]
    jobs.append(job("clean", 1, "none", LONG))
    stream = {"stream": [str(root / "stream.jsonl")], "checkpoint_steps": 2}
    texts = [f"number {number} of the list of names and values in the file, {7 * number}" for number in range(200)]
    Path(stream["stream"][0]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    jobs += [job(name, *how, stream) for name, how in STREAMED.items()]
    jobs.append(job("killed stream", 2, "ddp", stream, kill_at=STEPS - 1))
    jobs.append(job("stream 2 to 1", 1, "none", stream, copy_from=str(root / "killed-stream")))
    for name, (source, processes, kind) in CONTINUED.items():
        jobs.append(job(name, processes, kind, {}, copy_from=str(root / source.replace(" ", "-"))))
    path = root / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("process_groups.py")
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return lambda name: root / name.replace(" ", "-")


def read_curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def read_losses(folder):
    lines = read_curve(folder)
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


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


def test_the_average_of_sharded_weights_is_that_of_whole_ones(runs):
    assert_same_run(runs("average fsdp"), runs("average alone"))
    one, other, plain = (
        load_file(runs(name) / "model.safetensors") for name in ("average alone", "average fsdp", "alone")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(one["model.embed_tokens.weight"], plain["model.embed_tokens.weight"], atol=2e-5)
    evaluated = [
        [line for line in read_curve(runs(name)) if "heldout_bits_per_byte" in line]
        for name in ("average alone", "average fsdp")
    ]
    assert len(evaluated[0]) == 2
    for line, its_other in zip(*evaluated, strict=True):
        assert its_other["heldout_bits_per_byte"] == pytest.approx(line["heldout_bits_per_byte"], abs=1e-4)


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def steps_read(folder, rank):
    """The numbers of the batches that a process read, in its order."""
    lines = folder.with_name(f"{folder.name}.windows.{rank}.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("name", ["poisoned ddp", "poisoned fsdp"])
def test_all_processes_go_back_from_a_spike_and_pass_over_the_same_data(runs, name):
    folder, alone = runs(name), runs("poisoned alone")
    metrics, expected = read_metrics(folder), read_metrics(alone)
    (record,), (its_record,) = metrics["rollbacks"], expected["rollbacks"]
    assert {**record, "reason": ""} == {**its_record, "reason": ""}  # the reason has digits of the losses
    first, last = record["first_batch"], record["last_batch"]
    assert 80 == record["back_to"] <= first <= POISON[0] <= last
    for number in ("skipped_updates", "skipped_batches", "steps"):
        assert metrics[number] == expected[number]
    assert metrics["skipped_batches"] == last + 1 - first
    order = [*range(last + 1), *range(80, first), *range(last + 1, 120 + last + 1 - first)]
    assert [steps_read(path, rank) for path, rank in ((folder, 0), (folder, 1), (alone, 0))] == [order] * 3
    digests = {folder.with_name(f"{folder.name}.weights.{rank}").read_text() for rank in (0, 1)}
    assert len(digests) == 1
    measured = metrics["heldout_bits_per_byte"]
    assert measured == pytest.approx(expected["heldout_bits_per_byte"], rel=2e-3)
    assert measured < 1.02 * read_metrics(runs("clean"))["heldout_bits_per_byte"]


@pytest.mark.parametrize("name", ["stream fsdp", "stream 2 to 1"])
def test_processes_share_a_stream_and_one_goes_on_where_two_were_killed(runs, name):
    assert_same_run(runs(name), runs("stream alone"))
    windows, expected = read_windows(runs(name)), read_windows(runs("stream alone"))
    assert sorted(expected) == list(range(STEPS))
    assert windows == {step: expected[step] for step in windows}
    # Of the checkpoints after 2 and 4 steps, the second may not have been whole when the run was killed.
    assert min(windows) == 0 if name == "stream fsdp" else min(windows) in (2, 4)
    assert expected != read_windows(runs("alone"))
