"""The presets are exactly the maths of the models that they name: weights move by renaming, and logits are equal."""

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

QWEN3_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "tie_word_embeddings",
]


def gpt2_names(name: str) -> str:
    """Our name of a GPT-2 or GPT-1 parameter; c_attn is split apart by `from_gpt`."""
    for theirs, ours in {
        "transformer.wte": "model.embed_tokens",
        "transformer.tokens_embed": "model.embed_tokens",
        "transformer.wpe": "model.embed_positions",
        "transformer.positions_embed": "model.embed_positions",
        "transformer.ln_f": "model.norm",
        "transformer.h": "model.layers",
        "attn.c_attn": "self_attn.qkv_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    }.items():
        name = name.replace(theirs, ours)
    return name


def from_gpt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenAI's Conv1D weights are transposed and hold queries, keys and values in one."""
    ours = {}
    for name, tensor in state.items():
        name = gpt2_names(name)
        if tensor.ndim == 2 and "layers." in name:
            tensor = tensor.T
        if "qkv_proj" in name:
            for letter, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
                ours[name.replace("qkv", letter)] = part
        else:
            ours[name] = tensor
    return ours


def assert_same_logits(ours, theirs, length: int = 48) -> None:
    torch.manual_seed(1)
    input_ids = torch.randint(0, ours.config.vocab_size, (3, length))
    mask = torch.ones_like(input_ids)
    mask[1, length // 2 :] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            expected, actual = theirs(input_ids, **inputs).logits, ours(input_ids, **inputs).logits
            seen = inputs.get("attention_mask", mask.new_ones(mask.shape)).bool()
            torch.testing.assert_close(actual[seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1, "weights too small for the comparison to mean anything"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_modern_preset_is_qwen3_under_the_same_names(model_factory, attention, tied):
    ours = model_factory(tie_word_embeddings=tied, attn_implementation=attention)
    config = Qwen3Config(**{name: getattr(ours.config, name) for name in QWEN3_FIELDS}, attn_implementation=attention)
    theirs = Qwen3ForCausalLM(config).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_same_logits(ours, theirs)


def test_llama_is_the_modern_preset_without_qk_norm(model_factory):
    ours = model_factory(use_qk_norm=False, attention_bias=True, mlp_bias=True)
    fields = {name: getattr(ours.config, name) for name in [*QWEN3_FIELDS, "mlp_bias"]}
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2_preset_is_gpt2(model_factory, attention):
    ours = model_factory("gpt2", attn_implementation=attention)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64, attn_pdrop=0.0)
    ).eval()
    theirs.load_state_dict(randomised(theirs))
    ours.load_state_dict(from_gpt(theirs.state_dict()))
    assert_same_logits(ours, theirs)


def test_gpt1_preset_is_gpt1(model_factory):
    ours = model_factory("gpt1", intermediate_size=128)
    theirs = OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_ctx=64)
    ).eval()
    theirs.load_state_dict(randomised(theirs))
    ours.load_state_dict(from_gpt(theirs.state_dict()))
    assert_same_logits(ours, theirs)


def randomised(model) -> dict[str, torch.Tensor]:
    """Weights and biases far from their initial values, tied ones staying equal."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.state_dict()


def test_final_logit_softcapping_is_cap_times_tanh(model_factory):
    plain, capped = model_factory(), model_factory(final_logit_softcapping=2.0)
    input_ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = 2.0 * torch.tanh(plain(input_ids).logits / 2.0)
        torch.testing.assert_close(capped(input_ids).logits, expected)
