"""The ways to train on a CPU compute what the plain ways do, and leave nothing behind in the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, cpu_training
from hf_scratch_gpt.model.cpu_training import TrainedForward, document_mask, rotary_angles, weight_gradient

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def tiny(**overrides):
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset("modern-5m", **SIZES, **ends, **overrides))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def random_ids(rows, tokens):
    return torch.randint(300, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def gradients(model, ids, **inputs):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_a_weights_gradient_is_the_product_over_all_tokens(tokens, outputs, inputs, chunk):
    generator = torch.Generator().manual_seed(tokens)
    grad, hidden = (torch.randn(tokens, size, generator=generator) for size in (outputs, inputs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_training, "_CHUNK_ROWS", chunk)
        found = weight_gradient(grad, hidden)
    torch.testing.assert_close(found, grad.T @ hidden, rtol=1e-4, atol=1e-5)


def test_a_weights_gradient_in_bf16_rounds_less_than_the_plain_product():
    generator = torch.Generator().manual_seed(0)
    grad, hidden = (torch.randn(4096 + 7, size, generator=generator).bfloat16() for size in (24, 40))
    exact = grad.double().T @ hidden.double()
    ours, plain = weight_gradient(grad, hidden), grad.T @ hidden
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < (plain - exact).norm()


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_a_model_has_the_same_loss_and_gradients(kind):
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    model = tiny() if kind == "ours" else LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    ids = random_ids(3, 40)
    loss, plain = gradients(model, ids)
    with cpu_training.cpu_training(model):
        wrapped = sum(isinstance(vars(module).get("forward"), TrainedForward) for module in model.modules())
        assert wrapped == 2 * 7  # the head is left alone
        ours_loss, ours = gradients(model, ids)
    torch.testing.assert_close(ours_loss, loss, rtol=1e-3, atol=1e-3)
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() <= 0.02 * gradient.norm(), name
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_outside_bf16_autocast_the_layers_compute_as_before():
    model, ids = tiny(), random_ids(2, 20)
    plain = model(input_ids=ids).logits
    with cpu_training.cpu_training(model):
        assert torch.equal(model(input_ids=ids).logits, plain)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_angles_are_those_of_the_model():
    rotary = tiny().model.rotary_emb
    positions = torch.tensor([[0, 1, 2, 0, 1, 63]])
    for one, other in zip(
        rotary_angles(positions, rotary.inv_freq, 1.0), rotary(torch.zeros(1), positions), strict=True
    ):
        assert torch.equal(one, other)


def test_scaled_angles_stay_with_the_model():
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny(rope_parameters=scaled)
    with cpu_training.cpu_training(model):
        assert "forward" not in vars(model.model.rotary_emb)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=6), min_size=1, max_size=3), st.integers(0, 3))
def test_the_mask_is_the_one_that_transformers_makes_of_packed_positions(documents, first):
    length = max(map(sum, documents))
    rows = [[*lengths, length - sum(lengths)] for lengths in documents]
    # A window may begin in the middle of a document.
    positions = torch.tensor(
        [
            [position + first * (number == 0) for number, size in enumerate(row) for position in range(size)]
            for row in rows
        ]
    )
    model = tiny(attn_implementation="sdpa")
    embedded = torch.zeros(*positions.shape, 1)
    expected = create_causal_mask(
        config=model.config, inputs_embeds=embedded, attention_mask=None, past_key_values=None, position_ids=positions
    )
    if expected is None:  # nothing but what lies ahead is hidden
        expected = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(document_mask(positions), expected.expand(len(rows), 1, length, length))


def test_the_operators_keep_torchs_rules():
    """Fake tensors and schema agree with what they do: what `torch.compile` relies on."""
    positions = torch.tensor([[0, 1, 0], [3, 4, 5]])
    torch.library.opcheck(document_mask, (positions,))
    torch.library.opcheck(rotary_angles, (positions, torch.tensor([1.0, 0.1]), 1.0))
