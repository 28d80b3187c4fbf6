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


def test_adapter_merged_model_and_its_reload_score_alike(trained, model, tmp_path):
    from peft import PeftModel

    from hf_scratch_gpt.finetuning.models import load_model
    from hf_scratch_gpt.finetuning.scoring import score_rewards

    tokenizer = AutoTokenizer.from_pretrained(trained)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(260, (length,), generator=generator).tolist() for length in (5, 9, 17, 30)]
    base = load_model(AutoModelForSequenceClassification, str(model), tokenizer, num_labels=1)
    merged = AutoModelForSequenceClassification.from_pretrained(trained)
    merged.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    with_adapter = PeftModel.from_pretrained(base, trained / "adapter")
    expected = score_rewards(merged, rows, tokenizer.pad_token_id, 3)
    assert np.std(expected) > 0.01  # a lost head would give other scores, a dead one equal ones
    assert score_rewards(again, rows, tokenizer.pad_token_id, 3) == expected
    assert score_rewards(with_adapter, rows, tokenizer.pad_token_id, 3) == pytest.approx(expected, abs=1e-4)


def test_ppo_sees_the_reference_answers_at_mean_zero_and_deviation_one(trained, data):
    from hf_scratch_gpt.alignment.ppo.prompts import read_prompts
    from hf_scratch_gpt.alignment.ppo.rewards import load_reward
    from hf_scratch_gpt.evaluation.rewards import reward_scale_of, score_conversations

    tokenizer = AutoTokenizer.from_pretrained(trained)
    arguments = parse_arguments(reward.Arguments, [str(trained.with_suffix(".yaml"))])

    class Whole:  # the rows themselves, as the stage split them
        def __call__(self, row):
            return {"row": json.dumps(row), "length": 1}

    rows = [json.loads(text) for text in load_examples(arguments, "preferences", Whole(), 96).train["row"]]
    ppo_reward = load_reward(str(trained), tokenizer, 4)
    prompts = read_prompts([{"prompt": row["prompt"]} for row in rows], tokenizer, None)
    texts = [row["chosen"][0]["content"] for row in rows]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    scores = ppo_reward.normalise(ppo_reward.score(prompts, ids, [True] * len(ids), texts))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    # The helper that best-of-n has: text in, the same scale out.
    loaded = AutoModelForSequenceClassification.from_pretrained(trained)
    plain = score_conversations(loaded, tokenizer, [row["prompt"] + row["chosen"] for row in rows])
    again = reward_scale_of(loaded.config, str(trained)).normalise(np.array(plain))
    assert again == pytest.approx(scores.numpy(), abs=1e-4)


def test_a_scale_that_nothing_can_be_divided_by_is_refused(trained):
    from hf_scratch_gpt.evaluation.rewards import reward_scale_of

    config = AutoModelForSequenceClassification.from_pretrained(trained).config
    config.reward_std = 0.0
    with pytest.raises(ValueError, match=r"reward model mine: reward_mean .*, reward_std 0.0; expected a std > 0"):
        reward_scale_of(config, "mine")


def test_the_first_pass_is_the_same_stage_on_weak_pairs_and_goes_on_where_it_was_killed(
    model, data, tmp_path, monkeypatch
):
    weak = write_preferences(tmp_path / "weak.jsonl", 24)
    settings = {"pretraining_dataset": weak, "pretraining_steps": 6, "max_steps": 6, "save_steps": 2}
    whole = train(tmp_path / "whole", model, data, **settings)
    alone = train(tmp_path / "alone", model, weak, max_steps=6, save_steps=2)
    second = train(tmp_path / "second", tmp_path / "alone", data, max_steps=6, save_steps=2)
    weights = {
        name: load_file(folder / "model.safetensors")
        for name, folder in (("whole", whole), ("first", whole / "pretraining"), ("alone", alone), ("second", second))
    }
    assert all(torch.equal(weights["first"][name], weights["alone"][name]) for name in weights["alone"])
    assert all(torch.equal(weights["whole"][name], weights["second"][name]) for name in weights["second"])
    told = read_metrics(whole)["metrics"]["pretraining"]
    expected = read_metrics(alone)["metrics"]
    assert told["dataset"] == weak
    assert (told["steps"], told["pairs"], told["heldout_accuracy"]) == (6, 18, expected["heldout_accuracy"])

    step = reward.PairRewardTrainer.training_step
    calls = iter(range(100))

    def break_twice(self, *args, **kwargs):
        if next(calls) in (3, 9):  # in the first pass, and, after it went on from its second step, in the second
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(reward.PairRewardTrainer, "training_step", break_twice)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="planted"):
            train(tmp_path / "broken", model, data, **settings)
    assert (tmp_path / "broken" / "pretraining" / "metrics.json").is_file()
    resumed = load_file(train(tmp_path / "broken", model, data, **settings) / "model.safetensors")
    assert all(torch.equal(weights["whole"][name], resumed[name]) for name in resumed)


def rows_with(path, **columns):
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **columns}) + "\n" for row in rows)
    return path


def test_margins_of_the_data_enter_the_loss(model, tmp_path):
    data = rows_with(write_preferences(tmp_path / "pairs.jsonl"), score_chosen=3, score_rejected=1)
    curves = {}
    for scale in (0, 2):
        folder = train(tmp_path / f"scale{scale}", model, data, max_steps=1, logging_steps=1, margin_scale=scale)
        curves[scale] = json.loads((folder / "curve.jsonl").read_text().splitlines()[0])["loss"]
    # The score head is new and small, so that the gaps are near zero: log 2 without a margin, log(1 + e^4) with 4.
    assert curves[0] == pytest.approx(np.log(2), abs=0.1)
    assert curves[2] == pytest.approx(np.logaddexp(0, 4), abs=0.3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"pairs.jsonl, line \d+: 'score_chosen' is None, expected a number: 'margin_scale' needs 'margin'"),
        ({"margin": "much"}, r"pairs.jsonl, line \d+: 'margin' is 'much', expected a number"),
        (
            {"score_chosen": 1, "score_rejected": 2},
            r"pairs.jsonl, line \d+: .*give a margin of -1: the rejected answer would be better",
        ),
    ],
)
def test_a_margin_that_is_none_is_refused_with_its_row(columns, message, model, tmp_path):
    data = rows_with(write_preferences(tmp_path / "pairs.jsonl"), **columns)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", model, data, margin_scale=1.0)
