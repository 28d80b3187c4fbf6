"""Log-probabilities, divergences, rewards and attention agree with one-at-a-time computations."""

import pytest
import torch

from hf_scratch_gpt.evaluation.attention import attention_map
from hf_scratch_gpt.evaluation.generation import encode_prompts, generate_answers, suppressed_token_ids
from hf_scratch_gpt.evaluation.likelihood import answer_divergences, answer_log_probabilities
from hf_scratch_gpt.evaluation.models import load_model, load_reward_model, require_folder
from hf_scratch_gpt.evaluation.rewards import score_conversations
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

PAIRS = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10, 11]), ([3, 3, 3, 3, 3, 3], [1])]


def log_probabilities(model, prompt, answer):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def test_log_probabilities_of_answers_equal_one_at_a_time(tiny_model):
    expected = [
        log_probabilities(tiny_model, prompt, answer).gather(1, torch.tensor(answer)[:, None]).sum().item()
        for prompt, answer in PAIRS
    ]
    assert answer_log_probabilities(tiny_model, PAIRS, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_divergences_equal_the_sum_over_the_vocabulary_one_at_a_time(tiny_model, other_model):
    expected = []
    for prompt, answer in PAIRS:
        ours, theirs = (log_probabilities(model, prompt, answer) for model in (tiny_model, other_model))
        expected.append((ours.exp() * (ours - theirs)).sum().item())
    assert answer_divergences(tiny_model, other_model, PAIRS, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert answer_divergences(tiny_model, tiny_model, PAIRS, suppressed=[0, 5]) == pytest.approx([0.0] * 3, abs=1e-9)


def test_divergence_agrees_with_the_log_ratio_of_drawn_answers(tiny_model, other_model, tiny_tokenizer):
    """Two unbiased estimates of one number: the exact divergence along answers, and the drawn tokens' log-ratio."""
    prompts = [[{"role": "user", "content": "hello"}]] * 400
    answers = generate_answers(tiny_model, tiny_tokenizer, prompts, 3, temperature=1.0)
    encoded = encode_prompts(tiny_tokenizer, prompts, 3, None)
    pairs = [(token_ids, answer.token_ids) for token_ids, answer in zip(encoded, answers, strict=True)]
    suppressed = suppressed_token_ids(tiny_model, tiny_tokenizer)
    exact = torch.tensor(answer_divergences(tiny_model, other_model, pairs, suppressed))
    ratios = []
    for prompt, answer in pairs:
        ours, theirs = (log_probabilities(model, prompt, answer) for model in (tiny_model, other_model))
        for table in (ours, theirs):
            table[:, suppressed] = -torch.inf
        picked = torch.tensor(answer)[:, None]
        ratios.append((ours.log_softmax(-1) - theirs.log_softmax(-1)).gather(1, picked).sum())
    drawn = torch.stack(ratios)
    assert (exact >= 0).all()
    assert exact.mean().item() == pytest.approx(drawn.mean().item(), abs=4 * (drawn.std() / 20).item())


def test_scores_of_conversations_do_not_depend_on_padding(model_folders):
    model, tokenizer = load_reward_model(str(model_folders / "reward"))
    conversations = [
        [{"role": "user", "content": "q" * length}, {"role": "assistant", "content": "yes"}] for length in (1, 9, 30)
    ]
    expected = []
    for messages in conversations:
        token_ids = encode_conversation(tokenizer, messages)["input_ids"]
        with torch.no_grad():
            expected.append(model(torch.tensor([list(token_ids)])).logits.item())
    assert score_conversations(model, tokenizer, conversations) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_attention_weights_are_causal_and_sum_to_one(model_folders):
    model, tokenizer = load_model(str(model_folders / "base"), attn_implementation="eager")
    told = attention_map(model, tokenizer, "look here", longest=6)
    assert told["tokens"] == list("look h")
    assert (told["layers"], told["heads"]) == (2, 4)
    weights = torch.tensor(told["weights"])
    assert weights.shape == (2, 4, 6, 6)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 6), atol=2e-3)
    assert weights.triu(1).abs().max() == 0


def test_what_holds_no_model_is_named(tmp_path, model_folders):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        require_folder(str(tmp_path / "missing"))
    require_folder("somebody/a-model")  # a Hub id cannot be checked here
