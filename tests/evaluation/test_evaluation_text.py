"""Bits per byte equal a naive computation, and do not depend on batches and windows."""

import math

import pytest
import torch

from hf_scratch_gpt.evaluation.text import _split, bits_per_byte, separator_id
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_text

DOCUMENTS = ["def f(x):\n    return x\n" * 4, "Grüße, 世界!", "", "a", "import os <|im_end|> plain <|endoftext|>"]


def naive_bits(model, tokenizer, text, context_length, stride):
    """One forward pass a token, with the context that the windows of `bits_per_byte` promise."""
    token_ids = [separator_id(tokenizer), *encode_text(tokenizer, text)]
    total = 0.0
    for target in range(1, len(token_ids)):
        if target <= context_length:
            begin = 0
        else:
            end = context_length + stride * math.ceil((target - context_length) / stride)
            begin = min(end, len(token_ids) - 1) - context_length
        with torch.no_grad():
            logits = model(torch.tensor([token_ids[begin:target]])).logits[0, -1]
        total -= torch.log_softmax(logits.double(), -1)[token_ids[target]].item() / math.log(2)
    return total


@pytest.mark.parametrize(("context_length", "stride"), [(16, 8), (16, 16), (24, 5), (128, 64)])
def test_equals_one_token_at_a_time(tiny_model, tiny_tokenizer, context_length, stride):
    score = bits_per_byte(tiny_model, tiny_tokenizer, DOCUMENTS, context_length, batch_size=3, stride=stride)
    expected = sum(naive_bits(tiny_model, tiny_tokenizer, text, context_length, stride) for text in DOCUMENTS)
    assert score.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert score.bits == pytest.approx(expected, rel=1e-5)
    assert score.mean == pytest.approx(expected / score.bytes, rel=1e-5)
    assert score.n == 4
    assert score.low <= score.mean <= score.high


def test_does_not_depend_on_batches_or_the_order_of_documents(tiny_model, tiny_tokenizer):
    first = bits_per_byte(tiny_model, tiny_tokenizer, DOCUMENTS, 16, batch_size=1)
    again = bits_per_byte(tiny_model, tiny_tokenizer, DOCUMENTS[::-1], 16, batch_size=7)
    assert again.bits == pytest.approx(first.bits, rel=1e-5)


def test_windows_do_not_matter_where_a_document_fits_into_one(tiny_model, tiny_tokenizer):
    scores = [
        bits_per_byte(tiny_model, tiny_tokenizer, ["one line of text"], 64, stride=stride).bits for stride in (1, 64)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 40, 101])
@pytest.mark.parametrize("stride", [1, 8, 16])
def test_each_token_is_predicted_exactly_once(length, stride):
    predicted = []
    for window in _split(0, list(range(length)), 16, stride):
        assert len(window.token_ids) <= 17
        predicted += window.token_ids[-window.predicted :]
    assert predicted == list(range(1, length))


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(new_model, tiny_tokenizer):
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    score = bits_per_byte(model, tiny_tokenizer, ["bytes are tokens here"], 16)
    assert score.mean == pytest.approx(math.log2(264))
    assert score.as_dict()["tokens"] == 21


def test_special_tokens_in_a_document_are_plain_text(tiny_model, tiny_tokenizer):
    text = "<|endoftext|>"
    assert bits_per_byte(tiny_model, tiny_tokenizer, [text], 64).tokens == len(text)


def test_mistakes_are_named(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="all 2 documents are empty"):
        bits_per_byte(tiny_model, tiny_tokenizer, ["", ""], 16)
    with pytest.raises(ValueError, match="stride 17 of 16"):
        bits_per_byte(tiny_model, tiny_tokenizer, ["a"], 16, stride=17)
