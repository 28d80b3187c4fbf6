"""nanoGPT's recipe, written anew from its facts, to compare with: model, optimizer, schedule and batches.

Facts from https://github.com/karpathy/nanoGPT (model.py, train.py and config/train_shakespeare_char.py): pre-norm
LayerNorm, learned positions, fused query-key-value projection, exact GELU, MLP of four times the width, tied head, no
biases and no dropout in pretraining; weights N(0, 0.02), those into the residual stream divided by sqrt(2 x layers);
AdamW (0.9, 0.95) with decay 0.1 on what has two dimensions, fused on CUDA only; clipping at 1; linear warm-up and a
cosine down to a tenth; windows at random starts of a memory-mapped file.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pretrain_shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, shape: Shape, bias: bool):
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = hidden.shape
        split = self.query_key_value(hidden).split(width, dim=2)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in split)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    """A layer: attention, then the MLP, each on the normed residual stream."""

    def __init__(self, shape: Shape, bias: bool):
        super().__init__()
        width = shape.hidden_size
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(shape, bias)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp_input = nn.Linear(width, 4 * width, bias=bias)
        self.mlp_output = nn.Linear(4 * width, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(hidden))))


class NanoGPT(nn.Module):
    """nanoGPT's model.

    Args:
        shape (`Shape`): Its size.
        bias (`bool`, *optional*, defaults to `False`): Biases in all projections and norms; its train.py has none.
    """

    def __init__(self, shape: Shape, bias: bool = False):
        super().__init__()
        width = shape.hidden_size
        self.token_embedding = nn.Embedding(shape.vocab_size, width)
        self.position_embedding = nn.Embedding(shape.context_length, width)
        self.blocks = nn.ModuleList(Block(shape, bias) for _ in range(shape.num_hidden_layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, shape.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("attention.output.weight", "mlp_output.weight"))
                scale = math.sqrt(2 * shape.num_hidden_layers) if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, token_ids: Tensor, targets: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        """Mean cross entropy of `targets`, or the logits (of the last so many positions) without them."""
        positions = torch.arange(token_ids.size(1), device=token_ids.device)
        hidden = self.token_embedding(token_ids) + self.position_embedding(positions)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden)[:, -logits_to_keep:])
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class AsCausalModel(nn.Module):
    """Lets `NanoGPT` be called as transformers' causal models are, for the measures that take those."""

    def __init__(self, model: NanoGPT):
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(max_position_embeddings=model.position_embedding.num_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.head.weight.device

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> SimpleNamespace:
        """`logits` of the last `logits_to_keep` positions, or of all."""
        return SimpleNamespace(logits=self.model(input_ids, logits_to_keep=logits_to_keep))


def make_adamw(model: nn.Module, rate: float, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW that decays what has two dimensions; fused on CUDA unless `fused` says otherwise."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    if fused is None:
        fused = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused or None)


def cosine_factor(step: int, progress: float, warmup_steps: int, final: float = 0.1) -> float:
    """Share of the full rate: a linear warm-up over steps, then half a cosine over the budget down to `final`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class RandomWindows:
    """Windows at random starts of a token file, and the same windows one token on.

    Args:
        file (`Path`): Token ids in a row.
        dtype (`np.dtype`): Of an id on disk.
        context_length (`int`): Tokens of a window.
        batch_size (`int`): Windows of a batch.
        device: Where batches go.
    """

    def __init__(self, file: Path, dtype: np.dtype, context_length: int, batch_size: int, device: Any):
        self.file, self.dtype, self.device = file, dtype, torch.device(device)
        self.context_length, self.batch_size = context_length, batch_size

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 of shape (batch, length); draws from torch's generator."""
        # Opened anew for each batch: an open memory map's pages would count as this process's memory.
        tokens = np.memmap(self.file, dtype=self.dtype, mode="r")
        starts = torch.randint(len(tokens) - self.context_length, (self.batch_size,)).tolist()
        rows = np.stack([tokens[start : start + self.context_length + 1] for start in starts]).astype(np.int64)
        batch = torch.from_numpy(rows)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
