"""What a user can get wrong ends in one line that names it."""

import math

import pytest
from ppo_tiny import PROMPTS, likes_low, make_llama, make_reward_model, make_tokenizer, make_trainer
from transformers import LlamaForSequenceClassification

from hf_scratch_gpt.alignment.ppo import PPOConfig
from hf_scratch_gpt.runs.checkpoints import find_damage


def raising(prompts, completions, **columns):
    raise KeyError("missing")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "reward function 'raising' raised KeyError"),
        (lambda prompts, completions, **columns: [1.0], "returned 1 scores for 16 completions"),
        (lambda prompts, completions, **columns: [math.nan] * 16, "returned nan for completion 0"),
        (lambda prompts, completions, **columns: None, "returned no list of numbers"),
        (lambda prompts, completions, **columns: ["good"] * 16, "returned no list of numbers"),
    ],
)
def test_a_broken_reward_function_is_named(tmp_path, reward, message):
    trainer = make_trainer(tmp_path, reward=reward)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset: has no rows"),
        ([{"text": "w1"}], r"row 0: no column 'prompt' \(columns: text\)"),
        ([{"prompt": "w1"}, {"prompt": ""}], "row 1: 'prompt' is empty"),
        ([{"prompt": 3}], "row 0: 'prompt' is int, expected text or a list of messages"),
        ([{"prompt": [{"role": "user"}]}], "row 0: 'prompt' is list, expected text or a list of messages"),
        ([{"prompt": "w1"}, {"prompt": "w1 " * 27}], r"row 1: the prompt has 27 tokens.*leaves 26.*1 of 2 rows"),
    ],
)
def test_unusable_prompts_are_named_by_row(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=rows)


def test_a_few_long_prompts_are_dropped_with_a_warning(tmp_path, caplog):
    trainer = make_trainer(tmp_path, rows=[*PROMPTS * 5, {"prompt": "w1 " * 40}])
    assert len(trainer.prompts) == 120
    assert "1 of 121 prompts are too long" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "both"}, "'critic' is 'both', expected one of separate, shared"),
        ({"rollout_batch_size": 18}, "'rollout_batch_size' is 18, not a multiple of the minibatch of 4"),
        ({"temperature": 0.0}, "'temperature' is 0.0, expected more than 0"),
        ({"lam": 1.5}, "'lam' is 1.5, expected 0 to 1"),
        ({"total_episodes": 64}, "'total_episodes' and 'max_steps' both"),
        ({"max_new_tokens": 32}, "'max_new_tokens' is 32, which leaves no room for a prompt in 32 tokens"),
        ({"max_length": 64}, "'max_length' is 64, but the model's context is 32"),
        ({"end_token_ids": [99]}, "end token 99 is not in the model's vocabulary of 64"),
        ({"reward_weights": [1.0, 2.0]}, "'reward_weights' has 2 numbers for 1 rewards"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_conversations_without_a_chat_template_are_refused(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "w1"}]}]
    with pytest.raises(ValueError, match="row 0: 'prompt' is a conversation, but the policy's tokenizer has no chat"):
        make_trainer(tmp_path, rows=rows)


def test_a_tokenizer_without_end_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end token"):
        make_trainer(tmp_path, tokenizer=tokenizer)


def test_reward_models_that_do_not_fit_are_refused(tmp_path):
    two_labels = LlamaForSequenceClassification(type(make_llama().config)(**{**tiny_settings(), "num_labels": 2}))
    with pytest.raises(ValueError, match="has 2 labels, expected 1"):
        make_trainer(tmp_path, reward=two_labels)
    with pytest.raises(ValueError, match="its vocabulary has 40 tokens, the policy's tokenizer 56"):
        make_trainer(tmp_path, reward=make_reward_model(vocab_size=40))
    with pytest.raises(ValueError, match=r"reward_std 0\.0; expected a std > 0"):
        make_trainer(tmp_path, reward=make_reward_model(reward_std=0.0))
    with pytest.raises(ValueError, match="its context is 8"):
        make_trainer(tmp_path, reward=make_reward_model(max_position_embeddings=8)).train()
    with pytest.raises(ValueError, match="a reward is int, expected a function"):
        make_trainer(tmp_path, reward=3)
    with pytest.raises(ValueError, match="no reward"):
        make_trainer(tmp_path, reward=[])


def tiny_settings():
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }


def raise_error(count):
    raise RuntimeError("the judge is away")


FAILURES = {
    "raises": (raise_error, "raised RuntimeError: the judge is away"),
    "too few": (lambda count: [0.0] * (count - 1), "returned 15 scores for 16 completions"),
    "nan": (lambda count: [0.0] * (count - 1) + [math.nan], "returned nan for completion 15"),
    "infinite": (lambda count: [math.inf] * count, "returned inf for completion 0"),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_reward_that_fails_later_leaves_the_last_checkpoint_whole(tmp_path, failure, is_async):
    fail, message = FAILURES[failure]
    calls = []

    def fails_later(prompts, completions, **columns):
        calls.append(1)
        return fail(len(completions)) if len(calls) > 1 else likes_low(prompts, completions)

    async def fails_later_too(prompts, completions, **columns):
        return fails_later(prompts, completions)

    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    with pytest.raises(ValueError, match=f"reward function 'fails_later(_too)?' {message}"):
        make_trainer(tmp_path, reward=fails_later_too if is_async else fails_later, **options).train()
    assert find_damage(tmp_path / "checkpoint-8") is None
    if failure == "raises":
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 12
        assert len(resumed.records.rollouts) == 2


def test_resuming_with_other_settings_of_the_steps_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    make_trainer(tmp_path, **options).train()
    for changed, message in (
        ({"num_ppo_epochs": 4}, "was saved with num_ppo_epochs 2, and now it is 4"),
        ({"per_device_train_batch_size": 8}, "was saved with minibatch_size 4, and now it is 8"),
        ({"seed": 1}, "was saved with seed 42, and now it is 1"),
        ({"bf16": True}, "was saved with precision fp32, and now it is bf16"),
        ({"rows": PROMPTS[:20]}, "was saved with prompts 24, and now it is 20"),
    ):
        trainer = make_trainer(tmp_path, **{**options, **changed})
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="holds no whole checkpoint to resume from"):
        make_trainer(tmp_path / "none", **options).train(resume_from_checkpoint=True)


def test_defaults_are_the_known_good_ones(tmp_path):
    config = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (config.gamma, config.lam, config.cliprange, config.cliprange_value, config.vf_coef) == (
        1,
        0.95,
        0.2,
        0.2,
        0.1,
    )
    assert (config.num_ppo_epochs, config.adam_epsilon, config.reward_clip) == (4, 1e-5, 10)
    assert config.missing_end_score == -1
    assert config.steps_per_rollout == 16


@pytest.mark.parametrize("is_fast", [True, False])
def test_bf16_is_used_where_it_is_fast_and_a_warning_says_where_not(tmp_path, monkeypatch, caplog, is_fast):
    monkeypatch.setattr("hf_scratch_gpt.alignment.ppo.config.has_fast_bf16", lambda device: is_fast)
    trainer = make_trainer(tmp_path, bf16=None)
    assert trainer.args.bf16 == is_fast
    assert (trainer.accelerator.mixed_precision == "bf16") == is_fast
    assert ("PPO computes in fp32: bf16 is not faster" in caplog.text) != is_fast
