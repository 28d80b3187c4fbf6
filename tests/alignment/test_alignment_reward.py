"""The reward stage gives a plain model with a trained head, honest held-out numbers, and the scale that PPO needs."""

import json

import numpy as np
import pytest
import torch
from alignment_tiny import make_model, write_preferences, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_scratch_gpt.alignment import reward
from hf_scratch_gpt.evaluation.intervals import wilson
from hf_scratch_gpt.finetuning.merge import main as merge_main
from hf_scratch_gpt.finetuning.tokenise import load_examples
from hf_scratch_gpt.runs import parse_arguments, read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "sft")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def train(folder, model, data, **settings):
    return reward.run(parse_arguments(reward.Arguments, [write_recipe(folder, model, data, **settings)]))


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "reward", model, data)


def test_the_head_survives_merging_and_reloading(trained, model):
    loaded = AutoModelForSequenceClassification.from_pretrained(trained)
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id == AutoTokenizer.from_pretrained(trained).pad_token_id
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    heads = [value for name, value in adapter.items() if name.endswith("score.weight")]
    assert len(heads) == 1
    assert torch.equal(loaded.score.weight, heads[0])
    trunk, start = load_file(trained / "model.safetensors"), load_file(model / "model.safetensors")
    assert torch.equal(trunk["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert not torch.equal(trunk["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])


def test_heldout_numbers_are_those_of_scoring_each_answer_alone(trained):
    metrics = read_metrics(trained)["metrics"]
    loaded = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    arguments = parse_arguments(reward.Arguments, [str(trained.with_suffix(".yaml"))])
    pairs = load_examples(arguments, "preferences", reward.reward_encoder(tokenizer), 96)
    heldout = pairs.heldout

    def score(rows):
        with torch.no_grad():
            return [loaded(input_ids=torch.tensor([row])).logits.item() for row in rows]

    scores = {column: score(heldout[column]) for column in ("chosen_ids", "rejected_ids")}
    wins = sum(good > bad for good, bad in zip(*scores.values(), strict=True))
    interval = wilson(wins, len(heldout))
    assert metrics["heldout_pairs"] == len(heldout) == 10
    assert metrics["heldout_accuracy"] == pytest.approx(wins / 10)
    assert metrics["heldout_accuracy_interval"] == pytest.approx([interval.low, interval.high])
    assert metrics["chance"] == 0.5
    # PPO normalises by the scale, so no held-out answer may enter it; it reads it from the model folder.
    reference = score(pairs.train["chosen_ids"])
    assert metrics["reward_mean"] == pytest.approx(np.mean(reference), abs=1e-5)
    assert metrics["reward_std"] == pytest.approx(np.std(reference), abs=1e-5)
    assert loaded.config.reward_mean == metrics["reward_mean"]
    assert loaded.config.reward_std == metrics["reward_std"]
    assert metrics["heldout_accuracy"] >= 0.9  # "good" against "bad" is easy


def test_rewards_stay_near_zero(trained):
    metrics = read_metrics(trained)["metrics"]
    assert metrics["center_rewards_coefficient"] == 0.01
    assert abs(metrics["reward_mean"]) < 10


def test_a_run_that_broke_in_its_second_epoch_resumes_to_the_very_same_weights(model, data, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", model, data, eval_strategy="steps", eval_steps=5)
    curve = [json.loads(line) for line in (whole / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "eval_accuracy" in row][:2] == [5, 10]
    step = reward.PairRewardTrainer.training_step

    def break_at_11(self, *args, **kwargs):
        if self.state.global_step == 11:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(reward.PairRewardTrainer, "training_step", break_at_11)
    with pytest.raises(RuntimeError, match="planted"):
        train(tmp_path / "broken", model, data)
    monkeypatch.setattr(reward.PairRewardTrainer, "training_step", step)
    resumed = train(tmp_path / "broken", model, data)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_adapters_the_whole_model_is_trained(model, data, tmp_path):
    folder = train(tmp_path / "full", model, data, peft="none", max_steps=2, heldout_fraction=0)
    start, end = (load_file(path / "model.safetensors") for path in (model, folder))
    assert not any(torch.equal(start[name], end[name]) for name in start if name in end)
    metrics = read_metrics(folder)["metrics"]
    assert "heldout_accuracy" not in metrics
    assert metrics["reward_std"] > 0


def test_merge_command_keeps_the_reward_head(trained, model, tmp_path):
    assert merge_main([str(trained / "adapter"), str(tmp_path / "merged"), "--base", str(model)]) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "merged"))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_ties_are_wrong_and_length_is_correlated_by_hand():
    pairs = {"chosen_ids": [[1], [1, 2], [1, 2, 3]], "rejected_ids": [[1], [1], [1]]}
    metrics = reward.ranking_metrics([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], pairs)
    assert metrics["heldout_accuracy"] == pytest.approx(2 / 3)
    assert metrics["heldout_margin"] == pytest.approx(1.0)
    assert metrics["length_correlation"] == pytest.approx(1.0)
    assert reward.correlation([1.0, 1.0], [1, 2]) is None
