"""Rewards of every kind: async functions that wait together, reward models that read through their own tokenizer."""

import asyncio

import pytest
import torch
from ppo_tiny import END, PROMPTS, VOCABULARY, likes_low, make_llama, make_reward_model, make_tokenizer, make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

from hf_scratch_gpt.alignment.ppo.generation import draw_uniforms

OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content }}{% if m.role == 'assistant' %}{{ ' </s> w9 ' }}"
    "{% else %}{{ ' w8 ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make_other_tokenizer(chat=False):
    """Words as the policy's tokenizer has them, under other ids, with another end token and no control tokens else."""
    words = sorted(word for word in VOCABULARY if not word.startswith("<"))
    ids = {"[pad]": 0, "</s>": 1, "user": 2, "assistant": 3, **{word: 4 + n for n, word in enumerate(words)}}
    backend = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[pad]", eos_token="</s>")
    if chat:
        tokenizer.chat_template = OTHER_TEMPLATE
    return tokenizer


def sample(trainer, seed=5):
    prompts = trainer.prompts[:16]
    return trainer._sample(prompts, draw_uniforms(16, trainer.args.max_new_tokens, seed))


def alone(reward, ids):
    with torch.no_grad():
        return float(reward(torch.tensor([ids])).logits)


class Waiting:
    """Async rewards that each wait until all of them have been called: one after another they would wait for ever."""

    def __init__(self, count):
        self.count, self.started = count, []

    async def meet(self):
        self.started.append(1)
        while len(self.started) < self.count:
            await asyncio.sleep(0.01)


def test_async_rewards_score_as_sync_ones_and_wait_together(tmp_path):
    waiting = Waiting(2)

    async def likes_low_too(prompts, completions, **columns):
        await waiting.meet()
        return likes_low(prompts, completions)

    class Judge:
        """An object with an async call, as a client of an endpoint is."""

        async def __call__(self, prompts, completions, **columns):
            await waiting.meet()
            return [1.0] * len(prompts)

    trainer = make_trainer(tmp_path, reward=[likes_low_too, likes_low, Judge(), make_reward_model()])
    first, second, third, _ = sample(trainer).by_reward.values()
    assert torch.equal(first, second)
    assert torch.equal(third, torch.ones(16))


def test_a_function_that_returns_an_awaitable_is_awaited_even_in_a_notebook(tmp_path):
    async def ones(completions):
        return [1.0] * len(completions)

    trainer = make_trainer(tmp_path, reward=lambda completions: ones(completions))

    async def in_a_notebook():  # whose thread has a running event loop
        return sample(trainer)

    assert torch.equal(asyncio.run(in_a_notebook()).raw_scores, torch.ones(16))


def test_an_async_reward_that_raises_is_named(tmp_path):
    async def away(prompts, completions, **columns):
        raise ConnectionError("no judge")

    trainer = make_trainer(tmp_path, reward=[likes_low, away])
    with pytest.raises(ValueError, match="reward function 'away' raised ConnectionError: no judge"):
        trainer.train()


def test_a_function_may_take_only_what_it_needs(tmp_path):
    def first_three(completions, number):
        return [float(value) for value in number]

    episodes = sample(make_trainer(tmp_path, reward=first_three, missing_end_score=None, reward_clip=100.0))
    assert episodes.raw_scores.tolist() == [float(row["number"]) for row in PROMPTS[:16]]

    def needs_more(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'needs_more' needs the column 'answer', which train_dataset has not \(col"):
        make_trainer(tmp_path, reward=needs_more)


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "given"])
def test_a_reward_model_reads_text_through_its_own_tokenizer(tmp_path, is_folder):
    reward, other = make_reward_model(vocab_size=60), make_other_tokenizer()
    given = {}
    source = reward
    if is_folder:
        source = str(tmp_path / "reward")
        reward.save_pretrained(source)
        other.save_pretrained(source)
    else:
        given["reward_processing_classes"] = [other, None]
    trainer = make_trainer(
        tmp_path, reward=[source, likes_low], given=given, missing_end_score=None, reward_weights=[1.0, 0.0],
        max_new_tokens=14, critic="separate",
    )  # fmt: skip
    episodes = sample(trainer)
    assert 0 < episodes.ended.sum() < 16
    for row in range(16):
        text = f"{episodes.prompts[row].content} {episodes.texts[row]}" + " </s>" * bool(episodes.ended[row])
        ids = [other.get_vocab()[word] for word in text.replace("  ", " ").split()]
        assert float(episodes.raw_scores[row]) == pytest.approx(alone(reward, ids), abs=1e-4)
    # Its trunk embeds other ids, so the critic begins as the policy.
    assert torch.equal(trainer.model.critic.model.embed_tokens.weight, trainer.model.policy.model.embed_tokens.weight)


def test_a_reward_model_renders_conversations_by_its_own_template(tmp_path):
    reward, other = make_reward_model(vocab_size=60), make_other_tokenizer(chat=True)
    rows = [{"prompt": [{"role": "user", "content": f"w{number} w3"}]} for number in range(16)]
    trainer = make_trainer(
        tmp_path, reward=reward, rows=rows, tokenizer=make_tokenizer(chat=True), missing_end_score=None,
        max_new_tokens=14, given={"reward_processing_classes": other},
    )  # fmt: skip
    episodes = sample(trainer)
    assert 0 < episodes.ended.sum() < 16
    for row in range(16):
        end = " </s> w9" if episodes.ended[row] else ""
        words = f"user {rows[row]['prompt'][0]['content']} w8 assistant {episodes.texts[row]}{end}".split()
        ids = [other.get_vocab()[word] for word in words]
        assert float(episodes.raw_scores[row]) == pytest.approx(alone(reward, ids), abs=1e-4)


def test_an_encoder_is_a_reward_model_too(tmp_path):
    """It reads its score at the first token, where padding on the left would stand."""
    set_seed(3)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    reward, other = BertForSequenceClassification(config).eval(), make_other_tokenizer()
    trainer = make_trainer(tmp_path, reward=reward, missing_end_score=None, given={"reward_processing_classes": other})
    episodes = sample(trainer)
    for row in range(16):
        text = f"{episodes.prompts[row].content} {episodes.texts[row]}" + " </s>" * bool(episodes.ended[row])
        ids = [other.get_vocab()[word] for word in text.split()]
        assert float(episodes.raw_scores[row]) == pytest.approx(alone(reward, ids), abs=1e-5)


def test_the_same_vocabulary_with_another_end_token_is_rendered_anew(tmp_path):
    """Equal ids are not enough: the reward model was trained on conversations that its own end token closes."""
    own = make_tokenizer()
    own.eos_token = "w40"
    reward = make_reward_model()
    trainer = make_trainer(
        tmp_path, reward=reward, missing_end_score=None, max_new_tokens=14, given={"reward_processing_classes": own}
    )
    episodes = sample(trainer)
    row = int(episodes.ended.nonzero()[0])
    ids = own(f"{episodes.prompts[row].content} {episodes.texts[row]} w40")["input_ids"]
    assert END not in ids
    assert float(episodes.raw_scores[row]) == pytest.approx(alone(reward, ids), abs=1e-4)


def test_reward_models_and_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="its tokenizer has 57 tokens, but its model embeds 40"):
        make_trainer(
            tmp_path,
            reward=make_reward_model(vocab_size=40),
            given={"reward_processing_classes": make_other_tokenizer()},
        )
    rows = [{"prompt": [{"role": "user", "content": "w1"}]}]
    with pytest.raises(ValueError, match="the prompts are conversations, but its tokenizer has no chat template"):
        make_trainer(
            tmp_path, reward=make_reward_model(), rows=rows, tokenizer=make_tokenizer(chat=True),
            given={"reward_processing_classes": make_other_tokenizer()},
        )  # fmt: skip
    without_end = make_other_tokenizer()
    without_end.eos_token = None
    with pytest.raises(ValueError, match="its tokenizer has no end token"):
        make_trainer(tmp_path, reward=make_reward_model(), given={"reward_processing_classes": without_end})
    with pytest.raises(ValueError, match="'reward_processing_classes' has 1 tokenizers for 2 rewards"):
        make_trainer(tmp_path, reward=[likes_low, likes_low], given={"reward_processing_classes": [without_end]})


def test_the_gold_reward_is_kept_beside_the_learnt_one(tmp_path):
    def gold(prompts, completions, **columns):
        return [float(len(text.split())) for text in completions]

    reward = make_reward_model(reward_mean=0.5, reward_std=2.0)
    trainer = make_trainer(tmp_path, make_llama(), [reward, gold], reward_weights=[1.0, 0.5], max_steps=8)
    trainer.train()
    row = trainer.records.rollouts[0]
    assert row["reward_gold"] == row["rewards/gold"]
    assert row["reward_learnt"] == pytest.approx((row["rewards/LlamaForSequenceClassification"] - 0.5) / 2.0)
    assert "reward_gold" not in make_and_train(tmp_path, [reward])
    assert "reward_gold" not in make_and_train(tmp_path, [likes_low, reward])


def make_and_train(folder, rewards):
    trainer = make_trainer(folder, reward=rewards, max_steps=1)
    trainer.train()
    return trainer.records.rollouts[0]


def test_rewards_are_normalised_weighted_and_clipped(tmp_path):
    def hundred(completions):
        return [100.0] * len(completions)

    trainer = make_trainer(tmp_path, reward=[hundred, likes_low], missing_end_score=None, reward_weights=[0.05, 2.0])
    episodes = sample(trainer)
    low = torch.tensor(likes_low(None, episodes.texts))
    assert_close(episodes.scores, (5.0 + 2 * low).clamp(max=10))
    trainer.args.reward_clip = 5.5
    assert_close(sample(trainer).scores, (5.0 + 2 * low).clamp(max=5.5))
