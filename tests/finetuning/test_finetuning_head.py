"""SFT's chunked head and loss give TRL's own losses, gradients and metrics, in every way of training."""

import copy
import json

import datasets
import pytest
import torch
from finetuning_tiny import make_base, make_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from hf_scratch_gpt.finetuning import _compat, sft
from hf_scratch_gpt.finetuning.arguments import make_lora_config, trainer_arguments
from hf_scratch_gpt.model import linear_cross_entropy as head
from hf_scratch_gpt.model.linear_cross_entropy import LossStatistics, linear_cross_entropy
from hf_scratch_gpt.runs import StageRun, read_metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def examples(base):
    encode = sft.conversation_encoder(AutoTokenizer.from_pretrained(base))
    return datasets.Dataset.from_list([encode(row) for row in make_rows(24)])


def make_trainer(kind, base, folder, examples, change=lambda model: model, **settings):
    settings = {"peft": "none", "bf16": False, "max_steps": 3, "per_device_train_batch_size": 4, **settings}
    arguments = sft.SFTArguments(
        output_dir=str(folder), logging_steps=1, save_strategy="no", learning_rate=1e-3, disable_tqdm=True, **settings
    )
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    model = change(AutoModelForCausalLM.from_pretrained(base))
    trainer = kind(
        model=model,
        args=trainer_arguments(arguments, StageRun(arguments, "sft"), 96),
        train_dataset=examples,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
    )
    if kind is SFTTrainer:
        _compat.let_head_have_no_bias(trainer.model)
    return trainer


class InOrder(sft.ConversationTrainer):
    """Ours, on the examples in the order that TRL's takes them."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset)


class TRLInOrder(SFTTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset)


def test_a_batch_has_a_row_an_example_whatever_packing_says(base, examples, tmp_path):
    trainer = make_trainer(InOrder, base, tmp_path, examples, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    longest = max(examples["length"][:4])
    assert tuple(batch["input_ids"].shape) == (4, longest)


def logged(trainer):
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def untie(model):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def cap(model):
    model.config.final_logit_softcapping = 0.5
    return model


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda model: model, {}),
        (lambda model: model, {"gradient_accumulation_steps": 3, "max_steps": 2}),
        (lambda model: model, {"peft": "lora", "lora_r": 4}),
        (cap, {}),
        (untie, {"peft": "lora", "lora_r": 4, "lora_modules_to_save": ["lm_head"]}),
        (lambda model: model, {"gradient_checkpointing": True}),
        (lambda model: model, {"label_smoothing_factor": 0.1}),  # its loss stays TRL's, the metrics are ours
    ],
    ids=["full", "accumulated", "lora", "capped", "lora-with-head", "checkpointed", "smoothed"],
)
def test_training_is_that_with_trls_own_head(base, examples, tmp_path, monkeypatch, change, settings):
    calls = []
    monkeypatch.setattr(
        _compat,
        "linear_cross_entropy",
        lambda *args, **options: calls.append(1) or linear_cross_entropy(*args, **options),
    )
    found = []
    for kind in (InOrder, TRLInOrder):
        trainer = make_trainer(kind, base, tmp_path / kind.__name__, examples, change, **settings)
        trainer.train()
        weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        found.append((logged(trainer), weights))
    (ours, our_weights), (theirs, their_weights) = found
    assert len(calls) == 3 * settings.get("gradient_accumulation_steps", 1) - (settings.get("max_steps") == 2) * 3
    assert torch.tensor(ours).allclose(torch.tensor(theirs), rtol=1e-5, atol=1e-6)
    assert our_weights.keys() == their_weights.keys()
    for name in our_weights:  # Adam's first steps are as long for the smallest gradient as for the largest
        torch.testing.assert_close(our_weights[name], their_weights[name], rtol=0, atol=2e-4)


def test_one_batch_has_the_same_loss_and_gradients_to_the_last_digits(base, examples, tmp_path):
    results = []
    for kind in (InOrder, TRLInOrder):
        trainer = make_trainer(kind, base, tmp_path / kind.__name__, examples)
        batch = trainer.data_collator([examples[row] for row in range(6)])
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(77))
        loss.backward()
        results.append((loss, {name: weight.grad for name, weight in trainer.model.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for name in our_gradients:
        torch.testing.assert_close(our_gradients[name], their_gradients[name], rtol=1e-4, atol=1e-7)


def test_packed_documents_are_kept_apart_as_by_trl(base, tmp_path, examples):
    """Two documents in a row of their own positions have the loss that they have row by row."""
    trainer = make_trainer(InOrder, base, tmp_path / "run", examples)
    first, second = examples[0], examples[5]
    ids = torch.tensor([first["input_ids"] + second["input_ids"]])
    labels = torch.tensor([first["labels"] + [-100] + second["labels"][1:]])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in (first, second)])[None]
    packed = trainer.compute_loss(
        trainer.model, {"input_ids": ids, "labels": labels, "position_ids": positions}, num_items_in_batch=1
    )
    alone = 0
    for row in (first, second):
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        alone += trainer.compute_loss(
            trainer.model, {**inputs, "attention_mask": torch.ones_like(inputs["labels"])}, num_items_in_batch=1
        )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)


def test_a_part_of_the_batch_without_targets_costs_nothing_and_breaks_nothing(base, examples, tmp_path):
    trainer = make_trainer(InOrder, base, tmp_path / "run", examples)
    batch = trainer.data_collator([examples[row] for row in range(2)])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in trainer.model.parameters())


def test_what_is_no_sum_of_log_probabilities_is_left_to_trl(base, examples, tmp_path):
    def scale(model):
        model.config.logit_scale = 2.0
        return model

    for name, change, settings in (("dft", lambda model: model, {"loss_type": "dft"}), ("scaled", scale, {})):
        losses = []
        for kind in (InOrder, TRLInOrder):
            trainer = make_trainer(kind, base, tmp_path / f"{kind.__name__}-{name}", examples, change, **settings)
            batch = trainer.data_collator([examples[row] for row in range(3)])
            losses.append(trainer.compute_loss(trainer.model, batch))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_head_trained_beside_adapters_is_saved_and_changed(base, tmp_path):
    untied = untie(AutoModelForCausalLM.from_pretrained(base))
    folder = tmp_path / "untied"
    untied.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    settings = {"peft": "lora", "lora_r": 4, "bf16": False, "max_steps": 2, "heldout_fraction": 0.2}
    arguments = sft.SFTArguments(
        model_name_or_path=str(folder),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(20)),
        output_dir=str(tmp_path / "tuned"),
        lora_modules_to_save=["lm_head"],
        **settings,
    )
    tuned = AutoModelForCausalLM.from_pretrained(sft.run(arguments))
    assert not torch.equal(tuned.lm_head.weight, untied.lm_head.weight)
    arguments = copy.copy(arguments)
    arguments.model_name_or_path, arguments.output_dir = str(base), str(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"'lora_modules_to_save': 'lm_head'.*tied"):
        sft.run(arguments)


def test_the_stage_says_how_it_was_set_up(base, tmp_path, capsys):
    arguments = sft.SFTArguments(
        model_name_or_path=str(base),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(20)),
        output_dir=str(tmp_path / "tuned"),
        bf16=False,
        max_steps=1,
    )
    setup = read_metrics(sft.run(arguments))["setup"]
    assert (setup["precision"], setup["device"], setup["compiled"]) == ("fp32", "cpu", False)
    assert setup["threads"] == torch.get_num_threads()
    assert "sft: set up: " in capsys.readouterr().out
    assert json.loads((tmp_path / "tuned" / "metrics.json").read_text())["setup"] == setup


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_with_and_without_fusion_agree_and_so_do_the_statistics(monkeypatch, softcap, dtype):
    torch.manual_seed(1)
    logits = (4 * torch.randn(7, 50)).to(dtype)
    targets = torch.randint(50, (7,))
    targets[2] = -100
    statistics = LossStatistics()
    expected = head._chunk(logits.clone(), targets, 1e-2, softcap, True)
    found = head._eager_chunk(logits.clone(), targets, 1e-2, softcap, True, statistics)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    plain = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    kept = plain[targets != -100]
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=kept).entropy().sum())
    assert statistics.correct == (kept.argmax(-1) == targets[targets != -100]).sum()


def test_nothing_is_kept_for_gradients_where_none_are_wanted(monkeypatch):
    wanted = []
    chunk = head._eager_chunk

    def note(logits, targets, z_loss, softcap, wants_grad, statistics):
        wanted.append(wants_grad)
        return chunk(logits, targets, z_loss, softcap, wants_grad, statistics)

    monkeypatch.setattr(head, "_eager_chunk", note)
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([0, 1, 4])
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    linear_cross_entropy(hidden, weight.detach(), targets)
    assert wanted == [False, False, True]


def test_gradients_are_not_given_out_twice():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 4]))
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
