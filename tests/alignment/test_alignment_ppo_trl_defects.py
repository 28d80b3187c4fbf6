"""The defects of TRL 1.12.0's PPOTrainer, the last that TRL had: for each a test that would fail if ours had it.

Two of them need two real processes and stand in `test_alignment_ppo_distributed.py`: the crash of PEFT under DDP (9,
`test_9_peft_trains_…`) and the whitening of each rank alone (13, `test_13_whitening_is_global_…`).
"""

import gc
import shutil

import pytest
import torch
from ppo_tiny import (
    END,
    PROMPTS,
    VOCABULARY,
    make_llama,
    make_reward_model,
    make_tokenizer,
    make_trainer,
    parameters_of,
)
from test_alignment_ppo_rewards import make_other_tokenizer
from transformers import AutoModelForTokenClassification, EarlyStoppingCallback, TrainerCallback

from hf_scratch_gpt.alignment.ppo import losses


class Steps(TrainerCallback):
    """Counts what an optimizer and a scheduler really do, and what is logged when."""

    def __init__(self):
        self.logged, self.optimizer_steps = [], 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logged.append(state.global_step)


def test_1_a_sampled_pad_hides_neither_itself_nor_what_follows(tmp_path):
    """TRL's masks are `!= pad_token_id`: here the pad is the end token, which a policy samples all the time."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make_llama()
    trainer = make_trainer(
        tmp_path, model, tokenizer=tokenizer, max_new_tokens=16, max_steps=1, num_ppo_epochs=1,
        per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    rollout = trainer.rollout
    is_pad = rollout.response_ids == tokenizer.pad_token_id
    hidden = rollout.mask.bool() & is_pad
    assert hidden.any()  # which TRL's mask would leave out
    assert (rollout.log_probs[hidden] < 0).all()
    assert (rollout.advantages[hidden] != 0).all()  # the end is learnt: so it can also be unlearnt
    # And a pad that means nothing is never sampled, however likely it is.
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[VOCABULARY["<pad>"]] = model.model.norm.weight
    trainer = make_trainer(tmp_path / "other", model, max_steps=1)
    trainer.train()
    assert not (trainer.rollout.response_ids == VOCABULARY["<pad>"])[trainer.rollout.mask.bool()].any()


def test_2_max_grad_norm_is_not_ignored(tmp_path):
    moved = {}
    for norm in (1e-3, 2e-3):
        trainer = make_trainer(tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=norm, max_steps=1)
        before = parameters_of(trainer)
        trainer.train()
        after = parameters_of(trainer)
        moved[norm] = float(torch.cat([(after[name] - before[name]).flatten() for name in before]).norm())
    assert moved == pytest.approx({1e-3: 1e-3, 2e-3: 2e-3}, rel=1e-2)


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_3_accumulation_counts_optimizer_steps(tmp_path, accumulated):
    """TRL made 16 steps where 64 were due. Episodes x epochs / minibatch is what is due."""
    counter = Steps()
    trainer = make_trainer(
        tmp_path, max_steps=-1, total_episodes=32, num_ppo_epochs=2, per_device_train_batch_size=4 // accumulated,
        gradient_accumulation_steps=accumulated, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.add_callback(counter)
    trainer.train()
    due = 32 * 2 // 4
    assert trainer.state.global_step == counter.optimizer_steps == trainer.state.max_steps == due
    assert trainer.lr_scheduler.last_epoch == due
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
    assert all(int(state["step"]) == due for state in trainer.optimizer.state.values())


def test_4_no_garbage_collection_an_update(tmp_path, monkeypatch):
    calls = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *arguments: calls.append(1) or collect(*arguments))
    counts = []
    for steps in (8, 24):
        calls.clear()
        make_trainer(tmp_path, max_steps=steps).train()
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_5_a_run_resumes_to_the_same_bits(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 11}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-11")  # the last step is saved too
    resumed = make_trainer(tmp_path, **{**options, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=True)  # from step 10, inside the second rollout
    assert resumed.records.rollouts == whole.records.rollouts
    assert all(torch.equal(value, parameters_of(resumed)[n]) for n, value in parameters_of(whole).items())


def test_6_the_critic_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, critic="separate", max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "checkpoint-4" / "value_model")
    assert critic.score.weight.any()
    for name, value in critic.state_dict().items():
        assert torch.equal(value, trainer.model.critic.state_dict()[name]), name
    again = make_trainer(
        tmp_path / "again", given={"value_model": str(tmp_path / "checkpoint-4" / "value_model")}, max_steps=1
    )
    assert torch.equal(again.model.critic.score.weight, critic.score.weight)


def test_7_callables_text_and_chat_prompts_are_taken(tmp_path):
    seen = []

    def note(prompts, completions, number):
        seen.append((prompts[0], completions[0], number[0]))
        return [0.0] * len(prompts)

    chat = [{"prompt": [{"role": "user", "content": row["prompt"]}], "number": row["number"]} for row in PROMPTS]
    make_trainer(tmp_path / "text", reward=note, max_steps=1).train()
    make_trainer(tmp_path / "chat", reward=note, rows=chat, tokenizer=make_tokenizer(chat=True), max_steps=1).train()
    (text_prompt, text, _), (chat_prompt, turns, _) = seen
    assert isinstance(text_prompt, str)
    assert isinstance(text, str)
    assert (chat_prompt[0]["role"], turns[0]["role"]) == ("user", "assistant")


def test_8_a_reward_model_need_not_share_the_tokenizer(tmp_path):
    reward = make_reward_model(vocab_size=60)
    trainer = make_trainer(
        tmp_path, reward=reward, max_steps=2, given={"reward_processing_classes": make_other_tokenizer()}
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.rewards[0].reads_ids


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_10_evaluate_works_alone_in_training_and_for_early_stopping(tmp_path, peft):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "greater_is_better": True,
        "missing_end_score": None,
        "max_steps": 40,
        "learning_rate": 1e-2,
    }
    held_out = {"eval_dataset": PROMPTS[:10]}
    trainer = make_trainer(tmp_path, peft=peft, reward=best_at_six, given=held_out, critic="separate", **settings)
    before = trainer.evaluate()
    assert {"eval_reward", "eval_kl", "eval_response_length", "eval_share_without_end"} <= set(before)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    lines = {line["step"]: line for line in trainer.state.log_history if "eval_reward" in line}
    assert sorted(lines) == [2, 4, 6, 8, 10]  # two evaluations after the best one
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (6, 0.0)
    assert len({line["eval_kl"] for line in lines.values()}) == 5
    assert trainer.evaluate()["eval_kl"] == lines[6]["eval_kl"]  # the policy of the best step, not of the last


def best_at_six(completions, trainer_state):
    """As good as the step is near to the sixth."""
    return [-abs(trainer_state.global_step - 6) / 10] * len(completions)


def test_11_logging_steps_are_not_ignored(tmp_path):
    counter = Steps()
    trainer = make_trainer(tmp_path, max_steps=10, logging_steps=4)
    trainer.add_callback(counter)
    trainer.train()
    assert counter.logged == [4, 8]


def test_12_a_response_is_as_long_as_it_is(tmp_path):
    """TRL samples and trains on `response_length` tokens, whatever ends before; ours stops when all have ended."""
    trainer = make_trainer(
        tmp_path, end_token_ids=[END, *range(3, 50)], max_new_tokens=24, max_steps=1, num_ppo_epochs=1
    )
    calls = []
    policy = trainer.model.policy
    plain = policy.forward
    policy.forward = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    trainer.train()
    lengths = trainer.rollout.mask.sum(-1)
    assert len(set(lengths.tolist())) > 1
    assert trainer.rollout.response_ids.shape[1] == int(lengths.max()) < 24
    # A forward pass for each token sampled, then one of each micro-batch of 4 for the old values, and the step's own.
    assert len(calls) == int(lengths.max()) + 16 // 4 + 1


def test_14_the_score_stands_on_the_end_token():
    """TRL puts it one slot behind, where the mask of the policy loss is 0 already."""
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rewards = losses.token_rewards(torch.tensor([2.0, 3.0]), torch.zeros(2, 5), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 2, 0, 0], [0, 0, 0, 0, 3]]
    advantages, returns = losses.generalised_advantages(rewards, torch.zeros(2, 5), mask, 1.0, 1.0)
    assert returns.tolist() == [[2, 2, 2, 0, 0], [3, 3, 3, 3, 3]]
    assert torch.equal(advantages, returns)
