# SPDX-License-Identifier: Apache-2.0
"""What a model computes in another way while it trains on a CPU in bf16: weights' gradients, angles and masks.

A weight's gradient is a product over all tokens of a batch, and oneDNN's time for it depends on which way round it is
asked: with 16,384 tokens, 1,216 by 384 takes 46 ms and 384 by 1,216 takes 62, and the second is the transpose of the
first. So the side with more channels always comes first. The tokens are cut into chunks that stay in the caches, whose
gradients are added up in fp32, which also rounds less. Rotary angles and the masks of packed documents are operators
of their own: what a compiler can see into it computes anew for every layer, and the angles for every head. A step of
the 14M shape of `tests/benchmarks/pretrain.py` took 4.93 s forward and backward, and 4.47 s with all three.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CHUNK_ROWS = 2048


def weight_gradient(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """`grad.T @ inputs` of a linear layer, (outputs, inputs) in fp32.

    Args:
        grad (`Tensor`): Of the layer's output, (tokens, outputs).
        inputs (`Tensor`): The layer's, (tokens, inputs), in the same dtype.
    """
    if grad.shape[1] < inputs.shape[1]:
        return weight_gradient(inputs, grad).T
    rows = grad.shape[0]
    whole = rows - rows % _CHUNK_ROWS
    total = None
    if whole:
        left, right = (part[:whole].view(-1, _CHUNK_ROWS, part.shape[1]) for part in (grad, inputs))
        total = torch.bmm(left.mT, right).sum(0, dtype=torch.float32)
    if rows > whole:
        rest = torch.mm(grad[whole:].T, inputs[whole:]).float()
        total = rest if total is None else total + rest
    assert total is not None, "a batch without tokens"
    return total


class _TrainedProduct(torch.autograd.Function):
    """`inputs @ weight.T` in the dtype of `inputs`; the weight's gradient is that of `weight_gradient`."""

    @staticmethod
    def forward(ctx: Any, inputs, weight):
        cast = weight.to(inputs.dtype)
        ctx.save_for_backward(inputs, cast)
        ctx.weight_dtype = weight.dtype
        return inputs @ cast.T

    @staticmethod
    def backward(ctx: Any, grad):
        inputs, cast = ctx.saved_tensors
        grad_inputs = grad @ cast if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad.contiguous(), inputs).to(ctx.weight_dtype)
        return grad_inputs, grad_weight


class TrainedForward:
    """Stands in for the forward of one `nn.Linear` without bias; outside autocast in bf16 it is that forward.

    Args:
        layer (`nn.Linear`): The layer.
    """

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        trains = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and inputs.device.type == "cpu"
        if not trains or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return nn.Linear.forward(layer, inputs)
        with torch.autocast("cpu", enabled=False):
            rows = inputs.to(torch.bfloat16).flatten(0, -2)
            return _TrainedProduct.apply(rows, layer.weight).view(*inputs.shape[:-1], layer.out_features)


def _trainable(model: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers of the trunk that nothing else has wrapped; the head is the loss's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not head and layer.bias is None and "forward" not in vars(layer):
            yield layer


class AnglesForward:
    """Stands in for the forward of a rotary embedding whose frequencies are fixed.

    Args:
        embedding (`nn.Module`): Has `inv_freq` and `attention_scaling`, as those of transformers' models.
    """

    def __init__(self, embedding: Any):
        self.embedding = embedding

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary_angles(position_ids, self.embedding.inv_freq, float(self.embedding.attention_scaling))
        return cos.to(x.dtype), sin.to(x.dtype)


def _rotary(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if getattr(module, "rope_type", None) == "default" and "forward" not in vars(module):
            yield module


@contextmanager
def cpu_training(model: nn.Module) -> Iterator[None]:
    """Within it linear layers and rotary embeddings of `model` compute as described above; nothing of it stays."""
    layers, rotary = list(_trainable(model)), list(_rotary(model))
    for layer in layers:
        layer.forward = TrainedForward(layer)
    for embedding in rotary:
        embedding.forward = AnglesForward(embedding)
    try:
        yield
    finally:
        for module in (*layers, *rotary):
            del module.forward


@torch.library.custom_op("hf_scratch_gpt::rotary_angles", mutates_args=())
def rotary_angles(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `position_ids` (batch, tokens), each (batch, tokens, 2 x frequencies) in fp32.

    An operator of its own, because a compiler computes them anew for every head of every layer otherwise.
    """
    angles = position_ids[..., None].float() * inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


@rotary_angles.register_fake
def _(position_ids, inv_freq, scaling):
    shape = (*position_ids.shape, 2 * inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=torch.float32), inv_freq.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("hf_scratch_gpt::document_mask", mutates_args=())
def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Who may look where among packed documents: bool (batch, 1, queries, keys).

    Args:
        position_ids (`Tensor`): (batch, tokens); each document begins with a position that is not one more than the
            one before it, as transformers reads them.
    """
    starts = nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    documents = starts.cumsum(-1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


@document_mask.register_fake
def _(position_ids):
    batch, tokens = position_ids.shape
    return position_ids.new_empty((batch, 1, tokens, tokens), dtype=torch.bool)
