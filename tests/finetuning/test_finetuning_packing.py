"""Packed rows are what their examples are alone, in every architecture that can do so, and others are not packed."""

import json

import pytest
import torch
from datasets import Dataset
from finetuning_tiny import make_base, make_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hf_scratch_gpt.finetuning import sft
from hf_scratch_gpt.finetuning.packing import PackedCollator, keeps_documents_apart, pack, padding_share
from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.model.blocked_attention import IMPLEMENTATION
from hf_scratch_gpt.runs import parse_arguments, read_metrics

VOCABULARY = 320
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
OURS = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 96}


def learned(**changes):
    norms = {"norm_type": "layer_norm", "mlp_type": "dense", "use_qk_norm": False, "hidden_act": "gelu"}
    return ScratchGPTConfig(**{**OURS, **norms, "position_embedding_type": "learned", **changes})


MODELS = {
    "rotary": lambda: ScratchGPTForCausalLM(ScratchGPTConfig(**OURS)),
    "learned": lambda: ScratchGPTForCausalLM(learned()),
    "banded": lambda: ScratchGPTForCausalLM(
        learned(layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=96, attn_pdrop=0.0, embd_pdrop=0.0
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=96)
    ),
}


def make_model(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():  # far from the first weights, at which attention hardly matters
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def make_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        trained = max(1, length // 2)
        rows.append({"input_ids": ids, "labels": [-100] * (length - trained) + ids[-trained:], "length": length})
    return Dataset.from_list(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40), st.integers(0, 3))
def test_each_example_is_in_one_row_whole_with_its_labels(lengths, window, seed):
    examples = make_examples(lengths)
    rows = pack(examples, window, seed)
    assert rows.to_list() == pack(examples, window, seed).to_list()
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) == row["length"] <= window
        at = 0
        for length in row["seq_lengths"]:
            labels = row["labels"][at : at + length]
            assert labels[0] == -100
            found.append((row["input_ids"][at : at + length], labels[1:]))
            at += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"][1:]) for row in examples)
    # No row could have been done without by putting two of them together (best fit opens no window it need not).
    emptiest = sorted(row["length"] for row in rows)[:2]
    assert len(rows) == 1 or sum(emptiest) > window


def test_the_batch_of_two_rows_by_hand():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [4, 3], "labels": [-100, 3]},  # a single example, as of held-out data
    ]
    batch = PackedCollator(pad_token_id=1, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1], [4, 3, 1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9] + [-100] * 3, [-100, 3] + [-100] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert "attention_mask" not in batch  # with one, documents would see each other
    assert padding_share(Dataset.from_dict({"length": [5, 2]})) == pytest.approx(0.3)


@pytest.mark.parametrize("attention", ["eager", "sdpa", IMPLEMENTATION])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_of_packed_rows_are_those_of_each_example_alone(name, attention):
    model = make_model(name)
    model.set_attn_implementation(attention)
    examples = make_examples([9, 4, 7, 11, 3, 5, 8])
    packed_rows = pack(examples, window=20, seed=0)
    batch = PackedCollator(pad_token_id=1)(list(packed_rows))
    assert len(batch["input_ids"]) < len(examples)
    trained = (batch["labels"] != -100).sum()
    output = model(**batch, use_cache=False, num_items_in_batch=trained)
    output.loss.backward()
    gradients = {key: weight.grad.clone() for key, weight in model.named_parameters()}
    model.zero_grad()

    total, count = 0.0, 0
    for number, row in enumerate(packed_rows):
        at = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][at : at + length]])
            labels = torch.tensor([row["labels"][at : at + length]])
            alone = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(output.logits[number, at : at + length], alone[0], rtol=1e-4, atol=1e-4)
            loss = torch.nn.functional.cross_entropy(alone[0, :-1], labels[0, 1:], reduction="sum")
            (loss / trained).backward()
            total, count, at = total + loss.item(), count + int((labels[0, 1:] != -100).sum()), at + length
    assert count == trained
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    for key, weight in model.named_parameters():
        torch.testing.assert_close(gradients[key], weight.grad, rtol=1e-4, atol=1e-5 * float(weight.grad.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_the_measured_check_knows_models_that_keep_documents_apart(name):
    assert keeps_documents_apart(make_model(name))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4))


def without_packed_masks():
    """A model that is given an all-ones mask on the way, as by a wrapper that means well."""
    model = make_model("rotary")
    forward = model.model.forward

    def masked(input_ids, position_ids=None, **options):
        return forward(input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids, **options)

    model.model.forward = masked
    return model


def of_one_row_only():
    """A model that keeps documents apart in the first row alone."""
    model = make_model("rotary")
    forward = model.model.forward

    def first_only(input_ids, position_ids=None, **options):
        positions = position_ids.clone()
        positions[1:] = torch.arange(positions.shape[1])
        return forward(input_ids, position_ids=positions if len(positions) > 1 else position_ids, **options)

    model.model.forward = first_only
    return model


@pytest.mark.parametrize("make", [bloom, mamba, without_packed_masks, of_one_row_only])
def test_the_measured_check_knows_models_that_do_not(make):
    assert not keeps_documents_apart(make())


def tune(base, data, folder, **changes):
    values = {
        **{"model_name_or_path": str(base), "dataset": data, "output_dir": str(folder), "bf16": False},
        **{"max_steps": 3, "learning_rate": 0.01, "heldout_fraction": 0.2, "lora_r": 4, **changes},
    }
    folder.with_suffix(".yaml").write_text(json.dumps(values))
    return sft.run(parse_arguments(sft.Arguments, [str(folder.with_suffix(".yaml"))]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(40))


@pytest.mark.parametrize(("method", "accumulated"), [("none", 1), ("lora", 1), ("none", 2)])
def test_a_step_on_all_packed_rows_is_the_step_on_all_examples(base, data, tmp_path, method, accumulated):
    """One step of plain gradient descent on the whole data set, by both kinds of rows, also in uneven parts."""
    common = {"peft": method, "max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    common["heldout_fraction"] = 0
    packed = tune(
        base, data, tmp_path / "packed", per_device_train_batch_size=10, gradient_accumulation_steps=2, **common
    )
    told = read_metrics(packed)["metrics"]
    assert told["packing"]
    assert 8 < told["windows"] <= 20
    rows = 40 // accumulated
    single = tune(
        base,
        data,
        tmp_path / "single",
        packing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        **common,
    )
    assert not read_metrics(single)["metrics"]["packing"]
    first, second = (load_file(folder / "model.safetensors") for folder in (packed, single))
    before = load_file(base / "model.safetensors")
    for name in first:
        moved = (first[name] - before[name]).abs().max().item()
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6 + 1e-4 * moved)
    assert any((first[name] != before[name]).any() for name in first)
    assert read_metrics(packed)["metrics"]["tokens"] == read_metrics(single)["metrics"]["tokens"]


def test_a_model_that_cannot_keep_examples_apart_trains_unpacked_after_one_warning(base, data, tmp_path, caplog):
    folder = tmp_path / "bloom"
    torch.manual_seed(0)
    model = bloom()
    model.config.max_position_embeddings = 96
    for saved in (model, AutoTokenizer.from_pretrained(base)):
        saved.save_pretrained(folder)
    tuned = tune(folder, data, tmp_path / "tuned", peft="none", per_device_train_batch_size=4)
    assert [record.message for record in caplog.records if "packed" in record.message] == [
        f"{folder}: packed examples would see each other in this model, so rows are single examples (packing: false)"
    ]
    metrics = read_metrics(tuned)["metrics"]
    assert metrics["packing"] is False
    assert "windows" not in metrics


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_architectures_train_packed(base, data, tmp_path, name, caplog):
    folder = tmp_path / name
    tokenizer = AutoTokenizer.from_pretrained(base)
    for saved in (make_model(name), tokenizer):
        saved.save_pretrained(folder)
    tuned = tune(folder, data, tmp_path / "tuned", max_steps=12, per_device_train_batch_size=4)
    assert read_metrics(tuned)["metrics"]["packing"]
    assert not [record for record in caplog.records if "packed" in record.message]
    before = sft.measure_heldout(
        AutoModelForCausalLM.from_pretrained(folder), _heldout(tuned), tokenizer.pad_token_id, 4
    )
    assert read_metrics(tuned)["metrics"]["heldout_loss"] < 0.97 * before["heldout_loss"]


def _heldout(tuned):
    arguments = parse_arguments(sft.Arguments, [str(tuned.with_suffix(".yaml"))])
    encode = sft.conversation_encoder(AutoTokenizer.from_pretrained(tuned))
    return sft.load_examples(arguments, "conversations", encode, 96).heldout
