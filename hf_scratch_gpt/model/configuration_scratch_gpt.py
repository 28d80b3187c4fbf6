# SPDX-License-Identifier: Apache-2.0
"""ScratchGPTConfig: one configuration for GPT-1, GPT-2, GPT-3 and modern (Qwen3) maths.

This file travels to the Hub beside the weights, so it imports nothing but transformers and its dependencies.
"""

import difflib
import importlib
import itertools
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

AUTO_MAP = {
    "AutoConfig": "configuration_scratch_gpt.ScratchGPTConfig",
    "AutoModel": "modeling_scratch_gpt.ScratchGPTModel",
    "AutoModelForCausalLM": "modeling_scratch_gpt.ScratchGPTForCausalLM",
    "AutoModelForMaskedLM": "modeling_scratch_gpt.ScratchGPTForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_scratch_gpt.ScratchGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_scratch_gpt.ScratchGPTForTokenClassification",
}
# Settings of PreTrainedConfig that are not dataclass fields but are legitimate arguments.
_EXTRA_ARGUMENTS = {"num_labels", "attn_implementation", "output_attentions", "name_or_path", "rope_theta"}


@strict
class ScratchGPTConfig(PreTrainedConfig):
    r"""
    The defaults are the modern maths: pre-norm RMSNorm, QK-norm before RoPE, SwiGLU, no bias, tied head.

    Args:
        vocab_size (`int`, *optional*, defaults to `32768`):
            Rows of the token embedding, in tokens.
        hidden_size (`int`, *optional*, defaults to `768`):
            Width of the residual stream.
        intermediate_size (`int`, *optional*):
            Width of the MLP. By default 4 × `hidden_size` for `mlp_type="dense"` and 8/3 × `hidden_size`, rounded up
            to a multiple of 64, for `"swiglu"`, which has the same number of parameters.
        num_hidden_layers (`int`, *optional*, defaults to `12`):
            Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to `12`):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads (grouped-query attention, https://arxiv.org/abs/2305.13245); must divide
            `num_attention_heads`. By default as many as query heads.
        head_dim (`int`, *optional*):
            Width of a head. By default `hidden_size // num_attention_heads`.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the MLP, by its name in transformers.
        max_position_embeddings (`int`, *optional*, defaults to `1024`):
            Context length, in tokens. With learned positions no longer input is possible.
        position_embedding_type (`"rope"` or `"learned"`, *optional*, defaults to `"rope"`):
            Rotary positions (https://arxiv.org/abs/2104.09864) or a table of learned ones.
        rope_parameters (`dict`, *optional*):
            `rope_type`, `rope_theta` and what the type needs; `None` with learned positions.
        norm_type (`"rms_norm"` or `"layer_norm"`, *optional*, defaults to `"rms_norm"`):
            RMSNorm (https://arxiv.org/abs/1910.07467), computed in fp32, or LayerNorm with bias.
        norm_position (`"pre"` or `"post"`, *optional*, defaults to `"pre"`):
            Norm before each sub-layer and once at the end, or after each residual sum as in GPT-1.
        rms_norm_eps (`float`, *optional*, defaults to `1e-6`):
            Epsilon of the RMSNorms.
        layer_norm_eps (`float`, *optional*, defaults to `1e-5`):
            Epsilon of the LayerNorms.
        mlp_type (`"swiglu"` or `"dense"`, *optional*, defaults to `"swiglu"`):
            Gated (https://arxiv.org/abs/2002.05202) or plain two-layer MLP.
        use_qk_norm (`bool`, *optional*, defaults to `True`):
            Norm queries and keys, head by head, before the rotation (https://arxiv.org/abs/2302.05442).
        attention_bias, mlp_bias (`bool`, *optional*, defaults to `False`):
            Biases in the projections of attention and MLP.
        attention_dropout, hidden_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of attention weights; of the embeddings and of each sub-layer's output.
        sliding_window (`int`, *optional*):
            Tokens that a `"sliding_attention"` layer sees, itself included; as many to either side if bidirectional.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer. By default all slide if there is a window.
        final_logit_softcapping (`float`, *optional*):
            Cap logits smoothly: `cap * tanh(logits / cap)` (https://arxiv.org/abs/2408.00118).
        initializer_range (`float`, *optional*, defaults to `0.02`):
            Standard deviation of initial weights; that of projections into the residual stream is divided by
            sqrt(2 × layers), as in GPT-2, unless `norm_position="post"`.
        is_causal (`bool`, *optional*, defaults to `True`):
            Whether a token sees only what precedes it, or what follows it too (the name that transformers' masks and
            attention kernels read). The causal and the masked language model set their own; trunk and classifiers
            follow it.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Share the embedding with the output head.

    Raises:
        ValueError: if fields contradict each other; the message names the field and what it may be.
    """

    model_type = "scratch_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # No annotation, so no field: a loader looks it up on the class, and every instance has its own filled copy.
    auto_map = dict[str, str]()

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["rope", "learned"] = "rope"
    rope_parameters: RopeParameters | dict | None = None
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_position: Literal["pre", "post"] = "pre"
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    mlp_type: Literal["swiglu", "dense"] = "swiglu"
    use_qk_norm: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    final_logit_softcapping: float | int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    is_causal: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            dense, gated = 4 * self.hidden_size, -(-8 * self.hidden_size // 3 // 64) * 64
            self.intermediate_size = dense if self.mlp_type == "dense" else gated
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        kwargs.pop("auto_map", None)  # the code is saved beside the weights, so the map never points elsewhere
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None
        if self.mlp_type == "dense":  # a plan names no layer that is not there
            plan = self.base_model_tp_plan.items()
            self.base_model_tp_plan = {name: how for name, how in plan if not name.endswith("gate_proj")}
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self):
        """Check the fields against each other; part of the validation that `@strict` runs."""
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        assert self.num_key_value_heads is not None  # these three are filled in by __post_init__
        assert self.head_dim is not None
        assert self.layer_types is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` is {self.num_key_value_heads}, which does not divide `num_attention_heads` "
                f"({self.num_attention_heads}); choose a divisor"
            )
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(
                f"`head_dim` is {self.head_dim}; rotary positions need an even one (by default it is `hidden_size` "
                f"// `num_attention_heads` = {self.hidden_size} // {self.num_attention_heads})"
            )
        if unknown := sorted(set(self.layer_types) - {"full_attention", "sliding_attention"}):
            raise ValueError(f"`layer_types` has {unknown}; each layer is 'full_attention' or 'sliding_attention'")
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"`sliding_window` is {self.sliding_window}; sliding layers need at least 1 token")
        if self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0:
            raise ValueError(
                f"`final_logit_softcapping` is {self.final_logit_softcapping}; it must be above 0 or None"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ScratchGPTConfig":
        """A named size of `hf_scratch_gpt.model.presets`, with any field overridden.

        A preset's pattern of `layer_types` is repeated or cut to another `num_hidden_layers`, and dropped where
        `sliding_window` is overridden by `None`.

        Raises:
            ValueError: if there is no such preset or field; the message names the nearest one.
            ImportError: if this file runs as remote code where the package is not installed.
        """
        try:
            presets = importlib.import_module("hf_scratch_gpt.model.presets").PRESETS
        except ModuleNotFoundError as error:
            raise ImportError("presets are part of the package: `pip install hf_scratch_gpt`") from error
        if name not in presets:
            raise ValueError(f"no preset '{name}'{_nearest(name, presets)}; there are: {', '.join(presets)}")
        known = set(cls.__dataclass_fields__) | _EXTRA_ARGUMENTS
        for field in overrides:
            if field not in known:
                raise ValueError(f"`{field}` is no field of ScratchGPTConfig{_nearest(field, known)}")
        fields = {**presets[name], **overrides}
        if "layer_types" in presets[name] and "layer_types" not in overrides:
            dense = fields["sliding_window"] is None
            pattern = itertools.cycle(fields["layer_types"])
            fields["layer_types"] = None if dense else list(itertools.islice(pattern, fields["num_hidden_layers"]))
        return cls(**fields)


def _nearest(name, known):
    """The hint `, did you mean 'x'?` if one of the known names is close, else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{matches[0]}'?" if matches else ""


__all__ = ["ScratchGPTConfig"]
