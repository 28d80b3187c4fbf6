"""The configuration refuses what cannot be built, and every preset has the size that its name says."""

import pytest
import torch

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.model.presets import PRESETS

SUFFIXES = {"m": 1e6, "b": 1e9}
NAMED_SIZES = {"gpt1": 117e6} | {
    name: float(name.split("-")[1][:-1]) * SUFFIXES[name[-1]] for name in PRESETS if "-" in name
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_parameters_that_its_name_says(name):
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(name))
    # The quickstart's model is "about 4M"; papers count with and without positions, so 8% elsewhere.
    assert model.num_parameters() == pytest.approx(NAMED_SIZES[name], rel=0.2 if name == "modern-5m" else 0.08)


def test_overrides_win_and_derived_sizes_follow():
    config = ScratchGPTConfig.from_preset("gpt2-124m", vocab_size=1000, eos_token_id=3)
    assert (config.vocab_size, config.eos_token_id, config.hidden_size) == (1000, 3, 768)
    config = ScratchGPTConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=3, sliding_window=8)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (32, 2, 192)
    assert config.layer_types == ["sliding_attention"] * 3
    assert ScratchGPTConfig(mlp_type="dense").intermediate_size == 4 * 768


def test_rope_theta_stands_in_the_rope_parameters_and_learned_positions_have_none():
    assert ScratchGPTConfig.from_preset("modern-5m", rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    assert ScratchGPTConfig.from_preset("gpt2-124m").rope_parameters is None


def test_instances_do_not_share_their_auto_map():
    config = ScratchGPTConfig()
    config.auto_map["AutoModel"] = "elsewhere.Class"
    assert ScratchGPTConfig().auto_map["AutoModel"] == "modeling_scratch_gpt.ScratchGPTModel"
    assert ScratchGPTConfig.auto_map == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 12, "num_key_value_heads": 5}, "5, which does not divide `num_attention_heads`"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "`head_dim` is 9; rotary positions need an even one"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ({"vocab_size": 0}, "`vocab_size` is 0"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "`sliding_window` is None"),
        ({"final_logit_softcapping": 0.0}, "`final_logit_softcapping` is 0.0"),
        ({"norm_type": "batch_norm"}, "norm_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        ScratchGPTConfig(**fields)
    assert isinstance(caught.value, (ValueError, TypeError)) or "Strict" in type(caught.value).__name__


def test_unknown_preset_and_field_name_the_nearest():
    with pytest.raises(ValueError, match="no preset 'modern5m', did you mean 'modern-5m'"):
        ScratchGPTConfig.from_preset("modern5m")
    with pytest.raises(ValueError, match="`hiden_size` is no field of ScratchGPTConfig, did you mean 'hidden_size'"):
        ScratchGPTConfig.from_preset("modern-5m", hiden_size=64)
