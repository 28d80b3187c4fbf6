# SPDX-License-Identifier: Apache-2.0
"""The ScratchGPT decoder in one file: trunk, causal and masked language model, sequence and token classification.

With the modern preset it computes exactly what transformers' Qwen3 computes, under the same parameter names; with the
GPT-2 presets exactly what GPT-2 computes. This file travels to the Hub beside the weights.

A batch may hold several documents in a row: give `position_ids` that start again at 0 with each document and no
`attention_mask`, and no document sees another. Pass `use_cache=False` when training, or keys and values are kept for
nothing. The masked language model is the same trunk with attention in both directions, and has no cache.
"""

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import (
    and_masks,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_name import CACHE_NAME, OLD_NAME, given_cache, is_paged
from .configuration_scratch_gpt import ScratchGPTConfig
from .linear_cross_entropy import linear_cross_entropy
from .packed_linear import packed_linear_layers


@use_kernel_forward_from_hub("RMSNorm")
class ScratchGPTRMSNorm(nn.Module):
    """Root mean square norm over the last dimension, in fp32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        size, eps = self.weight.shape, self.variance_epsilon
        if (
            hidden_states.dtype == self.weight.dtype == torch.float32
        ):  # the same bits in one call, which decoding feels
            return nn.functional.rms_norm(hidden_states, size, self.weight, eps)
        normed = nn.functional.rms_norm(hidden_states.to(torch.float32), size, eps=eps)
        return self.weight * normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def make_norm(config: PreTrainedConfig, size: int) -> nn.Module:
    """The norm that the config asks for, over `size` channels."""
    # CODEPATH: gpt1, gpt2-* and gpt3-* have LayerNorm; modern-* have RMSNorm.
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(size, eps=config.layer_norm_eps)
    return ScratchGPTRMSNorm(size, eps=config.rms_norm_eps)


def make_residual_projection(input_size: int, output_size: int, bias: bool) -> nn.Linear:
    """A projection whose output is added to the residual stream, marked for `_init_weights`."""
    projection = nn.Linear(input_size, output_size, bias=bias)
    projection.is_residual_projection = True
    return projection


class ScratchGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of every position (https://arxiv.org/abs/2104.09864), halves rotated as in Llama."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        compute_parameters: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute_parameters = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute_parameters(config)
        # Not in the checkpoint: the base `_init_weights` rebuilds both, by these names, after loading.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, (head_dim / 2,), and the factor on cosines and sines, here 1."""
        base = config.rope_parameters["rope_theta"]
        inv_freq = 1.0 / (base ** (torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim))
        return inv_freq, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last dimension by a quarter turn: (a, b) becomes (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(query, key, cos, sin):
    """Rotate query and key (batch, heads, tokens, head_dim) by their positions' angles (batch, tokens, head_dim)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def repeat_kv(hidden_states: torch.Tensor, repeats: int) -> torch.Tensor:
    """(batch, kv_heads, tokens, head_dim) to (batch, kv_heads * repeats, tokens, head_dim), each head repeated."""
    return hidden_states if repeats == 1 else hidden_states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, which also returns its weights, (batch, heads, queries, keys)."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()
    return output, weights


class ScratchGPTAttention(nn.Module):
    """Multi-head attention, causal or not, with grouped keys and values, optional QK-norm and rotary positions."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.is_causal
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = make_residual_projection(query_size, config.hidden_size, bias=bias)
        # CODEPATH: modern-* norm queries and keys; gpt1, gpt2-* and gpt3-* do not.
        self.q_norm = make_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()  # CODEPATH: as above
        # A module and not a number, so that whoever switches off a model's dropout finds it.
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # By the name that transformers uses: before 5.24 what is called `cache` here is the attention function's own.
        cache: Cache | None = kwargs.pop(CACHE_NAME, None)
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if cache is not None:  # a paged one changes `kwargs`, for the attention function
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class ScratchGPTMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, https://arxiv.org/abs/2002.05202) or `down(act(up(x)))`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        # CODEPATH: modern-* have the gate; gpt1, gpt2-* and gpt3-* do not.
        self.is_gated = config.mlp_type == "swiglu"
        self.gate_proj = cast(nn.Linear, nn.Linear(outer, inner, bias=bias) if self.is_gated else None)
        self.up_proj = nn.Linear(outer, inner, bias=bias)
        self.down_proj = make_residual_projection(inner, outer, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.is_gated:
            return self._dense(hidden_states)
        # Each name once and in one expression: vLLM rewrites this source to compute gate and up in one product.
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))

    def _dense(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ScratchGPTDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each added to the residual stream; norms before them, or after the sums as in GPT-1."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.self_attn = ScratchGPTAttention(config, layer_idx)
        self.mlp = ScratchGPTMLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        if self.norm_first:
            hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, **kwargs)
        hidden_states = residual + self.dropout(hidden_states)
        if not self.norm_first:
            hidden_states = self.input_layernorm(hidden_states)

        residual = hidden_states
        if self.norm_first:
            hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + self.dropout(self.mlp(hidden_states))
        return hidden_states if self.norm_first else self.post_attention_layernorm(hidden_states)


def bidirectional_window(sliding_window: int) -> Callable:
    """A mask function: both sides of a token, each as far as a causal window reaches (distance < `sliding_window`)."""

    def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
        return abs(q_idx - kv_idx) < sliding_window

    return inner_mask


def with_direction(config: PreTrainedConfig, is_causal: bool) -> PreTrainedConfig:
    """The config with that direction of attention; a copy if it changes, since other models may share the object."""
    # CODEPATH: the masked language model alone reads both ways.
    if config.is_causal != is_causal:
        config = copy.deepcopy(config)
        config.is_causal = is_causal
    return config


class ScratchGPTPreTrainedModel(PreTrainedModel):
    """What all ScratchGPT models share: loading, initialisation, and what they support."""

    config: ScratchGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScratchGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScratchGPTDecoderLayer, "attentions": ScratchGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases; 1/sqrt(2 × layers) smaller into the residual stream (GPT-2, section 2.3).

        With norms after the sums nothing adds up along the depth: GPT-1 (section 4.1) draws all weights alike.
        """
        super()._init_weights(module)
        # CODEPATH: gpt1 has its norms after the sums; all others before.
        if getattr(module, "is_residual_projection", False) and self.config.norm_position == "pre":
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


class ScratchGPTModel(ScratchGPTPreTrainedModel):
    """The trunk: token ids (batch, tokens) to hidden states (batch, tokens, hidden_size) after the final norm."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        learned = config.position_embedding_type == "learned"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        # Not asked of the layers: a pipeline replaces those of its other stages.
        self.layer_types = cast(list[str], config.layer_types)  # the config fills it in
        self.layers = nn.ModuleList([ScratchGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # CODEPATH: gpt1 ends its last layer with a norm; all others have this one.
        self.norm = make_norm(config, config.hidden_size) if config.norm_position == "pre" else nn.Identity()
        self.rotary_emb = None if learned else ScratchGPTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of `input_ids`, (batch, tokens), or of `inputs_embeds`, (batch, tokens, hidden_size).

        `attention_mask` (batch, past and present tokens) is 0 at padding; `position_ids` (batch, tokens) start again
        at 0 with each packed document. `past_key_values` is another name of `cache`, whichever of the two the
        installed transformers calls it; the output has the latter's.

        Raises:
            ValueError: if both inputs are given or neither, or if there are more tokens than learned positions in a
                row that is no packed one, or if a cache is given twice or under a third name.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        cache = given_cache(cache, past_key_values, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        many_requests = is_paged(cache, kwargs)
        # CODEPATH: the masked language model keeps no cache.
        if not self.config.is_causal and not many_requests:  # which bring a mask, and then call it not causal
            if cache is not None:
                raise ValueError("a cache was given, but a bidirectional model has none; leave it out")
            use_cache = False
        masks = self._attention_masks(inputs_embeds, attention_mask, position_ids, cache)
        # Several documents in a row may be longer than the table of positions: a server's batches are.
        is_packed = many_requests or (position_ids is not None and attention_mask is None and cache is None)
        if position_ids is None:
            position_ids = self._position_ids(inputs_embeds, attention_mask, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states, position_embeddings = inputs_embeds, None
        # In a pipeline (https://arxiv.org/abs/1811.06965) only the stage that has the first layer adds positions.
        if self.embed_positions is not None and not isinstance(self.layers[0], nn.Identity):
            if not is_packed:
                self._check_length(inputs_embeds, cache)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.dropout(hidden_states)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):  # early-exit drafting lowers it
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[self.layer_types[index]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        kept = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **kept)

    def _attention_masks(self, inputs_embeds, attention_mask, position_ids, cache) -> dict:
        """A mask for each kind of layer in use; `generate` may have prepared them already.

        Only what the caller gave is passed on: `position_ids` made here are never packed, and a cache made here is
        empty, and either would cost the fast causal kernel or the separation of packed documents.
        """
        if isinstance(attention_mask, dict):
            return attention_mask
        # CODEPATH: the masked language model alone reads both ways.
        if not self.config.is_causal:
            return self._bidirectional_masks(inputs_embeds, attention_mask, position_ids)
        make_mask = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            layer_type: make_mask[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
            )
            for layer_type in dict.fromkeys(self.layer_types)
        }

    def _bidirectional_masks(self, inputs_embeds, attention_mask, position_ids) -> dict:
        """As `_attention_masks`, for attention both ways: transformers' own masks would let packed documents mix."""
        documents = None
        if position_ids is not None and attention_mask is None:
            documents = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
        masks = {}
        for layer_type in dict.fromkeys(self.layer_types):
            rules = [] if documents is None else [packed_sequence_mask_function(documents)]
            # CODEPATH: gpt3-* have banded layers.
            if layer_type == "sliding_attention" and self.config.sliding_window is not None:
                rules.append(bidirectional_window(self.config.sliding_window))
            masks[layer_type] = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                and_mask_function=and_masks(*rules) if rules else None,
            )
        return masks

    @staticmethod
    def _position_ids(inputs_embeds, attention_mask, cache) -> torch.Tensor:
        """Positions from 0, (batch or 1, tokens), counted from the first token that is not padding."""
        length = inputs_embeds.shape[1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        start = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + start).unsqueeze(0)

    def _check_length(self, inputs_embeds, cache) -> None:
        past = cache.get_seq_length() if cache is not None else 0
        if isinstance(past, int) and past + inputs_embeds.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + inputs_embeds.shape[1]} tokens are more than the {self.config.max_position_embeddings} "
                "learned positions of this model (`max_position_embeddings`); shorten the input"
            )


def summed_loss(
    config: PreTrainedConfig, lm_head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> torch.Tensor:
    """Cross-entropy in nats of `targets` (batch, tokens) but -100, summed, without ever making all logits."""
    if type(lm_head) is not nn.Linear:  # its `weight` alone would leave out what an adapter adds
        raise ValueError(f"`skip_logits` serves a plain linear head, found {type(lm_head).__name__}; leave it out")
    softcap = config.final_logit_softcapping
    return linear_cross_entropy(hidden_states.flatten(0, 1), lm_head.weight, targets.flatten(), z_loss, softcap)


class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, GenerationMixin):
    """The trunk with a language-model head, tied to the embedding unless the config says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ScratchGPTConfig):
        config = with_direction(config, is_causal=True)
        super().__init__(config)
        self.model = ScratchGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        z_loss: float = 0.0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocab_size), and with `labels` (-100 is left out) the mean loss in nats a token.

        `num_items_in_batch` divides the summed loss instead of the count of this batch's labels. `skip_logits` with
        `labels` gives the summed loss alone, and takes far less memory; `z_loss` is that of `linear_cross_entropy`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            **kwargs,
        )
        if skip_logits and labels is not None:
            targets = kwargs.get("shift_labels")
            if targets is None:
                targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = summed_loss(self.config, self.lm_head, outputs.last_hidden_state, targets, z_loss)
            return CausalLMOutputWithPast(loss=loss)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        # CODEPATH: no preset caps its logits; Gemma's checkpoints do.
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, **kwargs):
        """As `GenerationMixin`'s; the cache has its old name, by which PEFT 0.21 looks for it to add a prefix."""
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        if CACHE_NAME in inputs:
            inputs[OLD_NAME] = inputs.pop(CACHE_NAME)
        return inputs

    def generate(self, *args, **kwargs):
        """As `GenerationMixin.generate`; on a CPU the linear layers are packed for it as long as it runs."""
        with packed_linear_layers(self):
            return super().generate(*args, **kwargs)


class ScratchGPTForMaskedLM(ScratchGPTPreTrainedModel):
    """The same trunk and head reading both ways, to fill in masked tokens (BERT, https://arxiv.org/abs/1810.04805).

    A causal checkpoint loads into it and the other way round: the parameters have the same names and shapes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ScratchGPTConfig):
        config = with_direction(config, is_causal=False)
        super().__init__(config)
        self.model = ScratchGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        skip_logits: bool = False,
        z_loss: float = 0.0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Logits (batch, tokens, vocab_size), and the mean loss in nats over the `labels` (not shifted) but -100.

        `num_items_in_batch` divides the summed loss instead of the count of this batch's labels. `skip_logits` with
        `labels` gives the summed loss alone, and takes far less memory; `z_loss` is that of `linear_cross_entropy`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if skip_logits and labels is not None:
            return MaskedLMOutput(
                loss=summed_loss(self.config, self.lm_head, outputs.last_hidden_state, labels, z_loss)
            )
        logits = self.lm_head(outputs.last_hidden_state)
        # CODEPATH: no preset caps its logits; Gemma's checkpoints do.
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# The generic heads build their trunk through AutoModel, which does not know remote code: so build it here.
class ScratchGPTForSequenceClassification(GenericForSequenceClassification, ScratchGPTPreTrainedModel):
    """A score for each label, (batch, num_labels), read at each sequence's last token that is not padding."""

    def __init__(self, config: ScratchGPTConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = ScratchGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class ScratchGPTForTokenClassification(GenericForTokenClassification, ScratchGPTPreTrainedModel):
    """A score for each label at each token, (batch, tokens, num_labels)."""

    def __init__(self, config: ScratchGPTConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = ScratchGPTModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "ScratchGPTForCausalLM",
    "ScratchGPTForMaskedLM",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
]
