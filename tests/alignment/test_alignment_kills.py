"""A reward or DPO run that is really killed, in the very moment of a save, ends with the weights of one that was not.

`tests/benchmarks/kill_tuning.py` does the same at many random moments.
"""

import signal
import subprocess
import sys
import time

import pytest
import torch
from alignment_tiny import make_model, write_preferences, write_recipe
from safetensors.torch import load_file

from hf_scratch_gpt.alignment import dpo, reward
from hf_scratch_gpt.runs import parse_arguments


def all_weights(folder):
    """Of the merged model and of the adapter with the modules that were trained whole."""
    paths = sorted(folder.rglob("*.safetensors"))
    assert len(paths) == 2
    return {f"{path.name} {name}": value for path in paths for name, value in load_file(path).items()}


@pytest.mark.parametrize("stage", [reward, dpo], ids=["reward", "dpo"])
def test_killed_in_a_save_and_run_again_it_gives_the_very_same_weights(stage, tmp_path):
    model, data = make_model(tmp_path / "model"), write_preferences(tmp_path / "pairs.jsonl")
    settings = {"max_steps": 24, "save_steps": 4, "lora_dropout": 0.1, "lora_modules_to_save": ["model.norm"]}
    whole = stage.run(parse_arguments(stage.Arguments, [write_recipe(tmp_path / "whole", model, data, **settings)]))
    folder, recipe = tmp_path / "killed", write_recipe(tmp_path / "killed", model, data, **settings)
    command = [sys.executable, "-m", "hf_scratch_gpt", stage.__name__.rpartition(".")[2], recipe]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 270
    while not list(folder.glob("checkpoints/checkpoint-8*")) and time.monotonic() < deadline:  # the second is begun
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    resumed = stage.run(parse_arguments(stage.Arguments, [recipe]))
    expected, found = all_weights(whole), all_weights(resumed)
    assert expected.keys() == found.keys()
    assert any("score" in name for name in expected) is (stage is reward)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
