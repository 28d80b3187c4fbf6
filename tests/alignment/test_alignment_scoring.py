"""What answers are scored by: the text as the reward model was trained on it, checked functions, weighted sums."""

from types import SimpleNamespace

import pytest
import torch
from relatives_tiny import make_inputs, make_pairs, make_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_scratch_gpt.alignment.reward import reward_encoder
from hf_scratch_gpt.alignment.scoring import (
    ModelScorer,
    ScoringArguments,
    build_scorers,
    encode_answered,
    load_function,
    total_scores,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return AutoTokenizer.from_pretrained(inputs / "reward")


def test_an_answer_that_ended_is_read_as_in_the_reward_models_training(tokenizer):
    (pair,) = make_pairs(1)
    expected = reward_encoder(tokenizer)(pair)
    for column in ("chosen", "rejected"):
        text = pair[column][0]["content"]
        assert encode_answered(tokenizer, pair["prompt"], text, True) == expected[f"{column}_ids"]


def test_an_answer_that_did_not_end_is_read_without_its_end(tokenizer):
    (row,) = make_rows(1)
    ended, cut = (encode_answered(tokenizer, row["prompt"], "red", has_ended) for has_ended in (True, False))
    assert ended[: len(cut)] == cut
    assert ended[len(cut)] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ended[len(cut) + 1 :]
    assert tokenizer.decode(cut).endswith("assistant\nred")


def test_control_tokens_in_prompt_and_answer_stay_text(tokenizer):
    prompt = [{"role": "user", "content": "say <|im_end|>"}]
    plain = encode_answered(tokenizer, [{"role": "user", "content": "say so"}], "red", True)
    ids = encode_answered(tokenizer, prompt, "<|im_end|><|pad|>", True)
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id not in ids
    cut = encode_answered(tokenizer, prompt, "<|im_end|><|pad|>", False)
    assert tokenizer.decode(cut).endswith("<|im_end|><|pad|>")


def test_a_reward_models_score_is_its_logit_at_the_last_token_normalised(inputs, tokenizer):
    rows, texts, ended = make_rows(4), ["red", "a longer answer", "", "blue"], [True, True, False, False]
    model = AutoModelForSequenceClassification.from_pretrained(inputs / "reward").eval()
    expected = []
    for row, text, has_ended in zip(rows, texts, ended, strict=True):
        ids = encode_answered(tokenizer, row["prompt"], text, has_ended)
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(((model.score(hidden).item()) - 0.1) / 0.5)
    assert ModelScorer(str(inputs / "reward")).score(rows, texts, ended) == pytest.approx(expected, abs=1e-5)


def settings(**changed):
    return SimpleNamespace(**{**vars(ScoringArguments()), "dataset": "questions.jsonl", **changed}, check_scoring=int)


def test_the_total_is_the_weighted_sum_and_what_has_no_weight_is_not_asked(inputs):
    rows, texts, ended = make_rows(3), ["red", "blue", "blue"], [True, True, False]
    asked = settings(
        reward_function="relatives_tiny:likes_blue",
        reward_function_weight=3.0,
        checker_weight=2.0,
        missing_end_penalty=5.0,
    )
    scorers = build_scorers(asked, rows)
    assert [scorer.name for scorer, _ in scorers] == ["reward_function", "gold", "missing_end"]
    assert total_scores(scorers, rows, texts, ended) == [2.0, 3.0, 3.0 + 2.0 - 5.0]
    unasked = build_scorers(settings(reward_function="relatives_tiny:raises", reward_function_weight=0.0), rows)
    assert total_scores(unasked, rows, texts, ended) == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("raises", "'relatives_tiny:raises' raised KeyError: 'no such thing'"),
        ("too_few", "'relatives_tiny:too_few' returned 1 numbers for 2 answers"),
        ("not_a_number", "returned nan for answer 0"),
        ("no_number", "returned no list of numbers"),
    ],
)
def test_what_is_wrong_with_a_function_is_told_by_its_name(function, told):
    rows = make_rows(2)
    ((scorer, _), *_) = build_scorers(settings(reward_function=f"relatives_tiny:{function}"), rows)
    with pytest.raises(ValueError, match=told):
        scorer.score(rows, ["a", "b"], [True, True])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("relatives_tiny", "expected module:function"),
        ("relatives_tiny:", "expected module:function"),
        ("../evil:function", "expected module:function"),
        ("no_such_module:function", "cannot import 'no_such_module'"),
        ("relatives_tiny:nothing", "the module 'relatives_tiny' has no function 'nothing'"),
        ("relatives_tiny:COLOURS", "has no function 'COLOURS'"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(name, told):
    with pytest.raises(ValueError, match=f"'reward_function'.*{told}"):
        load_function(name, "reward_function")


def test_what_cannot_score_is_refused(inputs):
    with pytest.raises(ValueError, match="nothing scores the answers"):
        ScoringArguments().check_scoring()
    with pytest.raises(ValueError, match="'missing_end_penalty' is -1"):
        ScoringArguments(reward_model="x", missing_end_penalty=-1).check_scoring()
    with pytest.raises(ValueError, match=r"questions\.jsonl has rows that are no task questions"):
        build_scorers(settings(checker_weight=1.0), [{"prompt": []}])
    long_row = {"prompt": [{"role": "user", "content": "red " * 200}]}
    with pytest.raises(ValueError, match=r"reward model .*reward: a prompt and its answer have .* its context is 96"):
        ModelScorer(str(inputs / "reward")).score([long_row], ["red"], [True])
