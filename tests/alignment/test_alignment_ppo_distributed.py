"""Two processes over gloo are one trainer: the same parameters on both, and those of one process on the same batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppo_processes import KINDS
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_scratch_gpt.runs.checkpoints import find_damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which `ppo_processes.py` ran."""
    path = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("ppo_processes.py")
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-1000:]
    return path


def read(folder, name, rank=0):
    told = json.loads((folder / f"{name}.{rank}.json").read_text())
    return told, load_file(folder / f"{name}.{rank}.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_end_with_the_same_parameters_and_those_of_one_process(folder, kind):
    (first, ours), (second, theirs), (alone, single) = (
        read(folder, f"{kind}-2", 0), read(folder, f"{kind}-2", 1), read(folder, f"{kind}-1"),
    )  # fmt: skip
    assert (first["processes"], second["processes"], alone["processes"]) == (2, 2, 1)
    assert first["steps"] == alone["steps"] == 6
    assert first["tokens"] == alone["tokens"]
    parameters = [name for name in ours if name.startswith("parameter.")]
    assert parameters
    for name in parameters:
        assert torch.equal(ours[name], theirs[name]), name
        assert_close(ours[name], single[name], atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_13_whitening_is_global_and_the_rollout_that_of_one_process(folder, kind):
    ours, theirs, single = (read(folder, f"{kind}-{n}", rank)[1] for n, rank in ((2, 0), (2, 1), (1, 0)))
    names = [name for name in single if name.startswith("rollout")]
    assert any(name.startswith("rollout1.") for name in names)
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name
        assert_close(ours[name], single[name], atol=1e-4, rtol=1e-4, msg=name)
    mask, advantages = ours["rollout0.mask"].bool(), ours["rollout0.advantages"]
    assert float(advantages[mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages[mask].std(unbiased=False)) == pytest.approx(1, abs=1e-3)
    # Whitened by each process alone, each half would have mean 0.
    half = advantages[:8][mask[:8]]
    assert abs(float(half.mean())) > 1e-3


def test_9_peft_trains_under_ddp(folder):
    told, tensors = read(folder, "lora-shared-2", 1)
    assert (told["processes"], told["steps"]) == (2, 6)
    adapters = [value for name, value in tensors.items() if "lora_B" in name]
    assert adapters
    assert all(value.any() for value in adapters)  # they begin at zero


@pytest.mark.parametrize("kind", KINDS)
def test_log_lines_and_evaluation_count_all_processes(folder, kind):
    two, one = read(folder, f"{kind}-2")[0], read(folder, f"{kind}-1")[0]
    for first, second in zip(two["lines"] + two["rollouts"], one["lines"] + one["rollouts"], strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert first[name] == pytest.approx(second[name], abs=1e-4, rel=1e-3), name
    assert two["evaluation"].keys() == one["evaluation"].keys()
    for name, value in one["evaluation"].items():  # five prompts: two and three
        assert two["evaluation"][name] == pytest.approx(value, abs=1e-4, rel=1e-3), name


@pytest.mark.parametrize("kind", ["full-separate", "lora-shared"])
def test_a_resumed_run_of_two_processes_ends_with_the_same_bits(folder, kind):
    checkpoint = folder / f"saved-{kind}" / "checkpoint-3"
    assert find_damage(checkpoint) is None
    assert (checkpoint / "ppo_rollout.safetensors").is_file()
    for rank in (0, 1):
        (whole, ours), (resumed, theirs) = (read(folder, f"{n}-{kind}", rank) for n in ("whole", "resumed"))
        assert whole["steps"] == resumed["steps"] == 7
        assert whole["lines"] == resumed["lines"]
        for name in ours:
            if name.startswith("parameter."):
                assert torch.equal(ours[name], theirs[name]), name


def test_a_reward_that_fails_on_one_process_stops_both_with_its_message(folder):
    errors = [read(folder, "raising", rank)[0]["error"] for rank in (0, 1)]
    assert errors == ["reward function 'raises_on_the_second' raised RuntimeError: no judge here"] * 2
