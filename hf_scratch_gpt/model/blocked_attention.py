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
_ROWS = 24


def block_size(tokens: int) -> int:
    """Queries in a block: small blocks compute less of the causal half, larger ones make better products."""
    return 128 if tokens <= 512 else 256


def _row_groups(rows: int) -> Iterator[slice]:
    """Heads of sequences that are worked on together: few, so that their weights stay in the caches."""
    for start in range(0, rows, _ROWS):
        yield slice(start, start + _ROWS)


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    size = block_size(tokens)
    for start in range(0, tokens, size):
        yield start, min(tokens, start + size)


def weights_kept(tokens: int) -> int:
    """Attention weights that are kept for each head of a sequence of so many tokens."""
    return sum((end - start) * end for start, end in _blocks(tokens))


def _cut(weights: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """Kept weights, (rows, numbers of a row), as their blocks, each (rows, queries of the block, keys up to its end).

    Blocks of all these rows lie one after the other, so that each is contiguous.
    """
    rows, views, begin = weights.shape[0], [], 0
    for start, end in _blocks(tokens):
        size = rows * (end - start) * end
        views.append(weights.view(-1)[begin : begin + size].view(rows, end - start, end))
        begin += size
    return views


def _attend(q, k, v, hidden, weights, output) -> None:
    """Attention of some rows, (rows, tokens, head_dim), into `output` and `weights`."""
    tokens = q.shape[1]
    ahead = None if hidden is not None else q.new_full((block_size(tokens),) * 2, -math.inf).triu_(1)
    for (start, end), block in zip(_blocks(tokens), _cut(weights, tokens), strict=True):
        torch.bmm(q[:, start:end], k[:, :end].mT, out=block)
        if ahead is None:
            # Not minus infinity: of a query that may look nowhere (padding on the left) that would make NaN.
            block.masked_fill_(hidden[:, start:end, :end], torch.finfo(block.dtype).min)
        else:
            block[:, :, start:].add_(ahead[: end - start, : end - start])
        torch.softmax(block, -1, out=block)
        torch.bmm(block, v[:, :end], out=output[:, start:end])


def _attend_backward(g, q, k, v, weights, grad_q, grad_k, grad_v) -> None:
    """Gradients of `_attend` into the last three, given that of its output."""
    tokens = q.shape[1]
    blocks = list(zip(_blocks(tokens), _cut(weights, tokens), strict=True))
    # The last block sees all keys, so it writes their whole gradients, and the others add to them.
    for number, ((start, end), block) in enumerate(reversed(blocks)):
        grad_block = torch.bmm(g[:, start:end], v[:, :end].mT)
        grad_scores = torch._softmax_backward_data(grad_block, block, -1, block.dtype)
        torch.bmm(grad_scores, k[:, :end], out=grad_q[:, start:end])
        for total, left, right in ((grad_k, grad_scores, q), (grad_v, block, g)):
            if number:
                total[:, :end].baddbmm_(left.mT, right[:, start:end])
            else:
                torch.bmm(left.mT, right[:, start:end], out=total)


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
    inputs = [tensor.reshape(batch * heads, tokens, -1) for tensor in (query, key, value)]
    output = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    weights = query.new_empty(batch * heads, weights_kept(tokens))
    seen = None if mask is None else mask[:, 0].expand(batch, tokens, tokens)
    plain = None if seen is None else _only_causal(seen)
    sequences = torch.arange(batch).repeat_interleave(heads)
    for rows in _row_groups(batch * heads):
        q, k, v = (tensor[rows] for tensor in inputs)
        members = sequences[rows]
        hidden = None
        if seen is not None and plain is not None and not plain[members].all():
            hidden = seen[members].logical_not()
        _attend(q, k, v, hidden, weights[rows], output[rows])
    return output.view(query.shape), weights


def _only_causal(seen: torch.Tensor) -> torch.Tensor:
    """Which masks of (batch, tokens, tokens) hide only what lies ahead, (batch,).

    Few windows hold the start of a document, and for the others a mask costs a tenth of the layer's time.
    """
    causal = torch.ones(seen.shape[1:], dtype=torch.bool).tril()
    if seen.shape[-1] % 8 == 0 and seen.is_contiguous():  # eight at a time
        seen, causal = seen.view(torch.int64), causal.view(torch.int64)
    return (seen == causal).flatten(1).all(1)


@blocked_attention.register_fake
def _(query, key, value, mask):
    batch, heads, tokens, _ = query.shape
    weights = query.new_empty(batch * heads, weights_kept(tokens))
    return torch.empty_like(query, memory_format=torch.contiguous_format), weights


@torch.library.custom_op("hf_scratch_gpt::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given that of the output and what `blocked_attention` kept."""
    batch, heads, tokens, _ = query.shape
    inputs = [tensor.reshape(batch * heads, tokens, -1) for tensor in (grad, query, key, value)]
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[1:]]
    for rows in _row_groups(batch * heads):
        _attend_backward(*(tensor[rows] for tensor in (*inputs, weights, *grads)))
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
