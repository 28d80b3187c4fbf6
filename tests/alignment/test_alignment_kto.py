"""KTO: the loss by hand, the pairs of its KL term, labels of every kind, and what is measured of it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relatives_tiny import arguments_of, make_inputs, make_pairs, make_rows, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment import kto
from hf_scratch_gpt.evaluation.likelihood import answer_log_probabilities
from hf_scratch_gpt.runs import read_metrics


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def align(inputs, output, **changed):
    settings = {
        "model_name_or_path": inputs / "sft",
        "dataset": inputs / "prepare",
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "bf16": False,
        **changed,
    }
    return kto.run(arguments_of(kto, **settings))


def labelled(count=24):
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in make_pairs(count)
        for side in ("chosen", "rejected")
    ]


def blue(before=""):
    return [{"role": "assistant", "content": f"{before}blue"}]


# ---- The KL term's pairs


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_every_answer_stands_in_once_and_never_for_its_own_prompt_where_that_can_be(numbers):
    prompts = [[number] for number in numbers]
    others, size = kto.pair_up(prompts), len(prompts)
    assert sorted(others) == list(range(size))
    own = sum(prompts[row] == prompts[other] for row, other in enumerate(others))
    shifts = [sum(prompts[row] == prompts[(row + shift) % size] for row in range(size)) for shift in range(1, size)]
    assert own == min(shifts, default=1)


def test_both_answers_of_a_pair_side_by_side_get_other_prompts():
    prompts = [[number // 2] for number in range(8)]
    assert all(prompts[row] != prompts[other] for row, other in enumerate(kto.pair_up(prompts)))


# ---- The loss


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_the_loss_is_the_papers_equation_by_hand(inputs, tmp_path, weights, monkeypatch):
    """Policy and reference differ; log-probabilities by the evaluation's own code, one row at a time."""
    compared = []
    compute = kto.UnpairedKTOTrainer.compute_loss

    def compare(self, model, batch, *args, **kwargs):
        if not compared:
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if "norm" in name:
                        value.mul_(1.3)
            compared.append((batch, compute(self, model, batch).item(), by_hand(self, model, batch, weights)))
        return compute(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(kto.UnpairedKTOTrainer, "compute_loss", compare)
    names = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    align(inputs, tmp_path / "run", peft="none", max_steps=1, beta=0.3, balance_labels=False, **names)
    ((batch, found, expected),) = compared
    assert 0 < sum(batch["label"].tolist()) < len(batch["label"])
    assert found == pytest.approx(expected, rel=1e-4)


def by_hand(trainer, policy, batch, weights):
    reference = AutoModelForCausalLM.from_pretrained(trainer.model.config.name_or_path)

    def log_ratios(prefix):
        rows = []
        for ids, mask, answer in zip(
            *(batch[prefix + name].tolist() for name in ("input_ids", "attention_mask", "completion_mask")),
            strict=True,
        ):
            start, length = answer.index(1), sum(mask)
            rows.append((ids[:start], ids[start:length]))
        ours, theirs = (answer_log_probabilities(model, rows, 1) for model in (policy, reference))
        return [mine - other for mine, other in zip(ours, theirs, strict=True)]

    kl = max(0.0, sum(log_ratios("KL_")) / len(batch["label"]))

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    losses = [
        weights[0] * (1 - sigmoid(0.3 * (ratio - kl))) if good else weights[1] * (1 - sigmoid(0.3 * (kl - ratio)))
        for ratio, good in zip(log_ratios(""), batch["label"].tolist(), strict=True)
    ]
    return sum(losses) / len(losses)


def test_the_label_with_fewer_answers_weighs_as_much_as_the_other():
    class Settings:
        dataset, balance_labels, desirable_weight, undesirable_weight = "data", True, 1.0, 1.0

    assert kto.label_weights(Settings, 10, 10) == (1.0, 1.0)
    assert kto.label_weights(Settings, 10, 40) == (4.0, 1.0)
    assert kto.label_weights(Settings, 30, 10) == (1.0, 3.0)
    Settings.undesirable_weight = 2.0
    assert kto.label_weights(Settings, 10, 40) == (8.0, 2.0)
    Settings.balance_labels = False
    assert kto.label_weights(Settings, 10, 40) == (1.0, 2.0)
    with pytest.raises(ValueError, match="data: 0 desirable and 3 undesirable answers; KTO needs both"):
        kto.label_weights(Settings, 0, 3)


# ---- Whole runs


def test_pairs_are_taken_apart_and_held_out_pairs_come_out_right(inputs, tmp_path):
    pairs = [{**pair, "chosen": blue(), "rejected": blue("not ")} for pair in make_pairs(40)]
    folder = align(inputs, tmp_path / "kto", dataset=write_lines(tmp_path / "p.jsonl", pairs), heldout_fraction=0.2)
    metrics = read_metrics(folder)["metrics"]
    assert (metrics["answers"], metrics["desirable_answers"]) == (64, 32)
    assert (metrics["heldout_pairs"], metrics["heldout_answers"]) == (8, 16)
    assert metrics["preference_accuracy"] >= 0.9
    assert metrics["heldout_label_auc"] > 0.7
    assert metrics["heldout_margin"] == pytest.approx(
        metrics["heldout_desirable_reward"] - metrics["heldout_undesirable_reward"], abs=1e-6
    )
    before, after = (load_file(path / "model.safetensors") for path in (inputs / "sft", folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_answers_with_labels_need_no_pairs_and_may_be_unbalanced(inputs, tmp_path):
    rows = [row for number, row in enumerate(labelled()) if row["label"] or number % 4 == 1]
    path = write_lines(tmp_path / "labelled.jsonl", [{**row, "label": str(row["label"])} for row in rows])
    folder = align(inputs, tmp_path / "kto", dataset=path, heldout_fraction=0.25, max_steps=4)
    metrics = read_metrics(folder)["metrics"]
    bad = metrics["answers"] - metrics["desirable_answers"]
    assert metrics["answers"] + metrics["heldout_answers"] == len(rows)
    assert metrics["undesirable_weight"] == pytest.approx(metrics["desirable_answers"] / bad)
    assert "preference_accuracy" not in metrics


def test_the_auc_counts_ties_as_half():
    rewards, labels = [2.0, 1.0, 1.0, 0.0], [True, True, False, False]
    assert kto.label_metrics(rewards, labels)["heldout_label_auc"] == (1 + 1 + 0.5 + 1) / 4
    assert "heldout_label_auc" not in kto.label_metrics([1.0], [True])


def test_its_own_answers_are_labelled_by_the_checker(inputs, tmp_path):
    options = {"own_answer_questions": 30, "own_answers_per_question": 24, "own_answer_tokens": 8, "max_steps": 3}
    folder = align(inputs, tmp_path / "kto", **options)
    metrics = read_metrics(folder)["metrics"]
    assert metrics["labels"] == "own answers"
    assert 0 < metrics["desirable_answers"] < metrics["answers"]
    assert metrics["desirable_weight"] > 1  # it is seldom right


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a", "completion": "b", "label": "maybe"}], r"row 1 \('a'\): 'label' is 'maybe', expected true"),
        ([{"prompt": "a", "completion": "b", "label": None}], "row 1 .*: 'label' is None"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 8, "8 desirable and 0 undesirable answers"),
    ],
)
def test_labels_that_cannot_be_used_are_named(inputs, tmp_path, rows, told):
    path = write_lines(tmp_path / "labelled.jsonl", rows)
    with pytest.raises(ValueError, match=told):
        align(inputs, tmp_path / "kto", dataset=path, heldout_fraction=0)


def test_a_model_that_is_never_right_is_told(inputs, tmp_path):
    rows = [{"question": row["prompt"][0]["content"], "answer": "nobody guesses this"} for row in make_rows(4)]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    with pytest.raises(ValueError, match="different answers that the model gave, 0 were right"):
        align(inputs, tmp_path / "kto", dataset=path, own_answer_questions=4, own_answer_tokens=8)


def test_a_run_that_broke_in_its_second_epoch_resumes_to_the_very_same_weights(inputs, tmp_path, monkeypatch):
    options = {"max_steps": 14, "save_steps": 5}  # 10 batches an epoch
    whole = align(inputs, tmp_path / "whole", **options)
    step = kto.UnpairedKTOTrainer.training_step

    def break_at_12(self, *args, **kwargs):
        if self.state.global_step == 12:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kto.UnpairedKTOTrainer, "training_step", break_at_12)
        with pytest.raises(RuntimeError, match="planted"):
            align(inputs, tmp_path / "broken", **options)
    resumed = align(inputs, tmp_path / "broken", **options)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_control_tokens_in_an_answer_are_trained_on_as_text(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "sft")
    row = {"prompt": [{"role": "user", "content": "<|pad|>"}], "label": True}
    row["completion"] = [{"role": "assistant", "content": "a <|im_end|> b"}]
    encoded = kto.answer_encoder(tokenizer)(json.loads(json.dumps(row)))
    assert encoded["completion_ids"].count(tokenizer.eos_token_id) == 1
    assert encoded["completion_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in encoded["prompt_ids"]
