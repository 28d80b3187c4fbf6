"""Planned memory is real memory: byte for byte what autograd keeps, within 5% what a step allocates at its peak."""

import dataclasses
import itertools

import pytest
import torch
from planned_tiny import make_loss_module, really_peaks, really_saved, tiny_config
from transformers.activations import ACT2FN
from transformers.cache_utils import StaticCache

from hf_scratch_gpt.model import ScratchGPTConfig
from hf_scratch_gpt.pretraining import memory
from hf_scratch_gpt.pretraining.checkpointing import CheckpointWriter, TrainingState
from hf_scratch_gpt.pretraining.memory import ModelSize, TrainingSetup, measure_model
from hf_scratch_gpt.pretraining.optimizers import make_optimizers

KINDS = {
    "modern": ("modern-5m", {}),
    "modern, sliding": ("modern-5m", {"sliding_window": 8}),
    "modern, dense, untied": ("modern-5m", {"mlp_type": "dense", "hidden_act": "gelu", "tie_word_embeddings": False}),
    "llama with softcap": ("modern-5m", {"use_qk_norm": False, "final_logit_softcapping": 5.0}),
    "post layer norm with rope": ("modern-5m", {"norm_type": "layer_norm", "norm_position": "post"}),
    "gpt2": ("gpt2-124m", {}),
    "gpt2 without dropout": ("gpt2-124m", {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "gpt1 without attention dropout": ("gpt1", {"attention_dropout": 0.0}),
    "gpt3": ("gpt3-125m", {"sliding_window": 8, "num_hidden_layers": 3}),
}


def planned_and_saved(kind, setup, change=lambda module: None):
    preset, overrides = KINDS[kind]
    config = tiny_config(preset, **overrides)
    module = make_loss_module(config, setup)
    change(module)
    saved = really_saved(module, config, setup)
    if setup.checkpointing and config.position_embedding_type == "rope":
        # The layers to compute again hold cosines and sines themselves, where autograd's hooks do not see them.
        rows = setup.tokens if setup.packed else setup.sequence_length
        saved += 2 * 4 * config.head_dim * rows
    return memory.saved_bytes(config, measure_model(config), setup), saved


@pytest.mark.parametrize(("bf16", "checkpointing", "packed"), itertools.product((False, True), repeat=3))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_autograd_keeps_byte_for_byte(kind, bf16, checkpointing, packed):
    setup = TrainingSetup(3, 32, bf16=bf16, checkpointing=checkpointing, packed=packed, device="cpu")
    planned, saved = planned_and_saved(kind, setup)
    assert planned == saved


def test_a_layer_that_keeps_more_than_is_counted_is_noticed():
    def use_another_activation(module):
        module.model.model.layers[0].mlp.act_fn = ACT2FN["gelu_new"]

    setup = TrainingSetup(3, 32, bf16=False, device="cpu")
    planned, saved = planned_and_saved("modern", setup, use_another_activation)
    assert saved - planned == 3 * 32 * 160 * 4 * (5 - 2)  # GPT-2's GELU keeps five tensors where SiLU keeps two


def test_activations_keep_what_their_formulas_need():
    kept = {name: memory.tensors_kept_by_activation(name) for name in ("silu", "gelu", "relu", "gelu_new")}
    # Input and output; ReLU's output alone; x, tanh, 0.5 x, 1 + tanh and their product.
    assert kept == {"silu": 2, "gelu": 2, "relu": 1, "gelu_new": 5}


PEAKS = {
    "logits": ("modern-5m", {"vocab_size": 4000}, TrainingSetup(4, 128)),
    "fp32": ("modern-5m", {}, TrainingSetup(4, 128, bf16=False)),
    "small batch, untied": ("modern-5m", {"vocab_size": 4000, "tie_word_embeddings": False}, TrainingSetup(1, 64)),
    "muon": ("modern-5m", {"num_hidden_layers": 6}, TrainingSetup(1, 64, optimizer="muon")),
    "checkpointed": ("gpt2-124m", {"num_hidden_layers": 6}, TrainingSetup(4, 128, bf16=False, checkpointing=True)),
    "accumulated, packed": ("modern-5m", {"vocab_size": 1000}, TrainingSetup(2, 128, accumulates=True, packed=True)),
    "checkpointed and accumulated": (
        *("gpt3-125m", {"sliding_window": 16, "num_hidden_layers": 6, "vocab_size": 1000}),
        TrainingSetup(2, 128, checkpointing=True, accumulates=True),
    ),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_step_is_what_the_allocator_sees(name):
    preset, overrides, setup = PEAKS[name]
    config = tiny_config(preset, **{"hidden_size": 128, "intermediate_size": 384, **overrides})
    setup = dataclasses.replace(setup, device="cpu")
    planned = memory.peak(config, measure_model(config), setup).total
    assert planned == pytest.approx(really_peaks(config, setup), rel=0.05)


SIZE = ModelSize(parameters=1000, hidden={(4, 5): 2, (5, 4): 1}, linear=160, head=100, layer=30)


def test_optimizer_states_by_hand():
    assert memory.optimizer_state_bytes(SIZE, "adamw") == 2 * 4 * 1000
    assert memory.optimizer_state_bytes(SIZE, "muon") == 4 * (2 * (1000 - 60) + 60)
    assert memory.step_bytes(SIZE, "adamw") == 0
    # 60 updates in fp32; a stack of three 4 x 5 in fp32 and twice in bf16; twice three 4 x 4 in bf16.
    assert memory.step_bytes(SIZE, "muon") == 4 * 60 + 3 * (20 * (4 + 2 * 2) + 2 * 2 * 16)


def step_of(**settings):
    config = tiny_config("modern-5m")
    return memory.training_moments(config, SIZE, TrainingSetup(1, 8, **settings))[-1]


def test_weights_gradients_and_adamw_take_sixteen_bytes_a_parameter():
    step = step_of()
    assert (step.name, step.weights, step.gradients, step.optimizer) == ("step", 4000, 4000, 8000)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_snapshot_of_a_checkpoint_is_as_large_as_planned(tmp_path, optimizer, tied):
    config = tiny_config("modern-5m", tie_word_embeddings=tied)
    setup = TrainingSetup(1, 8, bf16=False, optimizer=optimizer, device="cpu")
    module = make_loss_module(config, setup)
    optimizers = make_optimizers(module.model, optimizer)
    module(torch.randint(100, (1, 8))).backward()
    optimizers.step()
    writer = CheckpointWriter(tmp_path)
    writer.save(module.model, optimizers, TrainingState(step=1))
    writer.close()
    held = sum(snapshot._memory.nbytes for snapshot in (writer._model, writer._optimizers))
    counters = sum("step" in state for part in optimizers.parts for state in part.state.values())
    size = measure_model(config)
    assert held == memory.snapshot_bytes(size, optimizer) + 4 * counters
    without = memory.peak(config, size, setup).total
    assert memory.peak(config, size, dataclasses.replace(setup, saves=True)).total == without + held - 4 * counters
    on_gpu = dataclasses.replace(setup, device="cuda")
    assert memory.peak(config, size, dataclasses.replace(on_gpu, saves=True)) == memory.peak(config, size, on_gpu)


def test_sharding_by_hand():
    ddp = step_of(gpus=4)
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (4000, 8000, 8000)  # DDP's buckets
    # All but the 60 hidden weights stand outside of the layers: 940, gathered as the largest piece.
    zero2 = step_of(gpus=4, sharding="gradients")
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (1000 + 2 * 1000, 1000 + 6 * 940, 2000)
    zero3 = step_of(gpus=4, sharding="full")
    assert (zero3.weights, zero3.gradients, zero3.optimizer) == (1000 + 2 * (940 + 60), 1000 + 6 * 940, 2000)


def test_more_of_anything_never_takes_less():
    config = tiny_config("gpt3-125m")
    size = measure_model(config)
    base = TrainingSetup(2, 64)
    peak = memory.peak(config, size, base).total
    for more in ({"micro_batch": 3}, {"sequence_length": 128}, {"accumulates": True}, {"packed": True}, {"gpus": 2}):
        assert memory.peak(config, size, dataclasses.replace(base, **more)).total >= peak, more


@pytest.mark.parametrize(("preset", "window"), [("modern-5m", None), ("modern-5m", 8), ("gpt3-125m", 8)])
def test_the_cache_is_as_large_as_a_real_one(preset, window):
    config = tiny_config(preset, sliding_window=window)
    cache = StaticCache(config, max_cache_len=24)
    cache.early_initialization(3, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device("cpu"))
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.cache_bytes(config, batch=3, length=24) == real


def test_a_sliding_layer_keeps_its_window_only():
    # GPT-3 125m: 6 dense layers of 2,048 tokens, 6 banded ones of 256; 768 numbers twice, of 2 bytes.
    config = ScratchGPTConfig.from_preset("gpt3-125m")
    assert memory.cache_bytes(config, 1, 2048) == 2 * 2 * 768 * (6 * 2048 + 6 * 256)


def test_175_billion_parameters_are_measured_without_memory():
    size = measure_model(ScratchGPTConfig.from_preset("gpt3-175b"))
    assert size.parameters == 174_604_259_328
    assert size.layer == 12 * 12288**2 + 13 * 12288
    assert size.head == 50257 * 12288
    assert size.linear == 96 * 12 * 12288**2 + size.head
    assert size.hidden == {(12288, 12288): 4 * 96, (4 * 12288, 12288): 96, (12288, 4 * 12288): 96}
