"""DPO raises the chosen answers over the rejected ones, measured against the model that it started from."""

import pytest
import torch
from alignment_tiny import make_model, write_preferences, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment import dpo
from hf_scratch_gpt.finetuning.scoring import score_answers
from hf_scratch_gpt.finetuning.tokenise import load_examples, preference_encoder
from hf_scratch_gpt.runs import parse_arguments, read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "sft")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def align(folder, model, data, **settings):
    return dpo.run(parse_arguments(dpo.Arguments, [write_recipe(folder, model, data, **settings)]))


@pytest.fixture(scope="module")
def aligned(model, data, tmp_path_factory):
    return align(tmp_path_factory.mktemp("runs") / "dpo", model, data)


def heldout_pairs(folder):
    arguments = parse_arguments(dpo.Arguments, [str(folder.with_suffix(".yaml"))])
    encode = preference_encoder(AutoTokenizer.from_pretrained(folder))
    return load_examples(arguments, "preferences", encode, 96).heldout


def log_probability(model, prompt, answer):
    """By hand: one row, no padding, the sum of log-softmax at the answer's tokens."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(table[len(prompt) + index - 1, token].item() for index, token in enumerate(answer))


def test_the_output_is_a_plain_model_and_the_frozen_parts_are_the_starts(aligned, model):
    start, end = (load_file(folder / "model.safetensors") for folder in (model, aligned))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if "_proj" in name}
    assert (aligned / "adapter" / "adapter_model.safetensors").is_file()


def test_heldout_margins_are_log_ratios_to_the_start(aligned, model):
    metrics = read_metrics(aligned)["metrics"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (aligned, model))
    rewards = {"chosen_ids": [], "rejected_ids": []}
    for column, values in rewards.items():
        for pair in heldout_pairs(aligned):
            ours, theirs = (log_probability(m, pair["prompt_ids"], pair[column]) for m in (policy, reference))
            values.append(0.1 * (ours - theirs))
    wins = sum(good > bad for good, bad in zip(*rewards.values(), strict=True))
    assert metrics["heldout_pairs"] == 10
    assert metrics["beta"] == 0.1
    assert metrics["preference_accuracy"] == pytest.approx(wins / 10)
    assert metrics["heldout_chosen_reward"] == pytest.approx(sum(rewards["chosen_ids"]) / 10, abs=1e-5)
    assert metrics["heldout_rejected_reward"] == pytest.approx(sum(rewards["rejected_ids"]) / 10, abs=1e-5)
    assert metrics["preference_accuracy"] >= 0.9
    assert metrics["heldout_margin"] > 0


def test_before_training_every_implicit_reward_is_zero(model, aligned):
    start = AutoModelForCausalLM.from_pretrained(model)
    rewards = dpo.implicit_rewards(start, start, heldout_pairs(aligned), "chosen_ids", 0.1, 3)
    assert rewards == [0.0] * 10


def test_two_ways_of_scoring_an_answer_agree(model, aligned):
    from hf_scratch_gpt.evaluation.likelihood import answer_log_probabilities

    start = AutoModelForCausalLM.from_pretrained(model)
    pairs = heldout_pairs(aligned)
    answers = list(zip(pairs["prompt_ids"], pairs["chosen_ids"], strict=True))
    ids = [prompt + answer for prompt, answer in answers]
    labels = [[-100] * len(prompt) + answer for prompt, answer in answers]
    scores = [score.log_probability for score in score_answers(start, ids, labels, 1, batch_size=4)]
    assert scores == pytest.approx(answer_log_probabilities(start, answers, batch_size=3), abs=1e-4)


def test_a_run_that_broke_in_its_second_epoch_resumes_to_the_very_same_weights(model, data, tmp_path, monkeypatch):
    whole = align(tmp_path / "whole", model, data)
    step = dpo.PairDPOTrainer.training_step

    def break_at_11(self, *args, **kwargs):
        if self.state.global_step == 11:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(dpo.PairDPOTrainer, "training_step", break_at_11)
    with pytest.raises(RuntimeError, match="planted"):
        align(tmp_path / "broken", model, data)
    monkeypatch.setattr(dpo.PairDPOTrainer, "training_step", step)
    resumed = align(tmp_path / "broken", model, data)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"precompute_ref_log_probs": False, "eval_strategy": "steps", "eval_steps": 6},
        {"eval_strategy": "steps", "eval_steps": 6},
        {"peft": "none", "learning_rate": 1e-4},
    ],
)
def test_references_kept_in_other_ways_train_the_same_policy(settings, model, data, aligned, tmp_path):
    folder = align(tmp_path / "other", model, data, **settings)
    metrics, expected = (read_metrics(path)["metrics"] for path in (folder, aligned))
    if "peft" in settings:
        assert metrics["heldout_margin"] > 0
        assert not (folder / "adapter").exists()
    else:
        assert metrics["heldout_margin"] == pytest.approx(expected["heldout_margin"], rel=1e-3)


def test_the_divergence_is_that_of_the_answers_it_draws_position_by_position(aligned, model):
    from hf_scratch_gpt.alignment.divergence import heldout_divergence
    from hf_scratch_gpt.evaluation.generation import generate_from_ids, suppressed_token_ids

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (aligned, model))
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    prompts = list(heldout_pairs(aligned)["prompt_ids"])
    found = heldout_divergence(policy, reference, tokenizer, prompts, 4, 6, seed=3, batch_size=2)
    suppressed = suppressed_token_ids(policy, tokenizer)
    by_hand = []
    for prompt, answer in zip(prompts, generate_from_ids(policy, tokenizer, prompts[:4], 6, 1.0, 3, 4), strict=False):
        tables = []
        for each in (policy, reference):
            with torch.no_grad():
                logits = each(input_ids=torch.tensor([[*prompt, *answer.token_ids]])).logits[0].double()
            logits[:, suppressed] = -torch.inf
            tables.append(logits.log_softmax(-1)[len(prompt) - 1 : -1])
        allowed = tables[0] > -torch.inf
        by_hand.append((tables[0].exp() * (tables[0] - tables[1]))[allowed].sum().item())
    assert found["heldout_kl_prompts"] == len(by_hand) == 4
    assert found["heldout_kl"] == pytest.approx(sum(by_hand) / 4, rel=1e-4)
    low, high = found["heldout_kl_interval"]
    assert 0 < low <= found["heldout_kl"] <= high
    same = heldout_divergence(reference, reference, tokenizer, prompts, 4, 6, 3, 2)
    assert same["heldout_kl"] == pytest.approx(0, abs=1e-6)
    assert heldout_divergence(policy, reference, tokenizer, prompts, 4, 96, 3, 2) == {}  # nothing fits


def test_the_divergence_stands_in_the_metrics_with_its_sample(aligned):
    metrics = read_metrics(aligned)["metrics"]
    assert metrics["heldout_kl"] > 0
    assert metrics["heldout_kl_prompts"] == 10
    assert metrics["heldout_kl_tokens"] >= 10
    low, high = metrics["heldout_margin_interval"]
    assert low < metrics["heldout_margin"] < high
