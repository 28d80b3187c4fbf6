"""What the rest of the stack relies on: packing, caching, padding, losses, checkpointing, compilation, round trips."""

import pytest
import torch
from torch import nn

from hf_scratch_gpt.model import (
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
)
from hf_scratch_gpt.model.cache_name import CACHE_NAME

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_see_each_other(model, use_cache):
    documents = [random_ids(1, length, seed=length) for length in (5, 9, 2, 11)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=use_cache).logits
        apart = torch.cat([model(document).logits for document in documents], dim=1)
        mixed = model(packed).logits
    torch.testing.assert_close(together, apart, **TOLERANCE)
    assert (mixed - apart).abs().max() > 0.01, "the test would not notice documents that attend to each other"


def test_decoding_with_the_cache_equals_one_pass(model):
    input_ids = random_ids(2, 20)
    with torch.no_grad():
        whole = model(input_ids, use_cache=False)
        assert CACHE_NAME not in whole
        output = model(input_ids[:, :7], use_cache=True)
        steps = [output.logits]
        for position in range(7, 20):
            output = model(input_ids[:, position : position + 1], cache=output[CACHE_NAME])
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_sequence(model, side):
    sequence, padding = random_ids(1, 12), torch.zeros(1, 6, dtype=torch.long)
    parts = [padding, sequence] if side == "left" else [sequence, padding]
    marks = [torch.zeros_like(padding), torch.ones_like(sequence)]
    mask = torch.cat(marks if side == "left" else marks[::-1], dim=1)
    with torch.no_grad():
        alone = model(sequence).logits
        padded = model(torch.cat(parts, dim=1), attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], alone[0], **TOLERANCE)


def test_generation_is_the_same_with_cache_without_and_padded_on_the_left(model):
    prompt = random_ids(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(prompt, **settings)[0, 6:]
    assert torch.equal(model.generate(prompt, use_cache=False, **settings)[0, 6:], alone)
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1), random_ids(1, 10, seed=3)])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    assert torch.equal(model.generate(batch, attention_mask=mask, **settings)[0, 10:], alone)
    sampled = model.generate(prompt, max_new_tokens=8, do_sample=True, pad_token_id=0)
    assert sampled.shape == (1, 14)


def test_attention_implementations_agree_and_eager_gives_weights(model):
    input_ids = random_ids(2, 16)
    with torch.no_grad():
        expected = model(input_ids).logits
        model.set_attn_implementation("eager")
        output = model(input_ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected, **TOLERANCE)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 16))
    assert (output.attentions[0].triu(1) == 0).all(), "a token saw the future"


def test_sliding_layers_see_only_their_window(model_factory):
    model = model_factory("sliding", attn_implementation="eager")
    with torch.no_grad():
        full, sliding = model(random_ids(1, 12), output_attentions=True).attentions
    visible = torch.ones(12, 12).tril().bool()
    assert (full[0, 0] > 0).equal(visible)
    assert (sliding[0, 0] > 0).equal(visible & ~visible.tril(-4))


def test_loss_is_cross_entropy_of_the_next_token_divided_by_the_items(model):
    input_ids = random_ids(2, 10)
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    losses = [
        -log_probabilities[row, column - 1, labels[row, column]]
        for row in range(2)
        for column in range(1, 10)
        if labels[row, column] >= 0
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    over_seven = model(input_ids, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(over_seven, torch.stack(losses).sum() / 7)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep_gives_the_same_logits_for_fewer_positions(model, keep):
    with torch.no_grad():
        whole, kept = model(random_ids(2, 8)).logits, model(random_ids(2, 8), logits_to_keep=keep).logits
    torch.testing.assert_close(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep], **TOLERANCE)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    model.train()
    input_ids = random_ids(2, 12)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.gradient_checkpointing_enable()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TOLERANCE)


@pytest.mark.parametrize("kind", ["modern", "gpt2"])
def test_forward_is_one_graph(model_factory, kind):
    """`backend="eager"` traces as any compiler would, without the minutes of code generation."""
    torch.compiler.reset()
    model = model_factory(kind)
    input_ids = random_ids(2, 12)
    positions = torch.arange(6).repeat(2)[None].expand(2, -1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for inputs in ({}, {"position_ids": positions}):
        expected = model(input_ids, labels=input_ids, use_cache=False, **inputs)
        actual = compiled(input_ids, labels=input_ids, use_cache=False, **inputs)
        torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE)
    model.train()
    compiled(input_ids, labels=input_ids, use_cache=False).loss.backward()


def test_bf16_autocast_stays_close_and_keeps_an_fp32_residual(model):
    input_ids = random_ids(2, 12)
    with torch.no_grad():
        expected = model(input_ids, labels=input_ids).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(input_ids, labels=input_ids).loss
    assert actual.dtype == torch.float32
    assert abs(actual - expected) < 0.05


def test_save_and_load_keep_every_parameter_and_buffer(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        before, after = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_initial_weights_are_smaller_into_the_residual_stream(model_factory):
    config = model_factory(hidden_size=128, intermediate_size=512, num_hidden_layers=8).config
    layer = ScratchGPTForCausalLM(config).model.layers[3]
    for linear, expected in {
        layer.self_attn.q_proj: 0.02,
        layer.mlp.up_proj: 0.02,
        layer.self_attn.o_proj: 0.02 / 4,
        layer.mlp.down_proj: 0.02 / 4,
    }.items():
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_dropout_modules_are_all_that_makes_training_random(model_factory):
    model = model_factory("gpt2", hidden_dropout=0.1, attention_dropout=0.1).train()
    input_ids = random_ids(2, 12)
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_longer_than_the_learned_positions_is_refused_with_both_lengths(model_factory):
    model = model_factory("gpt2")
    with pytest.raises(ValueError, match="65 tokens are more than the 64 learned positions"):
        model(random_ids(1, 65))
    past = model(random_ids(1, 64), use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="65 tokens are more than the 64 learned positions"):
        model(random_ids(1, 1), cache=past)


def test_a_packed_row_may_be_longer_than_the_learned_positions(model_factory):
    model, documents = model_factory("gpt2"), [random_ids(1, 40), random_ids(1, 33)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@pytest.mark.parametrize("head", [ScratchGPTForSequenceClassification, ScratchGPTForTokenClassification])
def test_classifiers_take_a_language_models_trunk_and_ignore_padding(model, head, tmp_path):
    model.save_pretrained(tmp_path)
    classifier = head.from_pretrained(tmp_path, num_labels=3, pad_token_id=0).eval()
    assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)
    sequence = random_ids(1, 9).clamp(min=1)
    padded = torch.cat([sequence, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    with torch.no_grad():
        alone = classifier(sequence).logits
        beside = classifier(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(beside[:, :9] if beside.ndim == 3 else beside, alone, **TOLERANCE)
    per_token = head is ScratchGPTForTokenClassification
    labels = torch.zeros(1, 9, dtype=torch.long) if per_token else torch.tensor([2])
    classifier(sequence, labels=labels).loss.backward()
    assert classifier.score.weight.grad.abs().sum() > 0
