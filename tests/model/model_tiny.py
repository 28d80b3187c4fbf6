"""Tiny models of every kind, shared by the tests of the model package."""

import torch

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = {
    "modern": ("modern-5m", {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": ("gpt2-124m", {}),
    "gpt1": ("gpt1", {}),
    "sliding": (
        "modern-5m",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


def make_model(kind: str = "modern", seed: int = 0, **overrides) -> ScratchGPTForCausalLM:
    """A tiny causal model in eval mode, its weights and biases large enough that a mistake shows."""
    preset, changes = KINDS[kind]
    config = ScratchGPTConfig.from_preset(preset, **{**TINY, **changes, **overrides})
    torch.manual_seed(seed)
    model = ScratchGPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
