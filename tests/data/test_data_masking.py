"""Which tokens are hidden: BERT's shares, never a control token, and nothing but (seed, sample number) decides."""

import numpy as np
import pytest
import torch

from hf_scratch_gpt.data.masking import IGNORED, TokenMasker
from hf_scratch_gpt.model import ScratchGPTTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return ScratchGPTTokenizer.train(["a text about nothing much, and <|mask|> in it " * 20], 300, mask_token=True)


@pytest.fixture(scope="module")
def masker(tokenizer):
    return TokenMasker(tokenizer)


@pytest.fixture(scope="module")
def windows(tokenizer):
    """200 windows of 100 ordinary tokens and, after every nine of them, a separator."""
    ids = np.random.default_rng(0).integers(7, len(tokenizer), (200, 100))
    ids[:, ::10] = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return torch.from_numpy(ids)


def test_the_shares_are_those_of_the_paper(masker, windows):
    hidden, labels = masker.hide_batch(windows, seed=1, samples=np.arange(200)).values()
    chosen = labels != IGNORED
    assert chosen.sum(1).tolist() == [round(0.15 * 90)] * 200
    assert torch.equal(labels[chosen], windows[chosen])
    assert torch.equal(hidden[~chosen], windows[~chosen])
    masked, kept = hidden[chosen] == masker.mask_id, hidden[chosen] == windows[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (~masked & ~kept).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_no_control_token_is_chosen_or_drawn(masker, windows, tokenizer):
    hidden, labels = masker.hide_batch(windows, seed=1, samples=np.arange(200)).values()
    control = torch.tensor(sorted(tokenizer.get_added_vocab().values()))
    assert not torch.isin(labels, control).any()
    drawn = hidden[(labels != IGNORED) & (hidden != masker.mask_id)]
    assert not torch.isin(drawn, control).any()
    assert torch.equal(hidden == control[0], windows == control[0])


def test_each_ordinary_token_is_as_likely_as_any(masker, windows):
    counts = sum((masker.hide_batch(windows, seed, np.arange(200))["labels"] != IGNORED).sum(0) for seed in range(10))
    ordinary = counts[counts > 0]
    assert len(ordinary) == 90
    expected, deviation = 2000 * 14 / 90, (2000 * 14 / 90 * (1 - 14 / 90)) ** 0.5
    assert ((ordinary - expected).abs() < 5 * deviation).all()


def test_the_mask_is_a_function_of_seed_and_sample_alone(masker, windows):
    whole = masker.hide_batch(windows[:4], seed=1, samples=np.arange(4))
    part = masker.hide_batch(windows[2:4], seed=1, samples=np.array([2, 3]))
    assert torch.equal(whole["input_ids"][2:], part["input_ids"])
    for seed, samples in ((2, np.arange(4)), (1, np.arange(4) + 4)):
        assert not torch.equal(masker.hide_batch(windows[:4], seed, samples)["labels"], whole["labels"])


def test_short_windows_have_one_target_and_windows_of_separators_none(masker, tokenizer):
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    _, labels = masker.hide(np.array([separator, 20, separator]), np.random.default_rng(0))
    assert labels.tolist() == [IGNORED, 20, IGNORED]
    hidden, labels = masker.hide(np.array([separator] * 3), np.random.default_rng(0))
    assert (hidden.tolist(), labels.tolist()) == ([separator] * 3, [IGNORED] * 3)


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match=r"this one has none; run the stage 'tokenizer' with mask_token: true"):
        TokenMasker(ScratchGPTTokenizer.train(["some text"] * 9, 300))
