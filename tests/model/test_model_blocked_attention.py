"""Attention in blocks: the same output and gradients as torch's kernel, in whatever model it is switched on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, blocked_attention
from hf_scratch_gpt.model.blocked_attention import IMPLEMENTATION, weights_kept


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def with_gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 21), st.integers(1, 5)),
    block=st.integers(1, 9),
    rows=st.integers(1, 4),
    documents=st.booleans(),
)
def test_it_equals_torchs_kernel_with_its_gradients(shape, block, rows, documents):
    query, key, value = draw(*shape)
    batch, _, tokens, _ = shape
    mask = None
    if documents:
        number = torch.randint(0, 2, (batch, tokens), generator=torch.Generator().manual_seed(tokens)).cumsum(-1)
        mask = (number[:, None, :, None] == number[:, None, None, :]) & torch.ones(tokens, tokens).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_attention, "block_size", lambda tokens: block)
        patch.setattr(blocked_attention, "_ROWS", rows)
        output, weights = blocked_attention.blocked_attention(query, key, value, mask)
        ours = with_gradients(output, (query, key, value))
        assert weights.numel() == shape[0] * shape[1] * weights_kept(tokens)
    for one, other in zip(ours, with_gradients(expected, (query, key, value)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_operator_keeps_torchs_rules():
    """Fake tensors, schema and autograd agree with what it does: what `torch.compile` relies on."""
    inputs = draw(2, 2, 5, 4)
    mask = torch.ones(2, 1, 5, 5).tril().bool()
    torch.library.opcheck(blocked_attention.blocked_attention, (*inputs, None))
    torch.library.opcheck(blocked_attention.blocked_attention, (*inputs, mask))


def test_a_query_that_may_look_nowhere_spoils_nothing():
    query, key, value = draw(1, 2, 6, 4)
    mask = torch.ones(6, 6).tril().bool()[None, None].clone()
    mask[..., :2] = False  # padding on the left
    output, _ = blocked_attention.blocked_attention(query, key, value, mask)
    gradients = torch.autograd.grad(output[:, :, 2:].sum(), (query, key, value))
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    assert not gradients[2][:, :, :2].any()


def test_half_of_the_weights_are_not_even_computed():
    assert weights_kept(1024) == 256 * (256 + 512 + 768 + 1024)  # 62% of the square
    assert weights_kept(100) == 100 * 100


def tiny(kind, **overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0)
        )
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return ScratchGPTForCausalLM(
        ScratchGPTConfig(**sizes, head_dim=8, bos_token_id=None, eos_token_id=None, **overrides)
    )


SLIDING = {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(("kind", "overrides"), [("ours", {}), ("ours", SLIDING), ("llama", {}), ("gpt2", {})])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_trains_to_the_same_gradients(kind, overrides, packed, monkeypatch):
    monkeypatch.setattr(blocked_attention, "block_size", lambda tokens: 8)
    model = tiny(kind, **overrides).eval()  # no dropout
    ids = torch.arange(60).view(3, 20) % 50
    positions = torch.cat([torch.arange(9), torch.arange(11)]).expand(3, 20) if packed else None
    gradients = []
    for implementation in ("sdpa", IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_it_is_used_in_training_and_left_aside_where_it_does_not_serve(monkeypatch):
    calls = []
    monkeypatch.setattr(
        blocked_attention,
        "blocked_attention",
        lambda *inputs: calls.append(inputs[0].shape) or (torch.zeros_like(inputs[0]), None),
    )
    model = tiny("ours").train()
    model.set_attn_implementation(IMPLEMENTATION)
    ids = torch.arange(10)[None]
    model(input_ids=ids)
    assert len(calls) == 2
    with torch.no_grad():
        model(input_ids=ids)
    model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert len(calls) == 2


def test_dropout_falls_to_torchs_kernel(monkeypatch):
    monkeypatch.setattr(blocked_attention, "blocked_attention", lambda *inputs: pytest.fail("it knows no dropout"))
    model = tiny("ours", attention_dropout=0.1).train()
    model.set_attn_implementation(IMPLEMENTATION)
    model(input_ids=torch.arange(10)[None]).logits.sum().backward()


def test_the_choice_is_not_saved(tmp_path):
    model = tiny("ours")
    model.set_attn_implementation(IMPLEMENTATION)
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert ScratchGPTForCausalLM.from_pretrained(tmp_path).config._attn_implementation != IMPLEMENTATION
