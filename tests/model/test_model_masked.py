"""The bidirectional relative: sees both ways, nothing across documents or padding, shares weights with the rest."""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments, pipeline

import hf_scratch_gpt.model.modeling_scratch_gpt as modeling
from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForMaskedLM, ScratchGPTTokenizer, encode_text
from hf_scratch_gpt.model.cache_name import CACHE_NAME

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def masked_factory(model_factory):
    """The masked model with the weights of the causal one of the same kind."""

    def make(kind: str = "modern", **overrides) -> ScratchGPTForMaskedLM:
        causal = model_factory(kind, **overrides)
        masked = ScratchGPTForMaskedLM(causal.config).eval()
        masked.load_state_dict(causal.state_dict())
        return masked

    return make


@pytest.fixture(params=["modern", "gpt2", "gpt1", "sliding"])
def masked(request, masked_factory):
    return masked_factory(request.param)


def packed_documents(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three documents in one row, told apart by their positions; and of each alone."""
    documents = [random_ids(1, length, seed=length) for length in (7, 4, 9)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        together = model(torch.cat(documents, dim=1), position_ids=positions).logits
        apart = torch.cat([model(document).logits for document in documents], dim=1)
    return together, apart


def test_every_token_sees_both_ways(masked):
    input_ids = random_ids(1, 6)
    changed = input_ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 128
    with torch.no_grad():
        difference = (masked(input_ids).logits - masked(changed).logits).abs().amax(-1)[0]
    assert (difference > 1e-4).all()


def test_attention_has_the_window_to_both_sides(masked_factory):
    model = masked_factory("sliding", attn_implementation="eager")
    with torch.no_grad():
        full, sliding = model(random_ids(1, 12), output_attentions=True).attentions
    distance = (torch.arange(12)[:, None] - torch.arange(12)[None]).abs()
    assert (full[0, 0] > 0).all()
    assert (sliding[0, 0] > 0).equal(distance < 4)


def test_packed_documents_do_not_see_each_other(masked):
    together, apart = packed_documents(masked)
    torch.testing.assert_close(together, apart, **TOLERANCE)


def test_the_packing_test_notices_documents_that_mix(masked_factory, monkeypatch):
    monkeypatch.setattr(modeling, "find_packed_sequence_indices", lambda position_ids: None)
    together, apart = packed_documents(masked_factory())
    assert (together - apart).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_sequence(masked, side):
    sequence, padding = random_ids(1, 12), random_ids(1, 6, seed=1)
    parts, marks = [padding, sequence], [torch.zeros(1, 6), torch.ones(1, 12)]
    if side == "right":
        parts, marks = parts[::-1], marks[::-1]
    mask = torch.cat(marks, dim=1).long()
    with torch.no_grad():
        alone, padded = masked(sequence).logits, masked(torch.cat(parts, dim=1), attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], alone[0], **TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_eager_and_sdpa_agree(masked, packed):
    inputs = {"position_ids": torch.arange(6).repeat(2)[None].expand(2, -1)} if packed else {}
    with torch.no_grad():
        expected = masked(random_ids(2, 12), **inputs).logits
        masked.set_attn_implementation("eager")
        torch.testing.assert_close(masked(random_ids(2, 12), **inputs).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["modern", "sliding"])
def test_forward_is_one_graph_that_is_traced_once(masked_factory, kind):
    torch.compiler.reset()
    model = masked_factory(kind)
    positions = torch.arange(6).repeat(2)[None].expand(2, -1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        expected = model(random_ids(2, 12, seed), position_ids=positions).logits
        actual = compiled(random_ids(2, 12, seed), position_ids=positions).logits
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_loss_is_of_the_labelled_tokens_themselves_divided_by_the_items(masked):
    input_ids = random_ids(2, 10)
    labels = torch.full_like(input_ids, -100)
    labels[0, 2], labels[1, 9] = 5, 7
    output = masked(input_ids, labels=labels)
    chosen = -output.logits.log_softmax(-1)[[0, 1], [2, 9], [5, 7]]
    torch.testing.assert_close(output.loss, chosen.mean())
    torch.testing.assert_close(masked(input_ids, labels=labels, num_items_in_batch=8).loss, chosen.sum() / 8)


def test_trainer_gives_the_same_gradient_whole_and_accumulated(masked_factory, tmp_path):
    rows = []
    for row, count in zip(random_ids(4, 8), (1, 5, 2, 8), strict=True):
        rows.append({"input_ids": row, "labels": torch.where(torch.arange(8) < count, row, -100)})
    weights = []
    for size, parts in ((4, 1), (1, 4)):
        model = masked_factory()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        settings |= {"learning_rate": 0.1, "optim": "sgd", "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train()
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


def test_there_is_no_cache(masked):
    assert not masked.can_generate()
    trunk = masked.model(random_ids(1, 5), use_cache=True)
    assert CACHE_NAME not in trunk
    for call, name in itertools.product((masked, masked.model), ("cache", "past_key_values")):
        with pytest.raises(ValueError, match="a bidirectional model has none"):
            call(random_ids(1, 5), **{name: modeling.DynamicCache()})


def test_the_head_is_tied_and_a_class_does_not_change_anothers_config(model_factory):
    causal = model_factory()
    before = causal(random_ids(1, 8)).logits
    masked = ScratchGPTForMaskedLM(causal.config)
    assert (causal.config.is_causal, masked.config.is_causal, masked.model.config.is_causal) == (True, False, False)
    assert masked.lm_head.weight is masked.model.embed_tokens.weight
    torch.testing.assert_close(causal(random_ids(1, 8)).logits, before)


def test_causal_and_masked_checkpoints_load_into_each_other(model_factory, tmp_path):
    causal = model_factory()
    causal.save_pretrained(tmp_path / "causal")
    masked, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert not any(info.values()), info
    assert type(masked) is ScratchGPTForMaskedLM
    masked.save_pretrained(tmp_path / "masked")
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "masked").eval()
        torch.testing.assert_close(loaded(input_ids).logits, masked.eval()(input_ids).logits)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "masked").eval()
        torch.testing.assert_close(back(input_ids, use_cache=False).logits, causal(input_ids).logits)
        # The trunk follows the config: what the masked model saw before its head, for embeddings.
        trunk = AutoModel.from_pretrained(tmp_path / "masked").eval()
        expected = masked(input_ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(trunk(input_ids).last_hidden_state, expected)


def test_gradient_checkpointing_gives_the_same_gradients(masked_factory):
    model, input_ids, gradients = masked_factory().train(), random_ids(2, 12), []
    for _ in range(2):
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_the_equivalent_qwen3_encoder_gives_the_same_hidden_states(masked_factory):
    """transformers' Qwen3 with `is_causal=False` is somebody else's bidirectional trunk of the same maths."""
    from transformers import Qwen3Config, Qwen3Model

    model = masked_factory()
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    settings = {name: getattr(model.config, name) for name in (*names.split(), "rope_parameters", "rms_norm_eps")}
    other = Qwen3Model(Qwen3Config(**settings)).eval()
    other.config.is_causal = False
    other.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        ours = model.model(random_ids(2, 12)).last_hidden_state
        theirs = other(random_ids(2, 12), use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.fixture(scope="module")
def mask_tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(["the list of names and a <|mask|> that returns each value"] * 9, 300, True)


def test_a_mask_token_changes_no_other_control_token_and_is_there_only_if_asked_for(mask_tokenizer):
    plain = ScratchGPTTokenizer.train(["the list of names and a <|mask|> that returns each value"] * 9, 300)
    assert plain.mask_token is None
    added = mask_tokenizer.get_added_vocab()
    assert added.pop("<|mask|>") == mask_tokenizer.mask_token_id == 6
    assert added == plain.get_added_vocab()
    assert "<|mask|>" not in plain.get_vocab()


def test_user_text_never_becomes_the_mask(mask_tokenizer):
    text = "fill <|mask|> in"
    assert mask_tokenizer.mask_token_id not in encode_text(mask_tokenizer, text)
    assert mask_tokenizer.decode(encode_text(mask_tokenizer, text)) == text
    assert mask_tokenizer.mask_token_id in mask_tokenizer(text).input_ids


def test_fill_mask_fills_the_word_with_its_space(mask_tokenizer, tmp_path):
    config = ScratchGPTConfig.from_preset(
        "modern-5m", vocab_size=len(mask_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )
    torch.manual_seed(0)
    model = ScratchGPTForMaskedLM(config)
    target = encode_text(mask_tokenizer, "a list of names")
    masked_ids = mask_tokenizer("a list<|mask|> names", return_tensors="pt").input_ids
    spaced = mask_tokenizer("a list <|mask|> names", return_tensors="pt").input_ids
    assert torch.equal(masked_ids, spaced)
    (position,) = (masked_ids[0] == mask_tokenizer.mask_token_id).nonzero().flatten().tolist()
    labels = torch.full_like(masked_ids, -100)
    labels[0, position] = target[position]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(masked_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    mask_tokenizer.save_pretrained(tmp_path)
    best = pipeline("fill-mask", model=str(tmp_path))("a list <|mask|> names")[0]
    assert (best["token"], best["score"] > 0.5) == (target[position], True)
    assert best["sequence"] == mask_tokenizer.decode(
        masked_ids[0].where(masked_ids[0] != mask_tokenizer.mask_token_id, torch.tensor(target[position]))
    )


def test_a_classifier_over_a_bidirectional_trunk_follows_the_config(masked_factory):
    from hf_scratch_gpt.model import ScratchGPTForSequenceClassification

    config = masked_factory().config
    config.num_labels, config.pad_token_id = 2, 0
    classifier = ScratchGPTForSequenceClassification(config).eval()
    assert isinstance(classifier.score, nn.Linear)
    assert not classifier.model.layers[0].self_attn.is_causal
