"""Head and loss in chunks: the plain loss of the whole logits, by another way, with the same gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTForMaskedLM
from hf_scratch_gpt.model import linear_cross_entropy as module
from hf_scratch_gpt.model.linear_cross_entropy import chunk_rows, linear_cross_entropy


def plain(hidden, weight, targets, z_loss=0.0, softcap=None):
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss + z_loss * logits.logsumexp(-1)[targets != -100].square().sum()


def draw(rows, vocabulary, width=12, dtype=torch.float32, ignored=0.3):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(rows, generator=generator) < ignored, -100)


def set_chunk(patch, rows):
    """Chunks of `rows` tokens, compiled or not."""
    for name, value in (("ROWS", rows), ("LOGITS", 1)):
        patch.setattr(module, f"_CHUNK_{name}", value)
        patch.setattr(module, f"_EAGER_CHUNK_{name}", value)


def loss_and_gradients(function, hidden, weight, targets, *settings):
    loss = function(hidden, weight, targets, *settings)
    return loss, *torch.autograd.grad(loss * 0.7, (hidden, weight))


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 30),
    chunk=st.integers(1, 12),
    z_loss=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 5.0]),
)
def test_it_equals_the_plain_loss_with_its_gradients(rows, vocabulary, chunk, z_loss, softcap):
    inputs = draw(rows, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, chunk)
        ours = loss_and_gradients(linear_cross_entropy, *inputs, z_loss, softcap)
    for one, other in zip(ours, loss_and_gradients(plain, *inputs, z_loss, softcap), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_the_z_loss_by_hand():
    # Z = 1 + 3 = 4 and 1 + 1 = 2; the targets are the second token, then the first; the last row has none.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [9.0, 9.0]], requires_grad=True)
    loss = linear_cross_entropy(logits, torch.eye(2), torch.tensor([1, 0, -100]), z_loss=0.1)
    expected = -math.log(3 / 4) + 0.1 * math.log(4) ** 2 - math.log(1 / 2) + 0.1 * math.log(2) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    # d(-log p)/dx = p - target; d(z log(Z)^2)/dx = 2 z log(Z) p.
    first = [0.25 + 0.2 * math.log(4) * 0.25, 0.75 - 1 + 0.2 * math.log(4) * 0.75]
    second = [0.5 - 1 + 0.2 * math.log(2) * 0.5, 0.5 + 0.2 * math.log(2) * 0.5]
    torch.testing.assert_close(logits.grad, torch.tensor([first, second, [0.0, 0.0]]))


def test_without_any_target_all_is_zero():
    hidden, weight, _ = draw(5, 7)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, torch.full((5,), -100))
    assert not loss.item()
    assert not any(gradient.any() for gradient in gradients)


def test_under_autocast_products_are_bf16_and_sums_fp32():
    """Each error is that of the plain loss under autocast, or smaller."""
    inputs = draw(300, 97)
    exact = loss_and_gradients(plain, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_and_gradients(plain, *inputs)
        with pytest.MonkeyPatch.context() as patch:
            set_chunk(patch, 32)
            ours = loss_and_gradients(linear_cross_entropy, *inputs)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    for one, other, truth in zip(ours, rounded, exact, strict=True):
        assert 0 < (one - truth).norm() < 1.2 * (other - truth).norm() + 1e-3 * truth.norm()


def test_a_frozen_head_costs_no_gradient_and_changes_nothing_else():
    hidden, weight, targets = draw(20, 9)
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets), hidden)
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


def test_compiled_it_is_the_same(monkeypatch):
    inputs = draw(50, 33)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    set_chunk(monkeypatch, 16)
    for options in ((0.0, None), (0.1, 3.0)):
        expected = loss_and_gradients(linear_cross_entropy, *inputs, *options)
        torch.testing.assert_close(loss_and_gradients(compiled, *inputs, *options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_is_ever_made(dtype):
    rows, vocabulary, largest = 4096, 2048, 0
    inputs = draw(rows, vocabulary, dtype=dtype)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with pytest.MonkeyPatch.context() as patch, Watch():
        set_chunk(patch, 100)
        linear_cross_entropy(*inputs).backward()
    assert largest == 100 * vocabulary


@given(rows=st.integers(1, 10**6), vocabulary=st.integers(2, 300_000))
def test_chunks_are_equal_and_neither_small_nor_large(rows, vocabulary):
    size, most = chunk_rows(rows, vocabulary), max(128, 2**22 // vocabulary)
    chunks = -(-rows // size)
    assert 1 <= size <= most
    assert rows - (chunks - 1) * size > 0
    assert chunks <= -(-rows // most)


@pytest.mark.parametrize("model_class", [ScratchGPTForCausalLM, ScratchGPTForMaskedLM])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_model_without_logits_has_the_loss_of_one_with_them(model_class, softcap):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": softcap}
    model = model_class(ScratchGPTConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None))
    ids = torch.randint(0, 40, (3, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    outputs = model(input_ids=ids, labels=labels, skip_logits=True)
    assert outputs.logits is None
    expected = model(input_ids=ids, labels=labels, num_items_in_batch=1).loss
    torch.testing.assert_close(outputs.loss, expected)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (outputs.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"`skip_logits` serves a plain linear head, found Sequential"):
        model(input_ids=ids, labels=labels, skip_logits=True)
