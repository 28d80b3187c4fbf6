"""The measure of masked models agrees with a calculation by hand, and its mask never changes."""

import math

import pytest
import torch

from hf_scratch_gpt.data.masking import TokenMasker
from hf_scratch_gpt.evaluation.masked import _windows, masked_tokens
from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForMaskedLM, ScratchGPTTokenizer, encode_text

DOCUMENTS = ["the list of names and a value " * 3, "each caller returns the file", "", "a list of a list of a list"]


@pytest.fixture(scope="module")
def tokenizer():
    return ScratchGPTTokenizer.train(DOCUMENTS * 5, 290, mask_token=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = ScratchGPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    return ScratchGPTForMaskedLM(config).eval()


def by_hand(model, tokenizer, context_length):
    """Each window alone, without padding or batches."""
    masker, separator, losses, right = TokenMasker(tokenizer), tokenizer.convert_tokens_to_ids("<|endoftext|>"), [], []
    for number, document in enumerate(filter(None, DOCUMENTS)):
        ids = [separator, *encode_text(tokenizer, document)]
        for window in _windows(masker, number, ids, context_length):
            (masked,) = (window.input_ids == masker.mask_id).nonzero()
            with torch.no_grad():
                logits = model(torch.from_numpy(window.input_ids)[None]).logits[0]
            for position in masked:
                losses.append(-logits[position].log_softmax(-1)[window.labels[position]].item())
                right.append(logits[position].argmax().item() == window.labels[position])
    return losses, right


@pytest.mark.parametrize("batch_size", [1, 16])
def test_loss_and_accuracy_are_those_computed_one_by_one(model, tokenizer, batch_size):
    losses, right = by_hand(model, tokenizer, 12)
    measured = masked_tokens(model, tokenizer, DOCUMENTS, 12, batch_size)
    assert measured.tokens == len(losses) > 5
    assert measured.loss.mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured.accuracy.mean == pytest.approx(sum(right) / len(right))
    assert measured.loss.low <= measured.loss.mean <= measured.loss.high
    assert measured.loss.n == 3


def test_windows_hold_the_whole_document_and_hide_the_same_tokens_every_time(tokenizer):
    masker = TokenMasker(tokenizer)
    ids = [0, *encode_text(tokenizer, DOCUMENTS[0])]
    windows, again = (_windows(masker, number, ids, 8) for number in (0, 7))
    shown = [i if label < 0 else label for w in windows for i, label in zip(w.input_ids, w.labels, strict=True)]
    assert shown == ids
    assert max(len(window.input_ids) for window in windows) <= 8
    assert [w.input_ids.tolist() for w in windows] == [w.input_ids.tolist() for w in again]
    for window in windows:
        assert (window.input_ids == masker.mask_id).sum() == (window.labels >= 0).sum() >= 1


def test_the_baseline_is_the_share_of_the_token_that_is_always_predicted(model, tokenizer):
    class Stubborn(torch.nn.Module):
        """Predicts one token with certainty; otherwise a model like any other."""

        config, device = model.config, torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[..., token] = 50.0
            return type("Output", (), {"logits": logits})

    masker = TokenMasker(tokenizer)
    token = int(_windows(masker, 0, [0, *encode_text(tokenizer, DOCUMENTS[0])], 12)[0].targets[0])
    measured = masked_tokens(Stubborn(), tokenizer, DOCUMENTS, 12, baseline_token=token)
    assert measured.accuracy == measured.baseline_accuracy
    assert 0 < measured.accuracy.mean < 1
    assert measured.loss.mean == pytest.approx(50.0 * (1 - measured.accuracy.mean), rel=1e-3)
    uniform = math.log(len(tokenizer))
    with torch.no_grad():
        even = ScratchGPTForMaskedLM(model.config)
        even.lm_head.weight.zero_()
    assert masked_tokens(even, tokenizer, DOCUMENTS, 12).loss.mean == pytest.approx(uniform, rel=1e-5)


def test_without_text_there_is_nothing_to_measure(model, tokenizer):
    with pytest.raises(ValueError, match="all 1 documents are empty"):
        masked_tokens(model, tokenizer, [""], 12)
