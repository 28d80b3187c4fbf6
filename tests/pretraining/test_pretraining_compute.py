"""FLOPs, budgets and hours, by hand and as torch's own counter of FLOPs counts them."""

import pytest
import torch
from planned_tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.pretraining import compute
from hf_scratch_gpt.pretraining.memory import measure_model


@pytest.mark.parametrize("preset", ["modern-5m", "gpt2-124m", "gpt1"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_what_torch_counts(preset, tied):
    config = tiny_config(preset, tie_word_embeddings=tied, attention_dropout=0.0)
    config._attn_implementation = "eager"  # whose products the counter sees one by one
    model = ScratchGPTForCausalLM(config).train()
    ids = torch.randint(config.vocab_size, (2, 24))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    planned = compute.training_flops(config, measure_model(config).linear, 24)
    assert counter.get_total_flops() == planned * ids.numel()


def test_flops_by_hand():
    # GPT-3 125m: 12 layers of 12 x 768^2 weights and the head; six layers look at 2,048 tokens and six at 256.
    config = ScratchGPTConfig.from_preset("gpt3-125m")
    linear = 12 * 12 * 768**2 + 50257 * 768
    assert measure_model(config).linear == linear
    assert compute.training_flops(config, linear, 2048) == 6 * linear + 12 * 768 * (6 * 2048 + 6 * 256)


def test_flops_of_gpt3_are_near_the_papers():
    """The paper (table D.1) counts 6 for each parameter and leaves attention out: 3.14e23 for 300 billion tokens."""
    config = ScratchGPTConfig.from_preset("gpt3-175b")
    size = measure_model(config)
    without_attention = compute.training_flops(config, size.linear, 2048) - compute.attention_flops(config, 2048)
    assert without_attention * 300e9 == pytest.approx(3.14e23, rel=0.002)


def test_chinchilla_has_its_own_budget():
    assert compute.compute_optimal_tokens(70_000_000_000) == 1_400_000_000_000


def test_hours_by_hand():
    # 3.6e18 FLOPs at half of 2 x 1 PFLOPS: one hour.
    assert compute.training_hours(3.6e18, devices=2, peak_flops=1e15, utilisation=0.5) == pytest.approx(1.0)
