"""The benchmark of pretraining compares like with like: its nanoGPT, its counts, its clock and its readings."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pretraining_tiny import TINY_MODEL
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import nanochat_baseline
import nanogpt_baseline
import pretrain
import pretrain_ours
import pretrain_request
import pretrain_rows
import pretrain_shapes
import pretrain_watch

SPEED = {"tokens_per_second": 1.0, "share_of_peak": 0.5}
TINY = pretrain_shapes.Shape(2, 32, 2, 1, 300, 32, rounding=8)


def gpt2_config(shape, **more):
    sizes = {"n_embd": shape.hidden_size, "n_layer": shape.num_hidden_layers, "n_head": shape.num_attention_heads}
    return GPT2Config(vocab_size=shape.vocab_size, n_positions=shape.context_length, **sizes, **more)


def copy_into(model, gpt2):
    """nanoGPT's weights into transformers' GPT-2, whose Conv1D keeps its matrices the other way round."""
    state = {"transformer.wte.weight": model.token_embedding.weight, "transformer.wpe.weight": None}
    state["transformer.wpe.weight"] = model.position_embedding.weight
    pairs = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.query_key_value": "attn.c_attn"}
    pairs |= {"attention.output": "attn.c_proj", "mlp_input": "mlp.c_fc", "mlp_output": "mlp.c_proj"}
    for number, block in enumerate(model.blocks):
        for ours, theirs in pairs.items():
            for name, value in block.get_submodule(ours).named_parameters():
                state[f"transformer.h.{number}.{theirs}.{name}"] = value.T if value.ndim == 2 else value
    state |= {f"transformer.ln_f.{name}": value for name, value in model.norm.named_parameters()}
    missing, unexpected = gpt2.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected


def test_nanogpt_has_gpt2s_logits_and_loss_with_its_weights():
    torch.manual_seed(0)
    model = nanogpt_baseline.NanoGPT(TINY, bias=True)
    for parameter in model.parameters():  # so that biases and norms count
        parameter.data.normal_(std=0.3)
    gpt2 = GPT2LMHeadModel(gpt2_config(TINY, activation_function="gelu")).eval()
    copy_into(model, gpt2)
    ids = torch.randint(TINY.vocab_size, (3, 17))
    expected = gpt2(input_ids=ids, labels=ids)
    torch.testing.assert_close(model(ids), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), expected.loss, rtol=1e-4, atol=1e-4)
    kept = nanogpt_baseline.AsCausalModel(model)(ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, expected.logits[:, -2:], rtol=1e-4, atol=1e-4)


def test_nanogpt_starts_as_gpt2_does():
    torch.manual_seed(0)
    shape = pretrain_shapes.Shape(8, 128, 2, 1, 300, 32)
    model = nanogpt_baseline.NanoGPT(shape)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model.blocks[0].mlp_input.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (model.blocks[3].attention.output, model.blocks[3].mlp_output):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 x 8)
    optimizer = nanogpt_baseline.make_adamw(model, 1e-3)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in plain["params"]} == {1}


def test_cosine_by_hand():
    assert nanogpt_baseline.cosine_factor(0, 0.0, 9) == pytest.approx(0.1)
    assert nanogpt_baseline.cosine_factor(9, 0.5, 9) == pytest.approx(0.55)
    assert nanogpt_baseline.cosine_factor(99, 1.0, 9) == pytest.approx(0.1)


def test_nanochat_starts_as_it_says_sees_nothing_ahead_and_trains_every_parameter():
    torch.manual_seed(0)
    shape = pretrain_shapes.SHAPES["4m"]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in nanochat_baseline.NanoChat(shape).parameters())
    assert parameters == pytest.approx(7.3e6, rel=0.1)  # with its value embeddings
    model = nanochat_baseline.NanoChat(TINY)
    assert [block.value_embedding is not None for block in model.blocks] == [False, True]
    ids = torch.randint(TINY.vocab_size, (3, 17))
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(np.log(TINY.vocab_size), abs=0.01)
    optimizers = nanochat_baseline.make_optimizers(model)
    held = [parameter for part in optimizers for group in part.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for parameter in model.parameters():  # so that output projections and gates count
        parameter.data.normal_(std=0.3)
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in held)
    changed = ids.clone()
    changed[:, 9:] = (ids[:, 9:] + 1) % TINY.vocab_size
    torch.testing.assert_close(model(changed)[:, :9], model(ids)[:, :9], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(changed)[:, 9:], model(ids)[:, 9:], atol=1e-2)


def test_nanochats_schedule_by_hand():
    assert [nanochat_baseline.rate_factor(progress) for progress in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert [nanochat_baseline.muon_momentum(step) for step in (0, 150, 600)] == pytest.approx([0.85, 0.9, 0.95])


def test_random_windows_are_of_the_file_and_targets_are_one_on(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "tokens.bin")
    windows = nanogpt_baseline.RandomWindows(tmp_path / "tokens.bin", np.dtype("<u2"), 8, 64, "cpu")
    inputs, targets = windows.next()
    assert inputs.shape == targets.shape == (64, 8)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert len(inputs[:, 0].unique()) > 10


@pytest.mark.parametrize("name", ["4m", "14m", "124m"])
def test_rows_have_equal_parameters(name):
    shape = pretrain_shapes.SHAPES[name]
    with torch.device("meta"):
        classic = nanogpt_baseline.NanoGPT(shape)
        modern = Qwen3ForCausalLM(Qwen3Config(**shape.modern_fields, tie_word_embeddings=True))
        gpt2 = GPT2LMHeadModel(gpt2_config(shape))
    counted = pretrain_request.describe(classic, shape)
    assert counted["parameters"] == shape.classic_parameters
    assert pretrain_request.describe(modern, shape)["parameters"] == shape.modern_parameters(shape.intermediate_size)
    for other in (modern, gpt2):
        described = pretrain_request.describe(other, shape)
        assert described["parameters"] == pytest.approx(counted["parameters"], rel=0.02)
        assert described["flops_per_token"] == pytest.approx(counted["flops_per_token"], rel=0.03)


def test_time_to_a_figure_is_read_off_the_line_between_two_points():
    curve = [(10.0, 3.0), (20.0, 2.0), (30.0, 2.5), (40.0, 1.0)]
    assert pretrain_watch.time_to(curve, 2.25) == pytest.approx(17.5)
    assert pretrain_watch.time_to(curve, 3.5) == 10.0
    assert pretrain_watch.time_to(curve, 2.0) == 20.0
    assert pretrain_watch.time_to(curve, 0.5) is None


def timed(curve, value):
    return [{"curve": curve, "bits_per_byte": value, "steps": 1, "tokens_per_step": 1, **SPEED}]


def test_rows_are_compared_with_the_baselines_own_end():
    runs = {
        "ours": timed([(10.0, 3.0), (20.0, 2.0)], 2.0),
        "nanogpt-fp32": timed([(50.0, 3.0), (100.0, 2.5)], 2.6),
        "modern-adamw": timed([(20.0, 3.0)], 3.0),
    }
    rows = pretrain.compare(runs, "text", None)["rows"]
    assert rows["ours"]["share_of_time"] == {"nanogpt-fp32": pytest.approx(0.15)}
    assert rows["ours"]["seconds_to_loss"] == pytest.approx(15)
    assert rows["nanogpt-fp32"]["seconds_to_loss"] == pytest.approx(100)
    assert rows["modern-adamw"]["seconds_to_loss"] is None
    assert rows["modern-adamw"]["reason"] == "seed 0 came down to 3.000, not to 2.500 bits per byte in its time"
    fixed = pretrain.compare(runs, "text", 2.75)["rows"]
    assert fixed["ours"]["seconds_to_loss"] == pytest.approx(12.5)
    del runs["nanogpt-fp32"]
    assert "no target" in pretrain.compare(runs, "text", None)["rows"]["ours"]["reason"]


def request(prepared, work, row, **more):
    fields = {"row": row, "shape": vars(TINY), "dataset_dir": str(prepared), "work": str(work), "batch_size": 4}
    small = {"accumulation": 2, "learning_rate": 1e-3, "curve_bytes": 500, "heldout_bytes": 500}
    return pretrain_request.Request(**{**fields, **small, **more})


@pytest.mark.parametrize("row", ["ours", "nanogpt-bf16", "gpt2-trainer", "qwen3-trainer"])
def test_each_row_reports_its_steps(row, prepared_folder, tmp_path):
    quick = {"compile": "false", "precision": "fp32"}
    result = pretrain_rows.ROWS[row](request(prepared_folder, tmp_path, row, steps=2, ours=quick))
    assert result["steps"] == len(result["step_seconds"]) == 3
    assert all(seconds > 0 for seconds in result["step_seconds"])
    assert result["tokens_per_step"] == 4 * TINY.context_length
    assert result["parameters"] == pytest.approx(TINY.classic_parameters, rel=0.1)
    assert result["peak_rss_bytes"] > 1e7
    json.dumps(result)


@pytest.mark.parametrize("row", ["ours", "nanogpt-fp32", "gpt2-trainer"])
def test_a_timed_row_has_a_curve_that_ends_with_its_training(row, prepared_folder, tmp_path):
    quick = {"compile": "false", "precision": "fp32", "model_overrides": ",".join(TINY_MODEL)}
    timed = {"seconds": 2.0, "interval": 0.5, "expected_steps": 40, "ours": quick}
    result = pretrain_rows.ROWS[row](request(prepared_folder, tmp_path, row, **timed))
    seconds = [point[0] for point in result["curve"]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert seconds[-1] == result["training_seconds"]
    assert 0 < result["bits_per_byte"] < 16
    assert result["curve"][-1][1] < 16


def test_the_stages_clock_is_its_own_again_afterwards(prepared_folder, tmp_path):
    clock = pretrain_ours.pretrain._Pretraining._clock
    watch = pretrain_watch.Watch(seconds=1.0)
    heldout = pretrain_request.HeldOut(request(prepared_folder, tmp_path, "ours"))
    with pretrain_ours.training_time_only(watch, heldout):
        assert pretrain_ours.pretrain._Pretraining._clock is not clock
    assert pretrain_ours.pretrain._Pretraining._clock is clock


def test_the_gpu_benchmark_says_that_there_is_none(capsys):
    import pretrain_gpu

    assert pretrain_gpu.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_first_step_that_compiles_does_not_end_a_timed_row(monkeypatch):
    now = iter([0.0, 60.0, 60.0, 61.0, 98.5, 99.5, 99.5])
    monkeypatch.setattr(pretrain_watch.time, "monotonic", lambda: next(now))
    watch = pretrain_watch.Watch(seconds=100.0)
    watch.start()
    watch.note_step()
    assert not watch.finished  # after 60 s of 100
    watch.note_step()
    assert not watch.finished  # a step takes 1 s and 1.5 s are left
    watch.note_step()
    assert watch.finished
