"""Named sizes: the fields of `ScratchGPTConfig` that differ from its defaults.

`ScratchGPTConfig.from_preset("gpt2-124m", vocab_size=4096)` takes one and changes it. A name's number counts all
parameters (the embedding once where it is tied), as the papers and model pages do.

Sources:

- GPT-1: Radford et al. 2018, and its released code (tanh form of GELU, 40,478 tokens).
- GPT-2: Radford et al. 2019, sizes as released.
- GPT-3: https://arxiv.org/abs/2005.14165, tables 2.1 and D.1. Two shapes of table 2.1 contradict themselves, and the
  parameters that table D.1 counts decide: 1.3b has 16 heads of 128 (1,320M; the 24 that are printed would make 1,517M)
  and 13b has a width of 40 x 128 = 5,120 (12,850M; the 5,140 that is printed would make 12,950M). The paper alternates
  dense and locally banded layers "similar to the Sparse Transformer" and does not say how wide a band is: 256 tokens
  with dense layers first is what its open replication GPT-Neo took (https://huggingface.co/EleutherAI/gpt-neo-2.7B);
  the Sparse Transformer's own text model had 128 (https://arxiv.org/abs/1904.10509, section 7.2). No released weights
  of GPT-3 can decide it, and it changes no parameter count.
- modern: SmolLM2's and Qwen3's shapes (https://arxiv.org/abs/2502.02737, https://arxiv.org/abs/2505.09388).
"""

from typing import Any

Preset = dict[str, Any]


def _gpt2(layers: int, width: int, heads: int, **overrides: Any) -> Preset:
    """The maths of GPT-2: learned positions, pre-norm LayerNorm, dense GELU MLP, biases everywhere, tied head."""
    return {
        "vocab_size": 50257,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 1024,
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "mlp_type": "dense",
        "use_qk_norm": False,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    } | overrides


def _gpt3(layers: int, width: int, heads: int) -> Preset:
    """GPT-2's maths at GPT-3's shapes, every second layer banded, and no dropout: it saw each text once."""
    return _gpt2(
        layers,
        width,
        heads,
        max_position_embeddings=2048,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        sliding_window=256,
        layer_types=["full_attention", "sliding_attention"] * (layers // 2),
    )


def _modern(layers: int, width: int, heads: int, kv_heads: int, mlp: int, **overrides: Any) -> Preset:
    """The maths of Qwen3, which are the defaults of `ScratchGPTConfig`."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | overrides


def _rope(theta: float) -> Preset:
    return {"rope_type": "default", "rope_theta": theta}


PRESETS: dict[str, Preset] = {
    "gpt1": _gpt2(
        12,
        768,
        12,
        vocab_size=40478,
        max_position_embeddings=512,
        norm_position="post",
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
    "modern-5m": _modern(4, 256, 4, 2, 768, vocab_size=4096, max_position_embeddings=256),
    "modern-30m": _modern(12, 384, 6, 2, 1024, vocab_size=32768, max_position_embeddings=1024),
    "modern-135m": _modern(
        30, 576, 9, 3, 1536, vocab_size=49152, max_position_embeddings=2048, rope_parameters=_rope(100_000.0)
    ),
    "modern-360m": _modern(
        32, 960, 15, 5, 2560, vocab_size=49152, max_position_embeddings=2048, rope_parameters=_rope(100_000.0)
    ),
    "modern-1.7b": _modern(
        28,
        2048,
        16,
        8,
        6144,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=4096,
        rope_parameters=_rope(1_000_000.0),
    ),
    "modern-8b": _modern(
        36,
        4096,
        32,
        8,
        12288,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=4096,
        rope_parameters=_rope(1_000_000.0),
        tie_word_embeddings=False,
    ),
}
