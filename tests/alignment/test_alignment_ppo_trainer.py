"""The trainer's steps: what is sampled and masked, what the first ratio is, that it learns, and what it logs."""

import json

import pytest
import torch
from ppo_tiny import (
    BEGIN,
    END,
    PAD,
    VOCABULARY,
    likes_low,
    make_gpt2,
    make_llama,
    make_reward_model,
    make_tokenizer,
    make_trainer,
    parameters_of,
)
from torch.testing import assert_close

from hf_scratch_gpt.alignment.ppo import losses
from hf_scratch_gpt.alignment.ppo.generation import draw_uniforms, sample_responses
from hf_scratch_gpt.alignment.ppo.models import ValueHead
from hf_scratch_gpt.alignment.ppo.prompts import left_pad
from hf_scratch_gpt.alignment.ppo.sampling import SamplingRule
from hf_scratch_gpt.alignment.ppo.schedule import prompt_order


def sample(model, ids, mask, ends, suppressed, pad, max_new_tokens, temperature, seed, **options):
    rule = SamplingRule(ends, suppressed, pad, max_new_tokens, temperature, **options)
    return sample_responses(model, ids, mask, rule, draw_uniforms(len(ids), max_new_tokens, seed))


def sample_from(trainer, prompts, seed):
    return trainer._sample(prompts, draw_uniforms(len(prompts), trainer.args.max_new_tokens, seed))


def roll_out(trainer):
    """The trainer's first rollout, and its first minibatch."""
    trainer.create_optimizer_and_scheduler(8)
    inputs = trainer._prepare_inputs({"micro_step": torch.tensor([0])})
    return trainer.rollout, inputs


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_first_ratio_is_exactly_one_and_first_kl_zero_at_any_temperature(tmp_path, make_model, critic, peft):
    trainer = make_trainer(tmp_path, make_model(), critic=critic, peft=peft, temperature=0.7)
    _, inputs = roll_out(trainer)
    trainer.model.train()  # attention_dropout is 0.3: it must be off
    batch = inputs["batch"]
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    sums, tokens = trainer.records._pending[-1]
    assert float(sums["ratio"]) == float(tokens) == float(batch.mask.sum())
    assert float(sums["update_kl"]) == 0.0
    assert trainer.records.rollouts[0]["kl"] == 0.0
    assert_close(outputs["values"], torch.zeros_like(batch.mask))  # the value head begins at zero
    loss.backward()
    assert any(parameter.grad is not None for parameter in trainer.model.critic.parameters())


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_in_bf16_too_the_first_ratio_is_one_and_the_first_kl_zero(tmp_path, peft):
    """Sampling, old log-probabilities, reference and training all run under the same autocast."""
    trainer = make_trainer(tmp_path, critic="separate", peft=peft, bf16=True, max_steps=1, num_ppo_epochs=1)
    seen = []
    plain = trainer.model.policy.forward

    def spy(*args, **kwargs):
        output = plain(*args, **kwargs)
        seen.append(output.logits.dtype)
        return output

    trainer.model.policy.forward = spy
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    line = trainer.state.log_history[0]
    assert line["kl"] == 0.0
    assert (line["ratio"], line["update_kl"]) == (1.0, 0.0)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2], ids=["llama", "gpt2"])
def test_log_probabilities_of_the_batch_equal_those_of_each_sequence_alone(tmp_path, make_model):
    model = make_model()
    rollout, _ = roll_out(make_trainer(tmp_path, model, temperature=0.7))
    model.eval()
    allowed = torch.tensor([END, *range(3, len(VOCABULARY))])
    for row in range(4):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
        response = rollout.response_ids[row][rollout.mask[row].bool()]
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        restricted = torch.full_like(logits, -torch.inf)
        restricted[:, allowed] = logits[:, allowed]
        expected = torch.log_softmax(restricted / 0.7, -1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        assert_close(rollout.log_probs[row, : len(response)], expected, atol=1e-5, rtol=1e-5)


def test_control_tokens_and_rows_without_a_token_are_never_sampled(tmp_path):
    model = make_llama()
    with torch.no_grad():  # the policy would sample little else
        model.lm_head.weight[:] = 0
        model.lm_head.weight[[PAD, BEGIN, 60]] = model.model.norm.weight
    rollout, _ = roll_out(make_trainer(tmp_path, model))
    sampled = rollout.response_ids[rollout.mask.bool()]
    assert not set(sampled.tolist()) & {PAD, BEGIN, *range(len(VOCABULARY), 64)}
    assert torch.isfinite(rollout.log_probs).all()


def test_a_pad_that_is_sampled_neither_hides_itself_nor_what_follows():
    model = make_llama()
    ids, mask = left_pad([[5, 6], [7]], PAD)
    nothing = torch.tensor([], dtype=torch.long)
    with torch.no_grad():
        model.lm_head.weight[:] = 0  # every token is as likely, the pad included
    responses = sample(model, ids.repeat(32, 1), mask.repeat(32, 1), torch.tensor([END]), nothing, PAD, 8, 1, 0)
    lengths = responses.mask.sum(-1).int().tolist()
    has_pad = 0
    for row, length, ended in zip(responses.ids.tolist(), lengths, responses.ended.tolist(), strict=True):
        has_pad += PAD in row[:length]
        assert (END in row) == ended
        assert length == (row.index(END) + 1 if ended else 8)
    assert has_pad > 3


def test_when_pad_is_the_end_token_the_end_still_counts(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rollout, _ = roll_out(make_trainer(tmp_path, tokenizer=tokenizer, max_new_tokens=16))
    ended = (rollout.response_ids * rollout.mask == END).any(-1)
    assert ended.any()
    last = rollout.response_ids[torch.arange(16), rollout.mask.sum(-1).long() - 1]
    assert (last[ended] == END).all()


def test_sampling_follows_the_policy_and_a_row_does_not_depend_on_its_neighbours():
    model = make_llama()
    ends, nothing = torch.tensor([END]), torch.tensor([], dtype=torch.long)
    ids, mask = left_pad([[5, 6, 7], [9]] * 1024, PAD)
    tokens = sample(model, ids, mask, ends, nothing, PAD, 1, 0.5, seed=3).ids[::2, 0]
    expected = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5, -1)
    frequency = torch.bincount(tokens, minlength=64) / len(tokens)
    assert (frequency - expected).abs().max() < 5 * (expected.max() / len(tokens)) ** 0.5
    # The same draws with rows leaving the batch as they end, and with none ever ending.
    ids, mask = ids[:64], mask[:64]
    some_end = sample(model, ids, mask, torch.arange(1, 30), nothing, PAD, 6, 1.0, seed=4)
    none_ends = sample(model, ids, mask, torch.tensor([-1]), nothing, PAD, 6, 1.0, seed=4)
    width = some_end.mask.shape[1]
    assert torch.equal(some_end.ids * some_end.mask, none_ends.ids[:, :width] * some_end.mask)
    assert some_end.ended.float().mean() > 0.5


@pytest.mark.parametrize(("critic", "peft"), [("shared", False), ("separate", True)])
def test_preferred_words_become_frequent(tmp_path, critic, peft):
    model = make_llama()
    model.lm_head.weight.data.mul_(10)  # an adapter, which leaves the head alone, could else hardly move a logit
    trainer = make_trainer(
        tmp_path, model, critic=critic, peft=peft, max_steps=96, num_ppo_epochs=4, rollout_batch_size=64,
        per_device_train_batch_size=16, learning_rate=1e-2, critic_learning_rate=3e-3, kl_coef=0.01,
        missing_end_score=None, lr_scheduler_type="constant", logging_steps=32,
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.records.rollouts]
    assert rewards[0] < 0.55
    assert rewards[-1] > rewards[0] + 0.2
    assert trainer.records.rollouts[-1]["kl"] > 0.5


def test_the_missing_end_score_teaches_responses_to_end(tmp_path):
    trainer = make_trainer(
        tmp_path, reward=lambda prompts, completions, **columns: [0.0] * len(prompts), max_steps=112, num_ppo_epochs=4,
        rollout_batch_size=64, per_device_train_batch_size=16, learning_rate=1e-2, kl_coef=0.0,
    )  # fmt: skip
    trainer.train()
    shares = [row["share_ended"] for row in trainer.records.rollouts]
    assert shares[0] < 0.5
    assert shares[-1] > 0.8


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_accumulation_changes_nothing(tmp_path, critic):
    settings = {"critic": critic, "learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", per_device_train_batch_size=8, **settings)
    parts = make_trainer(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    before = parameters_of(whole)
    whole.train()
    parts.train()
    assert whole.state.global_step == parts.state.global_step == 4
    for name, value in parameters_of(whole).items():
        assert_close(dict(parts.model.named_parameters())[name].detach(), value, atol=1e-6, rtol=1e-4, msg=name)
    assert any(not torch.equal(before[name], value) for name, value in parameters_of(whole).items())


def test_gradients_are_really_clipped(tmp_path):
    trainer = make_trainer(
        tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=1e-3, max_steps=1, critic="separate"
    )
    before = parameters_of(trainer)
    trainer.train()
    moved = torch.cat([(value - before[name]).flatten() for name, value in parameters_of(trainer).items()])
    assert trainer.state.log_history[0]["grad_norm"] > 1e-2
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_the_reference_stays_as_it_was_and_the_reward_model_is_not_trained(tmp_path):
    reward = make_reward_model()
    for peft in (False, True):
        trainer = make_trainer(tmp_path / str(peft), reward=reward, peft=peft, critic="separate", max_steps=4)
        ids = torch.tensor([[5, 6, 7, 8]])
        with trainer._as_reference() as reference:
            before = reference(ids).logits.detach().clone()
        scores = reward(ids).logits.detach().clone()
        trainer.train()
        with trainer._as_reference() as reference:
            assert torch.equal(reference(ids).logits, before)
        assert not torch.equal(trainer.model.policy(ids).logits, before)
        assert torch.equal(reward(ids).logits, scores)
        assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_separate_critic_begins_as_the_reward_model_with_a_zero_head(tmp_path):
    reward = make_reward_model()
    critic = make_trainer(tmp_path, reward=[likes_low, reward], critic="separate").model.critic
    assert torch.equal(critic.model.layers[1].mlp.up_proj.weight, reward.model.layers[1].mlp.up_proj.weight)
    assert critic.model.layers[1].mlp.up_proj.weight is not reward.model.layers[1].mlp.up_proj.weight
    assert not critic.score.weight.any()
    assert not critic.score.bias.any()
    assert isinstance(make_trainer(tmp_path).model.critic, ValueHead)


def test_the_reward_model_reads_what_it_was_trained_on_and_is_normalised(tmp_path):
    """The conversation as its template writes it, scored after the last turn's end token and what follows that."""
    reward = make_reward_model(reward_mean=0.5, reward_std=2.0)
    tokenizer = make_tokenizer(chat=True)
    rows = [{"prompt": [{"role": "user", "content": f"w{number} w3"}]} for number in range(24)]
    trainer = make_trainer(
        tmp_path, reward=[reward, likes_in_turns], rows=rows, tokenizer=tokenizer, missing_end_score=None,
        max_new_tokens=18, reward_weights=[1.0, 0.0],
    )  # fmt: skip
    prompts = trainer.prompts
    episodes = sample_from(trainer, prompts, seed=5)
    assert episodes.ended.any()
    for row in range(24):
        if not episodes.ended[row]:
            continue
        turn = [*prompts[row].content, {"role": "assistant", "content": episodes.texts[row]}]
        ids = tokenizer.apply_chat_template(turn, return_dict=False)
        score = float(reward(torch.tensor([ids])).logits)
        assert float(episodes.raw_scores[row]) == pytest.approx(score, abs=1e-4)
        assert float(episodes.scores[row]) == pytest.approx(max(-10, min(10, (score - 0.5) / 2.0)), abs=1e-4)
    assert set(episodes.by_reward) == {"LlamaForSequenceClassification", "likes_in_turns"}


def likes_in_turns(prompts, completions, completion_ids, **columns):
    assert prompts[0][0]["role"] == "user"
    assert completions[0][0]["role"] == "assistant"
    return [float(len(ids)) for ids in completion_ids]


def test_a_function_gets_the_other_columns_and_rewards_are_weighted(tmp_path):
    seen = []

    def numbered(prompts, completions, number, **columns):
        seen.extend(zip(prompts, number, strict=True))
        return [float(value) for value in number]

    trainer = make_trainer(
        tmp_path, reward=[numbered, lambda prompts, completions, **columns: [1.0] * len(prompts)],
        reward_weights=[0.25, 2.0], missing_end_score=None,
    )  # fmt: skip
    episodes = sample_from(trainer, trainer.prompts[:6], seed=0)
    assert seen == [(prompt.content, prompt.columns["number"]) for prompt in trainer.prompts[:6]]
    assert_close(episodes.scores, torch.tensor([0.25 * number + 2.0 for number in range(6)]))


def test_log_lines_completions_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=16, logging_steps=8, log_completions=2, kl_target=0.1)
    trainer.eval_prompts = trainer.prompts[:5]
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [8, 16]
    wanted = {
        "reward", "reward_raw", "kl", "kl_k3", "kl_coef", "entropy", "clip_fraction", "value_clip_fraction", "ratio",
        "explained_variance", "response_length", "share_ended", "policy_loss", "value_loss", "episodes", "grad_norm",
    }  # fmt: skip
    assert wanted <= set(lines[0])
    assert [line["episodes"] for line in lines] == [16, 32]
    assert lines[1]["kl_coef"] != lines[0]["kl_coef"]
    samples = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 8, 8]
    before = trainer.rollout
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    assert {"eval_reward", "eval_kl", "eval_share_ended", "eval_response_length"} <= set(first)
    assert trainer.rollout is before


def test_max_steps_total_episodes_and_epochs_count_as_they_say(tmp_path):
    assert make_trainer(tmp_path, max_steps=-1, total_episodes=40).args.max_steps == 3 * 8
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2.0)  # 24 prompts hold one whole rollout of 16
    trainer.train()
    assert trainer.state.global_step == 16
    assert len(trainer.records.rollouts) == 2
    assert trainer.state.epoch == 2.0


def test_prompts_come_in_whole_shuffled_passes():
    order = prompt_order(10, 0, 40, seed=1)
    assert [sorted(order[start : start + 10]) for start in range(0, 40, 10)] == [list(range(10))] * 4
    assert order[:10] != order[10:20]
    assert prompt_order(10, 7, 20, seed=1) == order[7:27]


def test_entropy_of_the_log_is_that_of_the_policy(tmp_path):
    model = make_llama()
    trainer = make_trainer(tmp_path, model, temperature=0.5)
    rollout, _ = roll_out(trainer)
    inputs = rollout.model_inputs()
    logits = (
        model(**inputs).logits[:, -rollout.mask.shape[1] - 1 : -1].index_fill(-1, trainer.rule.suppressed_ids, -1e9)
    )
    entropy = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    expected = losses.masked_mean(entropy, rollout.mask).detach()
    assert trainer.records.rollouts[0]["entropy"] == pytest.approx(float(expected), abs=1e-5)
