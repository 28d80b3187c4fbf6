"""A transformers Trainer on a StageRun: stopped at any step and resumed, it ends with the same weights."""

import dataclasses
import os
import signal

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_scratch_gpt.runs import Interrupted, StageArguments, StageRun
from hf_scratch_gpt.runs.training import ProgressBar, train


class ToyModel(nn.Module):
    """A regression with dropout, so that the random state matters."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout, self.outer = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)

    def forward(self, inputs, labels):
        predicted = self.outer(self.dropout(torch.tanh(self.inner(inputs)))).squeeze(-1)
        return {"loss": nn.functional.mse_loss(predicted, labels)}


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@dataclasses.dataclass
class ToyArguments(StageArguments):
    """Settings of the toy stage."""


class Killed(BaseException):
    """Stands for `kill -9`: nothing of ours gets to run."""


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def run_training(folder, *callbacks, save_total_limit=None, max_steps=12):
    """Train the toy model in `folder`; returns its weights and whether the run was resumed."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    rows = [{"inputs": row, "labels": row.sum()} for row in inputs]
    with StageRun(ToyArguments(output_dir=str(folder)), "toy") as run:
        arguments = TrainingArguments(
            output_dir=str(run.checkpoints),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            save_steps=4,
            save_total_limit=save_total_limit,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            seed=3,
        )
        torch.manual_seed(0)
        trainer = Trainer(model=ToyModel(), args=arguments, train_dataset=rows, callbacks=list(callbacks))
        train(trainer, run)
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        curve, resumed = run.read_curve(), run.resumed
    return weights, curve, resumed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and curve of the run that nothing disturbs."""
    return run_training(tmp_path_factory.mktemp("whole") / "run")


def losses(curve):
    return [(row["step"], row["loss"]) for row in curve if "loss" in row]


def assert_same(result, expected):
    assert losses(result[1]) == losses(expected[1])
    assert all(torch.equal(result[0][name], value) for name, value in expected[0].items())


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("step", [1, 6, 8, 11])
def test_a_run_stopped_by_a_signal_saves_and_resumes_to_identical_weights(tmp_path, uninterrupted, step):
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step}"):
        run_training(tmp_path / "run", At(step, terminate))
    assert f"checkpoint-{step}" in checkpoints_of(tmp_path / "run")
    result = run_training(tmp_path / "run")
    assert result[2]
    assert_same(result, uninterrupted)


@pytest.mark.parametrize("step", [2, 7, 10])
def test_a_killed_run_resumes_from_its_last_checkpoint_to_identical_weights(tmp_path, uninterrupted, step):
    with pytest.raises(Killed):
        run_training(tmp_path / "run", At(step, kill))
    assert_same(run_training(tmp_path / "run"), uninterrupted)


def test_a_run_killed_after_its_last_step_takes_no_step_more(tmp_path, uninterrupted):
    """Its last step is in the middle of an epoch, where a Trainer that resumes there would take another."""
    first = run_training(tmp_path / "run")
    assert_same(run_training(tmp_path / "run"), uninterrupted)
    assert_same(first, uninterrupted)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, uninterrupted, caplog, name):
    with pytest.raises(Killed):
        run_training(tmp_path / "run", At(10, kill))
    path = tmp_path / "run" / "checkpoints" / "checkpoint-8" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_same(run_training(tmp_path / "run"), uninterrupted)
    assert f"checkpoint-8/{name}: content does not match its checksum" in caplog.text


def test_a_signal_at_the_last_step_does_not_interrupt(tmp_path, uninterrupted):
    assert_same(run_training(tmp_path / "run", At(12, terminate)), uninterrupted)


def test_the_older_checkpoint_stays_until_the_newer_one_is_proven(tmp_path):
    run_training(tmp_path / "run", save_total_limit=1)
    assert checkpoints_of(tmp_path / "run") == ["checkpoint-12", "checkpoint-8"]


def test_the_signal_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_training(tmp_path / "run", At(1, terminate))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bar_that_is_switched_off_takes_figures_all_the_same():
    with ProgressBar(total=3, disable=True) as bar:
        bar.update(1)
        bar.set_postfix({"loss": "1.0"})
