"""What a run tells while it trains: rates by hand, evaluations in between that change nothing, and the z-loss."""

import json

import pytest
import torch
from pretraining_tiny import TINY_MODEL, StopAfter
from safetensors.torch import load_file

from hf_scratch_gpt.pretraining import pretrain
from hf_scratch_gpt.pretraining.loop import PretrainingLoop
from hf_scratch_gpt.pretraining.telemetry import Counters, Telemetry
from hf_scratch_gpt.runs import Interrupted, read_metrics
from hf_scratch_gpt.runs.hardware import peak_product_flops, peak_rss_bytes


def test_rates_by_hand():
    telemetry = Telemetry(1000, 600, peak_flops=1e6, processes=2, device=torch.device("cpu"))
    rates = telemetry.rates(Counters(10, 5.0, 1.0), Counters(30, 45.0, 3.0))
    # 20 steps of 1,000 tokens in 40 s, of which 2 s went by waiting; two devices could do 2e6 FLOPs a second.
    assert rates["tokens_per_second"] == 500
    assert rates["flops_per_second"] == 500 * 600
    assert rates["mfu"] == pytest.approx(0.15)
    assert rates["data_share"] == pytest.approx(0.05)
    assert rates["memory_bytes"] == peak_rss_bytes()
    padded = telemetry.rates(Counters(10, 5.0, 1.0, 700), Counters(30, 45.0, 3.0, 4_700))
    assert padded["tokens_per_second"] == (20_000 - 4_000) / 40  # padding is nothing that was trained on
    assert padded["mfu"] == pytest.approx(0.12)


def test_the_measured_peak_is_that_of_a_product_and_draws_nothing():
    before = torch.random.get_rng_state()
    peak = peak_product_flops("cpu", torch.float32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 1e8 < peak < 1e14
    assert peak_product_flops("cpu", torch.float32) == peak  # measured once


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


EVALUATED = {"max_steps": 9, "evaluation_steps": 3, "sample_prompts": ["the list of", "a"], "sample_tokens": 5}


@pytest.fixture(scope="module")
def evaluated(prepared_folder, tmp_path_factory):
    """A run that evaluates at steps 3 and 6, with dropout: its masks come from a random generator."""
    folder = tmp_path_factory.mktemp("evaluated") / "pretrain"
    settings = {"context_length": 32, "batch_size": 4, "warmup_steps": 2, "logging_steps": 2, "precision": "fp32"}
    settings |= {"compile": "false", "evaluation_bytes": 1000, "dataset_dir": str(prepared_folder), **EVALUATED}
    settings["model_overrides"] = [*TINY_MODEL, "hidden_dropout=0.1", "attention_dropout=0.1"]
    arguments = pretrain.Arguments(output_dir=str(folder), **settings)
    return pretrain.run(arguments), settings


def test_curve_and_metrics_tell_the_rates(evaluated):
    folder, _ = evaluated
    rows = [row for row in read_rows(folder / "curve.jsonl") if "loss" in row]
    for row in rows:
        assert {"flops_per_second", "mfu", "data_share", "memory_bytes", "grad_norm"} <= row.keys()
        assert 0 < row["mfu"] < 1
        assert 0 <= row["data_share"] < 1
    metrics = read_metrics(folder)["metrics"]
    assert metrics["flops_per_second"] == pytest.approx(metrics["tokens_per_second"] * metrics["flops_per_token"])
    assert metrics["mfu"] == pytest.approx(metrics["flops_per_second"] / metrics["peak_flops_per_second"])
    # 6 x the weights of two layers (q, k, v, o, gate, up, down) and the tied head; 12 x 32 x 32 a layer of attention.
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert metrics["flops_per_token"] == 6 * (2 * layer + 300 * 32) + 2 * 12 * 32 * 32


def test_evaluations_in_between_are_told_and_change_no_weight(evaluated, tmp_path):
    folder, settings = evaluated
    rows = [row for row in read_rows(folder / "curve.jsonl") if "heldout_bits_per_byte" in row]
    assert [row["step"] for row in rows] == [3, 6]  # the evaluation after step 9 is the one in the metrics
    samples = read_rows(folder / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (3, 6) for prompt in ("the list of", "a")
    ]
    assert all(row["text"] for row in samples)
    bare = {name: value for name, value in settings.items() if name not in EVALUATED}
    without = pretrain.run(pretrain.Arguments(output_dir=str(tmp_path / "without"), max_steps=9, **bare))
    one, other = load_file(folder / "model.safetensors"), load_file(without / "model.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not (without / "samples.jsonl").exists()


def test_a_resumed_run_evaluates_each_step_once(evaluated, tmp_path, monkeypatch):
    folder, settings = evaluated
    arguments = pretrain.Arguments(output_dir=str(tmp_path / "parts"), **settings)
    for looks in (2, 4):  # stopped at step 3, before its evaluation; then at step 8, two steps after the second
        with monkeypatch.context() as patch:
            patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda looks=looks: StopAfter(looks))
            with pytest.raises(Interrupted):
                pretrain.run(arguments)
    parts = pretrain.run(arguments)
    for name in ("curve.jsonl", "samples.jsonl"):
        told = [
            [{key: row.get(key) for key in ("step", "heldout_bits_per_byte", "prompt", "text")} for row in rows]
            for rows in (read_rows(path / name) for path in (folder, parts))
        ]
        assert told[0] == told[1]


def test_a_time_budget_counts_evaluations_in(make_arguments, monkeypatch):
    original, taken = pretrain._Pretraining._evaluate, []

    def evaluate(self):
        import time

        taken.append(self.state.step)
        time.sleep(0.4)
        return {**original(self), "seconds": 0.45}

    monkeypatch.setattr(pretrain._Pretraining, "_evaluate", evaluate)
    metrics = read_metrics(pretrain.run(make_arguments(max_steps=0, max_minutes=0.15, evaluation_steps=1)))
    assert len(taken) > 3
    assert metrics["seconds"] < 0.15 * 60 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompts": ["a"]}, "set these"),
        (
            {"sample_prompts": ["a" * 200], "evaluation_steps": 1},
            "sample_prompts: 'aaaa.* does not fit into the context",
        ),
        ({"ema_decay": 1.5}, "'ema_decay' is 1.5, expected 0 to 1"),
        ({"z_loss": -1.0}, "'z_loss' is -1.0, expected at least 0"),
        ({"spike_threshold": -1.0}, "'spike_threshold' is -1.0"),
    ],
)
def test_a_mistake_in_these_settings_is_named(make_arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain.run(make_arguments(**changes))


def test_the_z_loss_holds_the_normaliser_down(make_arguments, tmp_path, monkeypatch):
    sizes = []
    original = PretrainingLoop._accumulate_gradients

    def accumulate(self, batch):
        with torch.no_grad():
            sizes.append(self.model(**batch).logits.logsumexp(-1).square().mean().item())
        return original(self, batch)

    monkeypatch.setattr(PretrainingLoop, "_accumulate_gradients", accumulate)
    for name, z_loss in (("plain", 0.0), ("held", 1.0)):
        pretrain.run(make_arguments(output_dir=str(tmp_path / name), max_steps=30, z_loss=z_loss))
    assert sizes[59] < 0.8 * sizes[29]
