# SPDX-License-Identifier: Apache-2.0
"""Causal attention for training on a CPU, as products of whole blocks; registered as the implementation "blocked".

torch's fused CPU kernel computes tile by tile and casts each tile of bf16: a layer of the 14M shape takes four times
as long as the same five products do in oneDNN. Here the queries are cut into blocks, and a block is multiplied with
all keys up to its own end and no further, so that most of the causal half that nobody sees is not computed. The
weights are kept for the backward pass, in the dtype of the inputs: batch x heads x tokens^2 / 2, roughly.

Any transformers model trains with it: `model.set_attn_implementation("blocked")`. Where it does not serve (other
devices, dropout, decoding with a cache, no gradients wanted) torch's own kernel runs.
`tests/benchmarks/pretrain.py` measures what it brings.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "blocked"


def block_size(tokens: int) -> int:
    """Queries in a block: small blocks compute less of the causal half, larger ones make better products."""
    return 128 if tokens <= 512 else 256


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    size = block_size(tokens)
    for start in range(0, tokens, size):
        yield start, min(tokens, start + size)


def _kept_of(weights: torch.Tensor, rows: int, tokens: int) -> list[torch.Tensor]:
    """The flat buffer of attention weights as its blocks, each (rows, queries of the block, keys up to its end)."""
    views, begin = [], 0
    for start, end in _blocks(tokens):
        size = rows * (end - start) * end
        views.append(weights[begin : begin + size].view(rows, end - start, end))
        begin += size
    return views


def weights_kept(tokens: int) -> int:
    """Attention weights that are kept for each head of a sequence of so many tokens."""
    return sum((end - start) * end for start, end in _blocks(tokens))


@torch.library.custom_op("hf_scratch_gpt::blocked_attention", mutates_args=())
def blocked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(query @ key.T + causal mask) @ value`.

    Args:
        query (`Tensor`): (batch, heads, tokens, head_dim), scaled already; `key` and `value` are of the same shape.
        mask (`Tensor`, *optional*): Bool, (batch or 1, 1, tokens, tokens), true where a query may look. It must
            forbid what lies ahead; without it, that alone is forbidden.

    Returns:
        `tuple`: The output, shaped as the query, and the flat attention weights that the backward pass needs.
    """
    batch, heads, tokens, _ = query.shape
    rows = batch * heads
    q, k, v = (tensor.reshape(rows, tokens, -1) for tensor in (query, key, value))
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    weights = q.new_empty(rows * weights_kept(tokens))
    ahead = None if mask is not None else q.new_full((block_size(tokens),) * 2, -math.inf).triu_(1)
    for (start, end), block in zip(_blocks(tokens), _kept_of(weights, rows, tokens), strict=True):
        torch.bmm(q[:, start:end], k[:, :end].mT, out=block)
        if ahead is None:
            assert mask is not None
            hidden = mask[:, :, start:end, :end].logical_not()
            block.view(batch, heads, end - start, end).masked_fill_(hidden, -math.inf)
        else:
            block[:, :, start:].add_(ahead[: end - start, : end - start])
        torch.softmax(block, -1, out=block)
        torch.bmm(block, v[:, :end], out=output[:, start:end])
    return output.view(query.shape), weights


@blocked_attention.register_fake
def _(query, key, value, mask):
    batch, heads, tokens, _ = query.shape
    shape = batch * heads * weights_kept(tokens)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(shape)


@torch.library.custom_op("hf_scratch_gpt::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given that of the output and what `blocked_attention` kept."""
    batch, heads, tokens, _ = query.shape
    rows = batch * heads
    g, q, k, v = (tensor.reshape(rows, tokens, -1) for tensor in (grad, query, key, value))
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)]
    blocks = list(zip(_blocks(tokens), _kept_of(weights, rows, tokens), strict=True))
    # The last block sees all keys, so it writes their whole gradients, and the others add to them.
    for number, ((start, end), block) in enumerate(reversed(blocks)):
        grad_block = torch.bmm(g[:, start:end], v[:, :end].mT)
        grad_scores = torch._softmax_backward_data(grad_block, block, -1, block.dtype)
        torch.bmm(grad_scores, k[:, :end], out=grads[0][:, start:end])
        for total, left, right in ((grads[1], grad_scores, q), (grads[2], block, g)):
            if number:
                total[:, :end].baddbmm_(left.mT, right[:, start:end])
            else:
                torch.bmm(left.mT, right[:, start:end], out=total)
    first, second, third = (tensor.view(query.shape) for tensor in grads)
    return first, second, third


@blocked_attention_backward.register_fake
def _(grad, query, key, value, weights):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, _ = inputs
    ctx.save_for_backward(query, key, value, output[1])


def _backward(ctx, grad, _):
    return *blocked_attention_backward(grad, *ctx.saved_tensors), None


blocked_attention.register_autograd(_backward, setup_context=_setup_context)


def blocked_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' models call; query (batch, heads, tokens, head_dim).

    Returns:
        `tuple`: The output, (batch, tokens, heads, head_dim), and no weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    serves = query.device.type == "cpu" and torch.is_grad_enabled() and not dropout and causal
    serves = serves and query.shape[2] == key.shape[2] and query.shape[3] == value.shape[3]
    if not serves or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Contiguous here, where a compiler writes them so at once.
    query, key, value = (query * scaling).contiguous(), repeat_kv(key, groups), repeat_kv(value, groups)
    output, _ = blocked_attention(query, key.contiguous(), value.contiguous(), attention_mask)
    return output.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, blocked_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
