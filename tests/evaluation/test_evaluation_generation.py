"""Batched generation equals transformers' own, and no answer depends on its neighbours."""

import pytest
import torch

from hf_scratch_gpt.evaluation.generation import (
    end_token_ids,
    generate_answers,
    suppressed_token_ids,
)
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

QUESTIONS = ["a", "Which module?", "2 + 2 =", "say a b c d e f", "zz", "What is it for, then?", "a"]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]


def test_greedy_answers_equal_transformers_generate_one_at_a_time(tiny_model, tiny_tokenizer):
    answers = generate_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        token_ids = encode_conversation(tiny_tokenizer, prompt, add_generation_prompt=True)["input_ids"]
        expected = tiny_model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=suppressed_token_ids(tiny_model, tiny_tokenizer),
            eos_token_id=end_token_ids(tiny_model, tiny_tokenizer),
        )[0, len(token_ids) :].tolist()
        assert list(answer.token_ids) == expected
        assert answer.tokens == len(expected)
        assert answer.ended == (expected[-1] == tiny_tokenizer.eos_token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_order_or_batch(tiny_model, tiny_tokenizer, temperature):
    def answer(prompts, batch_size):
        return generate_answers(tiny_model, tiny_tokenizer, prompts, 10, temperature, seed=5, batch_size=batch_size)

    straight = answer(PROMPTS, 64)
    assert answer(PROMPTS, 1) == straight
    assert answer(PROMPTS[:-1][::-1], 3) == straight[:-1][::-1]
    assert answer(PROMPTS[2:4], 2) == straight[2:4]


def test_repeated_prompts_are_drawn_anew_and_seeds_differ(tiny_model, tiny_tokenizer):
    prompts = [PROMPTS[1]] * 8
    drawn = generate_answers(tiny_model, tiny_tokenizer, prompts, 10, 1.0, seed=1)
    assert len({answer.token_ids for answer in drawn}) > 1
    assert generate_answers(tiny_model, tiny_tokenizer, prompts, 10, 1.0, seed=1) == drawn
    assert generate_answers(tiny_model, tiny_tokenizer, prompts, 10, 1.0, seed=2) != drawn


def test_sampled_first_tokens_follow_the_models_distribution(tiny_model, tiny_tokenizer):
    prompt, count, temperature = PROMPTS[2], 2000, 1.3
    token_ids = encode_conversation(tiny_tokenizer, prompt, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        logits = tiny_model(torch.tensor([token_ids])).logits[0, -1] / temperature
    logits[suppressed_token_ids(tiny_model, tiny_tokenizer)] = -torch.inf
    expected = logits.softmax(-1)
    answers = generate_answers(tiny_model, tiny_tokenizer, [prompt] * count, 1, temperature, batch_size=500)
    found = torch.bincount(torch.tensor([answer.token_ids[0] for answer in answers]), minlength=264) / count
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_control_tokens_are_never_generated_but_the_end_token_is(new_model, tiny_tokenizer):
    model = new_model(seed=3)
    control = [tiny_tokenizer.convert_tokens_to_ids(name) for name in ("<|pad|>", "<|im_start|>", "<|endoftext|>")]
    end = tiny_tokenizer.eos_token_id
    model.lm_head = torch.nn.Linear(32, 264)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[control] = 9.0  # a model that wants nothing but control tokens, and then to end
        model.lm_head.bias[262] = 8.0  # padding of the vocabulary, no token at all
        model.lm_head.bias[end] = 3.0
    answers = generate_answers(model, tiny_tokenizer, [PROMPTS[0]] * 50, 5, temperature=1.0)
    generated = {token for answer in answers for token in answer.token_ids}
    assert not generated & {*control, 262}
    ended = [answer for answer in answers if answer.ended]
    assert 0 < len(ended) < 50
    assert all(answer.token_ids.index(end) == answer.tokens - 1 for answer in ended)
    assert all("<|" not in answer.text for answer in answers)


def test_a_prompt_that_does_not_fit_is_named(tiny_model, tiny_tokenizer):
    prompts = [PROMPTS[0], [{"role": "user", "content": "x" * 100}]]
    with pytest.raises(ValueError, match=r"prompt 1 \('x+\.\.\.'\): \d+ tokens .* up to 20 .* context of 128 tokens"):
        generate_answers(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20)


def test_the_models_mode_is_left_as_it_was(tiny_model, tiny_tokenizer):
    tiny_model.train()
    generate_answers(tiny_model, tiny_tokenizer, PROMPTS[:1], 2)
    assert tiny_model.training
    tiny_model.eval()
    assert generate_answers(tiny_model, tiny_tokenizer, [], 2) == []
