"""fp16 trains as fp32 does: the scale is GradScaler's, costs no update that it need not, and resumes bitwise."""

import json
import math
import random

import pytest
import torch
from pretraining_tiny import StopAfter
from safetensors.torch import load_file

from hf_scratch_gpt.pretraining import loss_scale
from hf_scratch_gpt.pretraining.checkpointing import TrainingState
from hf_scratch_gpt.pretraining.distributed import check_launch
from hf_scratch_gpt.pretraining.loop import PretrainingLoop
from hf_scratch_gpt.pretraining.loss_scale import LossScale
from hf_scratch_gpt.pretraining.pretrain import run
from hf_scratch_gpt.runs import Interrupted, read_metrics


def read_curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def overflow_at(monkeypatch, steps, value=math.inf):
    """Gradients of these steps are as if they had left fp16's range; the loss is not touched."""
    accumulate = PretrainingLoop._accumulate_gradients

    def overflown(self, batch):
        loss = accumulate(self, batch)
        if self.state.step in steps:
            next(self.module.parameters()).grad[0] = value
        return loss

    monkeypatch.setattr(PretrainingLoop, "_accumulate_gradients", overflown)


def test_the_scale_and_the_updates_are_those_of_torchs_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "STEPS_TO_GROW", 3)
    draw = random.Random(0)
    values = [draw.choice([0.5, 1.5, -2.0, 3.0, math.inf, math.nan]) for _ in range(60)]
    theirs, ours = (torch.nn.Parameter(torch.tensor([1.0, -1.0])) for _ in range(2))
    optimizers = [torch.optim.SGD([parameter], lr=0.125) for parameter in (theirs, ours)]
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale.FIRST_SCALE, growth_interval=3)
    state = TrainingState()
    scale = LossScale(state, enabled=True)
    for value in values:
        for parameter, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (parameter * torch.tensor([value, 0.25])).sum()
            if parameter is theirs:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                (loss * scale.factor).backward()
                scale.unscale([parameter])
                if not scale.overflowed(0.0, float(parameter.grad.norm())):
                    optimizer.step()
        assert scaler.get_scale() == scale.factor
        assert torch.equal(theirs, ours)
    assert state.overflows == sum(not math.isfinite(value) for value in values) > 10


def test_what_the_scale_is_not_to_blame_for_is_left_to_the_spike_guard():
    state = TrainingState(loss_scale=2.0)
    scale = LossScale(state, enabled=True)
    assert not scale.overflowed(math.nan, math.nan)
    assert scale.overflowed(3.0, math.inf)
    assert state.loss_scale == 1.0
    assert not scale.overflowed(3.0, math.inf)
    assert (state.overflows, state.loss_scale) == (1, 1.0)
    off = LossScale(TrainingState(), enabled=False)
    assert off.factor == 1.0
    assert not off.overflowed(3.0, math.inf)


@pytest.fixture(scope="module")
def no_peak(tmp_path_factory):
    """The peak of products in fp16, which a CPU without it takes seconds to measure, is taken as measured."""
    patch = pytest.MonkeyPatch()
    patch.setattr("hf_scratch_gpt.pretraining.telemetry.peak_product_flops", lambda device, dtype: 1e12)
    yield
    patch.undo()


def test_fp16_learns_what_fp32_learns_and_says_so(make_arguments, tmp_path, no_peak):
    losses = []
    for precision in ("fp32", "fp16"):
        folder = run(make_arguments(output_dir=str(tmp_path / precision), precision=precision, max_steps=8))
        found = read_metrics(folder)
        assert found["metrics"]["precision"] == found["setup"]["precision"] == precision
        losses.append([row["loss"] for row in read_curve(folder) if "loss" in row])
    assert found["metrics"]["overflows"] == 0
    assert found["metrics"]["loss_scale"] == loss_scale.FIRST_SCALE
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]


def test_an_overflow_costs_one_update_and_is_no_spike(make_arguments, monkeypatch, no_peak):
    overflow_at(monkeypatch, set(range(2, 9)))  # more in a row than the guard has patience for
    folder = run(make_arguments(precision="fp16", max_steps=12))
    metrics = read_metrics(folder)["metrics"]
    assert (metrics["overflows"], metrics["skipped_updates"], metrics["rollbacks"]) == (7, 0, [])
    assert metrics["loss_scale"] == loss_scale.FIRST_SCALE / 2**7
    told = [row for row in read_curve(folder) if "overflow_halved_loss_scale_to" in row]
    assert [row["step"] for row in told] == list(range(3, 10))
    assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())


def test_gradients_that_no_scale_mends_end_the_run(make_arguments, monkeypatch, no_peak):
    overflow_at(monkeypatch, set(range(1000)), math.nan)
    with pytest.raises(ValueError, match=r"5 updates in a row were skipped up to step 21 .*set 'precision' to fp32"):
        run(make_arguments(precision="fp16", max_steps=100))  # 16 halvings from 2^16 to 1, then the guard's patience


def test_an_interrupted_fp16_run_resumes_bitwise_with_its_scale(make_arguments, tmp_path, monkeypatch, no_peak):
    monkeypatch.setattr(loss_scale, "STEPS_TO_GROW", 4)  # so that the scale grows after the interruption
    overflow_at(monkeypatch, {3})
    settings = {"precision": "fp16", "max_steps": 10}
    whole = run(make_arguments(output_dir=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda: StopAfter(5))
        with pytest.raises(Interrupted, match=r"at step 6"):
            run(make_arguments(output_dir=str(tmp_path / "parts"), **settings))
    parts = run(make_arguments(output_dir=str(tmp_path / "parts"), **settings))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    scales = [read_metrics(folder)["metrics"]["loss_scale"] for folder in (whole, parts)]
    assert scales == [loss_scale.FIRST_SCALE / 2 * 2] * 2


def test_a_launch_in_another_precision_is_refused(make_arguments):
    launched = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    with pytest.raises(ValueError, match="mixed precision fp16, the recipe's 'precision' fp32 gives fp32"):
        check_launch(make_arguments(precision="fp32"), launched)
    assert check_launch(make_arguments(precision="fp16"), launched) == "none"
