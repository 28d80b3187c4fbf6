"""The presets are the papers' models: parameters to the digit, the shape of their attention, their initialisation."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.model.presets import PRESETS


def build(name, **overrides):
    with torch.device("meta"):
        return ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(name, **overrides))


# GPT-1's and GPT-2's as counted in the released weights; Qwen3's in its model pages.
RELEASED = {
    "gpt1": 116_534_784,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "modern-1.7b": 1_720_574_976,
    "modern-8b": 8_190_735_360,
}
# SmolLM2 has no QK-norm; ours adds two vectors of 64 a layer to its published count.
SMOLLM2 = {"modern-135m": 134_515_008 + 30 * 2 * 64, "modern-360m": 361_821_120 + 32 * 2 * 64}
# GPT-3, table D.1: millions of parameters, and the FLOPs of training on 300 billion tokens.
GPT3_TABLE_D1 = {
    "gpt3-125m": ("125", 2.25e20),
    "gpt3-350m": ("356", 6.41e20),
    "gpt3-760m": ("760", 1.37e21),
    "gpt3-1.3b": ("1320", 2.38e21),
    "gpt3-2.7b": ("2650", 4.77e21),
    "gpt3-6.7b": ("6660", 1.20e22),
    "gpt3-13b": ("12850", 2.31e22),
    "gpt3-175b": ("174600", 3.14e23),
}


@pytest.mark.parametrize(("name", "parameters"), {**RELEASED, **SMOLLM2}.items())
def test_parameters_equal_those_of_the_released_weights(name, parameters):
    assert build(name).num_parameters() == parameters


@pytest.mark.parametrize("name", GPT3_TABLE_D1)
def test_gpt3_parameters_equal_the_papers_to_the_digits_it_gives(name):
    printed, flops = GPT3_TABLE_D1[name]
    millions = build(name).num_parameters() / 1e6
    digits = len(printed) - len(printed.rstrip("0")) if len(printed) > 3 else 0
    assert round(millions, -digits) == float(printed)
    assert 6 * millions * 1e6 * 300e9 == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize(
    ("name", "printed", "overrides"),
    [
        ("gpt3-1.3b", 1320, {"num_attention_heads": 24, "head_dim": 128}),
        ("gpt3-13b", 12850, {"hidden_size": 5140, "intermediate_size": 4 * 5140, "head_dim": 128}),
    ],
)
def test_the_shapes_of_table_2_1_that_contradict_table_d_1_are_not_taken(name, printed, overrides):
    config = ScratchGPTConfig.from_preset(name, **overrides)
    with torch.device("meta"):
        assert round(ScratchGPTForCausalLM(config).num_parameters() / 1e6, -1) != printed


def test_all_presets_of_the_family_are_there_and_each_count_is_checked():
    assert set(PRESETS) - set(RELEASED) - set(SMOLLM2) - set(GPT3_TABLE_D1) == {"modern-5m", "modern-30m"}


def foreign(config_class, model_class, **fields):
    with torch.device("meta"):
        return model_class(config_class(**fields)).num_parameters()


def test_parameters_equal_those_of_transformers_own_models_of_the_same_shape():
    assert build("gpt1").num_parameters() == foreign(OpenAIGPTConfig, OpenAIGPTLMHeadModel)
    assert build("gpt2-1.5b").num_parameters() == foreign(
        GPT2Config, GPT2LMHeadModel, n_layer=48, n_embd=1600, n_head=25
    )
    for name, config_class, model_class in (
        ("modern-8b", Qwen3Config, Qwen3ForCausalLM),
        ("modern-135m", LlamaConfig, LlamaForCausalLM),
    ):
        ours = build(name, use_qk_norm=config_class is Qwen3Config)
        fields = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim tie_word_embeddings"
        )
        assert ours.num_parameters() == foreign(
            config_class, model_class, **{field: getattr(ours.config, field) for field in fields.split()}
        )


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt3")])
def test_gpt3_alternates_dense_and_banded_layers_at_any_depth(name):
    for layers in (PRESETS[name]["num_hidden_layers"], 1, 3, 200):
        config = ScratchGPTConfig.from_preset(name, num_hidden_layers=layers, max_position_embeddings=64)
        dense_then_banded = ["full_attention", "sliding_attention"] * layers
        assert config.layer_types == dense_then_banded[:layers]
        assert config.sliding_window == 256


def test_gpt3_can_be_made_dense_and_its_layer_types_overridden():
    dense = ScratchGPTConfig.from_preset("gpt3-125m", sliding_window=None, num_hidden_layers=3)
    assert (dense.layer_types, dense.sliding_window) == (["full_attention"] * 3, None)
    own = ["sliding_attention", "full_attention"]
    assert ScratchGPTConfig.from_preset("gpt3-125m", num_hidden_layers=2, layer_types=own).layer_types == own
    with pytest.raises(
        Exception, match=r"`num_hidden_layers` \(12\) must be equal to the number of `layer_types` \(2\)"
    ):
        ScratchGPTConfig.from_preset("gpt3-125m", layer_types=own)


def test_a_banded_layer_sees_its_window_and_no_more():
    config = ScratchGPTConfig.from_preset(
        "gpt3-125m",
        **{"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        **{"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 4},
        **{"max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None},
    )
    torch.manual_seed(0)
    model = ScratchGPTForCausalLM(config).eval()
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 50
    with torch.no_grad():
        moved = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_presets_do_not_share_what_a_config_may_change():
    ScratchGPTConfig.from_preset("gpt3-125m").layer_types[0] = "sliding_attention"
    assert PRESETS["gpt3-125m"]["layer_types"][0] == "full_attention"


@pytest.mark.parametrize(("name", "scaled"), [("gpt1", False), ("gpt2-124m", True), ("modern-5m", True)])
def test_only_pre_norm_models_scale_their_residual_projections(name, scaled):
    torch.manual_seed(0)
    config = ScratchGPTConfig.from_preset(
        name,
        **{"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "num_hidden_layers": 8, "bos_token_id": None, "eos_token_id": None},
    )
    layer = ScratchGPTForCausalLM(config).model.layers[3]
    expected = 0.02 / 4 if scaled else 0.02  # sqrt(2 x 8 layers) = 4
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_gpt1_is_the_papers():
    config = ScratchGPTConfig.from_preset("gpt1")
    theirs = OpenAIGPTConfig()
    assert config.vocab_size == theirs.vocab_size == 40478
    assert config.max_position_embeddings == theirs.n_positions == 512
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (12, 12, 768)
    assert (config.layer_norm_eps, config.initializer_range) == (theirs.layer_norm_epsilon, theirs.initializer_range)
    assert (config.attention_dropout, config.hidden_dropout) == (theirs.attn_pdrop, theirs.resid_pdrop) == (0.1, 0.1)
    assert config.hidden_act == "gelu_new"
    assert isinstance(build("gpt1").model.norm, torch.nn.Identity)
