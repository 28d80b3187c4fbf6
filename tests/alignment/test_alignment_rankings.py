"""Rankings of K answers: one batch element, the mean of the losses of its pairs, and at K = 2 TRL's own loss."""

import json

import pytest
import torch
from alignment_tiny import make_model, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from hf_scratch_gpt.alignment import reward
from hf_scratch_gpt.alignment.rankings import RankingCollator, RankingRewardTrainer, ranked_pairs, ranking_encoder
from hf_scratch_gpt.data import conversations
from hf_scratch_gpt.runs import parse_arguments, read_metrics

ANSWERS = ("This is good.", "This is good, bad.", "That is bad, good.", "That is bad.")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "sft")


def ranking(number, count=4, ranks=None):
    answers = [[{"role": "assistant", "content": text + " sir" * (number % 3)}] for text in ANSWERS[:count]]
    prompt = [{"role": "user", "content": f"What do you say, number {number}?"}]
    return {"prompt": prompt, "completions": answers, "ranks": ranks or list(range(1, count + 1))}


@pytest.fixture
def load_rankings(monkeypatch):
    """The loader of rankings, or one that reads just the form that it gives, where there is none yet."""

    def load(source, split=None, streaming=False, keep_columns=False):
        from datasets import Dataset

        with open(source, encoding="utf-8") as file:
            return Dataset.from_list([json.loads(line) for line in file])

    if not hasattr(conversations, "load_rankings"):
        monkeypatch.setattr(conversations, "load_rankings", load, raising=False)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def train(folder, model, data, **settings):
    return reward.run(parse_arguments(reward.Arguments, [write_recipe(folder, model, data, **settings)]))


def loss_of(trainer, examples):
    """A batch's loss as the trainer computes it, and the gradient of every weight."""
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def make_trainer(kind, model, examples, folder, centering=0.01):
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.normal_(classifier.score.weight, std=0.5)
    arguments = RewardConfig(
        output_dir=str(folder),
        bf16=False,
        use_cpu=True,
        max_length=None,
        report_to="none",
        gradient_checkpointing=False,
        center_rewards_coefficient=centering,
        per_device_train_batch_size=len(examples),
    )
    options = {"pad_token_id": tokenizer.pad_token_id} if kind is RankingRewardTrainer else {}
    return kind(
        model=classifier,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        **options,
    )


def test_the_loss_of_a_ranking_is_the_mean_of_its_pairs_losses(model, tmp_path):
    encode = ranking_encoder(AutoTokenizer.from_pretrained(model))
    rows = [ranking(0), ranking(1, 3), ranking(2, 4, [1, 2, 2, 3])]
    examples = [encode(row) for row in rows]
    assert [len(example["better"]) for example in examples] == [6, 3, 5]  # a tie makes no pair
    trainer = make_trainer(RankingRewardTrainer, model, examples, tmp_path)
    loss, gradients = loss_of(trainer, examples)

    losses, sums = [], {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for example in examples:
        answers = example["completion_ids"]
        for better, worse in zip(example["better"], example["worse"], strict=True):
            pair = {"completion_ids": [answers[better], answers[worse]], "better": [0], "worse": [1]}
            one, its_gradients = loss_of(trainer, [pair])
            weight = 1 / (len(example["better"]) * len(examples))
            losses.append(weight * one)
            for name, gradient in its_gradients.items():
                sums[name] += weight * gradient
    assert loss == pytest.approx(sum(losses), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, sums[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centering", [0.01, None])
@pytest.mark.parametrize("margins", [(), (0.5, 0.0, 2.0)])
def test_two_answers_give_trls_own_loss_and_gradients(centering, margins, model, tmp_path):
    encode = ranking_encoder(AutoTokenizer.from_pretrained(model))
    rankings = [encode(ranking(number, 2, [2, 1] if number == 1 else [1, 2])) for number in range(3)]
    pairs = [
        {
            "chosen_ids": example["completion_ids"][example["better"][0]],
            "rejected_ids": example["completion_ids"][example["worse"][0]],
            "length": example["length"],
        }
        for example in rankings
    ]
    if margins:
        rankings = [{**row, "margins": [margin]} for row, margin in zip(rankings, margins, strict=True)]
        pairs = [{**row, "margin": margin} for row, margin in zip(pairs, margins, strict=True)]
    ours = loss_of(make_trainer(RankingRewardTrainer, model, rankings, tmp_path, centering), rankings)
    theirs = loss_of(make_trainer(reward.PairRewardTrainer, model, pairs, tmp_path, centering), pairs)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-6)


def test_the_same_measures_are_logged_as_by_trl(model, tmp_path):
    encode = ranking_encoder(AutoTokenizer.from_pretrained(model))
    rankings = [encode(ranking(number, 2)) for number in range(3)]
    pairs = [
        {"chosen_ids": row["completion_ids"][0], "rejected_ids": row["completion_ids"][1], "length": row["length"]}
        for row in rankings
    ]
    ours = make_trainer(RankingRewardTrainer, model, rankings, tmp_path)
    theirs = make_trainer(reward.PairRewardTrainer, model, pairs, tmp_path)
    loss_of(ours, rankings)
    loss_of(theirs, pairs)
    assert ours._metrics["train"].keys() == theirs._metrics["train"].keys()
    for name, values in theirs._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, rel=1e-5), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_every_pair_of_unequal_rank_occurs_once_the_lower_rank_first(ranks):
    better, worse = ranked_pairs(ranks, list(range(len(ranks))))
    pairs = list(zip(better, worse, strict=True))
    assert all(ranks[first] < ranks[second] for first, second in pairs)
    expected = {
        frozenset((first, second))
        for first in range(len(ranks))
        for second in range(first)
        if ranks[first] != ranks[second]
    }
    assert sorted(map(sorted, expected)) == sorted(sorted(pair) for pair in pairs)


def test_equal_answers_prefer_nothing():
    assert ranked_pairs([1, 2, 3], ["a", "b", "a"]) == ([0, 1], [1, 2])


def test_batches_are_padded_to_the_asked_multiple_and_weights_sum_to_one(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = [ranking_encoder(tokenizer)(row) for row in (ranking(0), ranking(2, 3))]
    batch = RankingCollator(tokenizer.pad_token_id, 16)(examples)
    assert batch["input_ids"].shape[0] == 7
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["weights"].sum().item() == pytest.approx(1)
    assert batch["better"].max().item() < 7
    lengths = [len(row) for example in examples for row in example["completion_ids"]]
    assert batch["attention_mask"].sum(1).tolist() == lengths


def test_the_stage_learns_from_rankings_and_says_what_they_were(model, load_rankings, tmp_path):
    data = write(tmp_path / "rankings.jsonl", [ranking(number) for number in range(24)])
    folder = train(tmp_path / "run", model, data, eval_strategy="steps", eval_steps=6)
    metrics = read_metrics(folder)["metrics"]
    assert (metrics["rankings"], metrics["smallest_ranking"], metrics["largest_ranking"]) == (18, 4, 4)
    assert metrics["pairs"] == 18 * 6
    assert (metrics["heldout_pairs"], metrics["heldout_prompts"]) == (36, 6)
    assert metrics["heldout_accuracy"] > 0.75
    assert metrics["reward_answers"] == 18  # the best-ranked of each
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "eval_accuracy" in row] == [6, 12]


def test_pairs_as_rankings_of_two_train_the_very_model_that_pairs_do(model, load_rankings, tmp_path):
    rows = [ranking(number, 2) for number in range(12)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]} for row in rows
    ]
    found = {}
    for name, content in (("rankings", rows), ("pairs", pairs)):
        data = write(tmp_path / f"{name}.jsonl", content)
        found[name] = read_metrics(train(tmp_path / name, model, data, max_steps=4))["metrics"]
    for name in ("last_train_loss", "heldout_margin", "reward_mean", "reward_std"):
        assert found["rankings"][name] == pytest.approx(found["pairs"][name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1, 2]}, r"'ranks' holds 2 entries, expected a number for each of the 4 completions"),
        ({"ranks": None}, r"'ranks' holds NoneType, expected a number for each of the 4 completions"),
        ({"ranks": [1, 2, 3, float("nan")]}, r"entry 4 of 'ranks' is nan, expected a finite number"),
        ({"ranks": [1, 1, 1, 1]}, r"no completion is ranked above a different one"),
        ({"completions": []}, r"'completions' holds no list of at least two answers"),
    ],
)
def test_a_malformed_ranking_is_refused_with_its_column(change, message, model):
    with pytest.raises(ValueError, match=message):
        ranking_encoder(AutoTokenizer.from_pretrained(model))({**ranking(1), **change})


def test_margins_of_a_ranking_grow_with_the_difference_of_ranks(model):
    found = ranking_encoder(AutoTokenizer.from_pretrained(model), margin_scale=0.5)(ranking(0, 3, [1, 2, 4]))
    assert dict(zip(zip(found["better"], found["worse"], strict=True), found["margins"], strict=True)) == {
        (0, 1): 0.5,
        (0, 2): 1.5,
        (1, 2): 1.0,
    }
