"""nanochat's recipe, written anew from its facts, to compare with: model, optimizers and schedule.

Facts from https://github.com/karpathy/nanochat (nanochat/gpt.py and scripts/base_train.py, early 2026): rotary
positions, then queries and keys normed; RMSNorm without weights, one right after the embedding; squared ReLU; no
biases; untied head, logits softly capped at 15; on every other layer, the last one among them, the token's own value
embedding is added to the values through a gate that starts at 1; each layer scales the residual stream and adds the
first one's. Embedding N(0, 1), head N(0, 0.001), matrices uniform of deviation 1 / sqrt(width), output projections 0.
As many key and value heads as query heads. AdamW (0.8, 0.95) at 0.3 for embeddings and 0.004 for the head, both times
sqrt(768 / width), Muon at 0.02 with its momentum rising over 300 steps; the rate is constant, and falls to 0 over the
second half. Left out: weight decay, sliding windows, and what later versions add to Muon.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from pretrain_shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F

SOFTCAP = 15.0
GATE_CHANNELS = 32
MOMENTUM_STEPS = 300


def norm(hidden: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(hidden, (hidden.size(-1),))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of (batch, length, heads, head_dim) by their positions' angles, then norm."""
    first, second = heads.chunk(2, dim=-1)
    return norm(torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1))


def has_value_embedding(layer: int, layers: int) -> bool:
    """Every other layer, counted from the last."""
    return layer % 2 == (layers - 1) % 2


class Block(nn.Module):
    """A layer: attention, whose values may take the token's own embedding in, then the MLP."""

    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        width, self.head_dim = shape.hidden_size, shape.head_dim
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_input, self.mlp_output = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )
        self.value_embedding = self.gate = None
        if has_value_embedding(layer, shape.num_hidden_layers):
            self.value_embedding = nn.Embedding(shape.vocab_size, width)
            self.gate = nn.Linear(GATE_CHANNELS, shape.num_attention_heads, bias=False)

    def attend(self, hidden: Tensor, token_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, length, width) to the same; `hidden` is normed."""
        batch, length, _ = hidden.shape
        heads = (batch, length, -1, self.head_dim)
        query, key = (rotate(layer(hidden).view(heads), cos, sin) for layer in (self.query, self.key))
        value = self.value(hidden).view(heads)
        if self.value_embedding is not None:
            gate = 2 * torch.sigmoid(self.gate(hidden[..., :GATE_CHANNELS]))
            value = value + gate[..., None] * self.value_embedding(token_ids).view(heads).to(value.dtype)
        parts = [part.transpose(1, 2) for part in (query.to(value.dtype), key.to(value.dtype), value)]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, hidden: Tensor, token_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        hidden = hidden + self.attend(norm(hidden), token_ids, cos, sin)
        return hidden + self.mlp_output(F.relu(self.mlp_input(norm(hidden))).square())


class NanoChat(nn.Module):
    """nanochat's model of a shape."""

    def __init__(self, shape: Shape):
        super().__init__()
        layers, width = shape.num_hidden_layers, shape.hidden_size
        self.token_embedding = nn.Embedding(shape.vocab_size, width)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(layers))
        self.head = nn.Linear(width, shape.vocab_size, bias=False)
        self.residual_scales = nn.Parameter(torch.ones(layers))
        self.first_scales = nn.Parameter(torch.full((layers,), 0.1))
        frequencies = 10000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(shape.context_length)[:, None] * frequencies
        self.cos, self.sin = (nn.Buffer(part[None, :, None]) for part in (angles.cos(), angles.sin()))
        bound = math.sqrt(3 / width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.uniform_(parameter, -bound, bound)
            if name.endswith(("output.weight", "gate.weight")):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.head.weight, std=0.001)

    def forward(self, token_ids: Tensor, targets: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        """Mean cross entropy of `targets`, or the logits (of the last so many positions) without them."""
        length = token_ids.size(1)
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        hidden = first = norm(self.token_embedding(token_ids))
        for number, block in enumerate(self.blocks):
            hidden = self.residual_scales[number] * hidden + self.first_scales[number] * first
            hidden = block(hidden, token_ids, cos, sin)
        logits = self.head(norm(hidden)[:, -logits_to_keep:]).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class AsCausalModel(nn.Module):
    """Lets `NanoChat` be called as transformers' causal models are, for the measures that take those."""

    def __init__(self, model: NanoChat):
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(max_position_embeddings=model.cos.size(1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.head.weight.device

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> SimpleNamespace:
        """`logits` of the last `logits_to_keep` positions, or of all."""
        return SimpleNamespace(logits=self.model(input_ids, logits_to_keep=logits_to_keep))


def make_optimizers(model: NanoChat) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and scales."""
    # Ours gives torch.optim.Muon's result in less time: the baseline shall not lose by its optimizer's speed.
    from hf_scratch_gpt.pretraining.optimizers import Muon

    scale = (model.head.in_features / 768) ** -0.5
    matrices, embeddings = [], [model.token_embedding.weight]
    for name, parameter in model.blocks.named_parameters():
        (embeddings if "value_embedding" in name else matrices).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "lr": 0.3 * scale},
        {"params": [model.head.weight], "lr": 0.004 * scale},
        {"params": [model.residual_scales], "lr": 0.005},
        {"params": [model.first_scales], "lr": 0.5, "betas": (0.96, 0.95)},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=0.02, momentum=0.85), adamw]


def rate_factor(progress: float) -> float:
    """Share of the full rate: all of it, and over the second half linearly down to 0."""
    return min(1.0, 2 * (1 - progress))


def muon_momentum(step: int) -> float:
    """Rises from 0.85 to 0.95."""
    return 0.85 + 0.1 * min(1.0, step / MOMENTUM_STEPS)
