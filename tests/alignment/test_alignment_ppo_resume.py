"""A resumed run ends with the same bits as one that was never stopped, wherever it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ppo_tiny import make_llama, make_reward_model, make_trainer, parameters_of
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from hf_scratch_gpt.alignment.ppo.models import ValueHead, load_critic
from hf_scratch_gpt.runs.checkpoints import newest_checkpoint

# 8 steps a rollout: step 8 is a boundary, 13 is inside its second pass.
OPTIONS = {
    "max_steps": 20,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,
    "kl_target": 0.5,
    "kl_horizon": 100.0,
    "critic_learning_rate": 1e-2,
}
KINDS = {
    "full-shared": {"critic": "shared"},
    "full-separate": {"critic": "separate"},
    "lora-shared": {"critic": "shared", "peft": True},
    "lora-separate": {"critic": "separate", "peft": True},
}


def same_parameters(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])] == []


def training_lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_at_a_rollout_boundary_and_inside_one(tmp_path, kind):
    options = {**OPTIONS, **KINDS[kind]}
    whole = make_trainer(tmp_path / "whole", reward=make_reward_model(), **options)
    whole.train()
    completions = (tmp_path / "whole" / "completions.jsonl").read_text()
    for step in (8, 13):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        has_rollout = (checkpoint / "ppo_rollout.safetensors").is_file()
        assert has_rollout == (step % 8 != 0)
        resumed = make_trainer(tmp_path / "whole", reward=make_reward_model(), **{**options, "save_strategy": "no"})
        torch.manual_seed(step)  # nothing may hang on the process's own random state
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 20
        assert same_parameters(parameters_of(whole), parameters_of(resumed))
        assert training_lines(resumed) == training_lines(whole)
        assert resumed.records.rollouts == whole.records.rollouts
        assert (tmp_path / "whole" / "completions.jsonl").read_text() == completions


def test_policy_and_critic_of_a_checkpoint_load_by_the_auto_classes(tmp_path):
    trainer = make_trainer(tmp_path, critic="separate", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.tensor([[5, 6, 7]])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved" / "value_model")
    assert torch.equal(policy(ids).logits, trainer.model.policy(ids).logits)
    assert_close(critic(ids).logits, trainer.model.critic.eval()(ids).logits)
    assert critic.score.weight.any()


def test_a_value_head_loads_again_and_never_as_the_other_kind(tmp_path):
    trainer = make_trainer(tmp_path, critic="shared", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    head = ValueHead(32)
    load_critic(head, tmp_path / "saved" / "value_model")
    assert torch.equal(head.weight, trainer.model.critic.weight)
    assert head.weight.any()
    other = make_trainer(tmp_path, critic="separate").model.critic
    with pytest.raises(ValueError, match="holds a shared critic, but the settings say critic: separate"):
        load_critic(other, tmp_path / "saved" / "value_model")


def test_a_checkpoint_that_lost_its_rollout_or_is_another_trainers_is_refused(tmp_path):
    options = {**OPTIONS, "max_steps": 8, "save_steps": 3}
    make_trainer(tmp_path, **options).train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "ppo_rollout.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step 3 has no ppo_rollout\.safetensors"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "ppo_state.json").unlink()
    with pytest.raises(ValueError, match="not a checkpoint of PPO"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(checkpoint))


_CHILD = """
import sys
sys.path.insert(0, {tests!r})
from ppo_tiny import make_trainer
from transformers import TrainerCallback
from hf_scratch_gpt.runs.checkpoints import write_manifest
from pathlib import Path

class Manifest(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        write_manifest(Path(args.output_dir) / f"checkpoint-{{state.global_step}}")

trainer = make_trainer({folder!r}, **{options!r})
trainer.add_callback(Manifest())
trainer.train()
"""


def test_a_killed_process_continues_to_the_same_weights(tmp_path):
    options = {**OPTIONS, "critic": "separate", "peft": True, "max_steps": 4000, "lr_scheduler_type": "constant"}
    child = _CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"), options=options)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", child], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 270
        while newest_checkpoint(tmp_path / "killed") is None:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.37)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoint = newest_checkpoint(tmp_path / "killed")
    assert checkpoint is not None
    stopped_at = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    options = {**options, "max_steps": stopped_at + 11, "save_strategy": "no"}
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert same_parameters(parameters_of(whole), parameters_of(resumed))


def test_training_lines_reach_the_run_that_owns_the_trainer(tmp_path):
    """With `runs.training.train`: curve, verified checkpoints, and resume from the newest whole one."""
    from types import SimpleNamespace

    from hf_scratch_gpt.runs.training import train

    curve = []

    def make_run(resumed):
        return SimpleNamespace(
            stage="ppo",
            checkpoints=tmp_path,
            folder=tmp_path,
            resumed=resumed,
            is_main=True,
            truncate_curve=lambda step: None,
            log=lambda **values: curve.append(values),
        )

    options = {**OPTIONS, "max_steps": 10, "save_steps": 5}
    whole = make_trainer(tmp_path, make_llama(), **options)
    train(whole, make_run(False))
    assert "reward" in curve[0]
    assert curve[0]["tokens_per_second"] > 0
    damaged = tmp_path / "checkpoint-10" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"none")
    resumed = make_trainer(tmp_path, make_llama(), **options)
    train(resumed, make_run(True))
    assert same_parameters(parameters_of(whole), parameters_of(resumed))
