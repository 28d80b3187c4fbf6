"""A classifier reads what its saved tokenizer gives, and nothing that a text says is a control token."""

import pytest
from classify_tiny import make_bert, make_gpt2, make_llama
from finetuning_tiny import make_base
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_scratch_gpt.finetuning.classifier_inputs import Frame, encode_for_classifier, load_classifier_tokenizer
from hf_scratch_gpt.model.tokenization_scratch_gpt import MASK, SPECIAL_TOKENS, TOOL_TOKENS

MAKERS = {"ours": make_base, "bert": make_bert, "gpt2": make_gpt2, "llama": make_llama}
CONTROL = (*SPECIAL_TOKENS, *TOOL_TOKENS, MASK, "[CLS]", "[SEP]", "[PAD]", "</s>")
PIECES = sorted(
    {token[start:end] for token in CONTROL for start in range(len(token)) for end in range(start + 1, len(token) + 1)}
)
LOOKALIKES = ["＜|endoftext|＞", "<\u200b|pad|>", "<|im＿end|>", "‹|im_start|›", "<｜pad｜>"]
TEXTS = (
    st.lists(st.sampled_from([*CONTROL, *PIECES, *LOOKALIKES, " ", "\n", "red", "blue"]), max_size=8)
    .map("".join)
    .filter(str.strip)
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """For each make: the tokenizer as it is trained with, and as the saved folder gives it."""
    root, made = tmp_path_factory.mktemp("tokenizers"), {}
    for name, make in MAKERS.items():
        ours = load_classifier_tokenizer(str(make(root / name)))
        ours.model_max_length = 40
        ours.save_pretrained(root / f"{name}-saved")
        made[name] = (ours, AutoTokenizer.from_pretrained(root / f"{name}-saved"))
    return made


def without_fixture_check(test):
    return settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)(test)


@pytest.mark.parametrize("name", MAKERS)
@without_fixture_check
@given(text=TEXTS, pair=TEXTS)
@example(text="<|im_start|>system\n<tool_call>", pair="<|pad|>" * 50)
@example(text="".join(CONTROL), pair="[SEP]")
def test_no_text_gives_a_control_token_and_the_saved_tokenizer_agrees(tokenizers, name, text, pair):
    ours, saved = tokenizers[name]
    control = {number for number, token in ours.added_tokens_decoder.items() if not token.content.isspace()}
    for pairs in (None, [pair]):
        encoded = encode_for_classifier(ours, [text], pairs, 40)
        frame = Frame.of(ours, pairs is not None)
        ids = encoded.input_ids[0]
        assert len(ids) <= 40
        unknown = {ours.unk_token_id}  # stands for any word
        assert [i for i in ids if i in control - unknown] == [*frame.before, *frame.between, *frame.after]
        again = saved(text, *(pairs or ()), truncation=True)
        assert again["input_ids"] == ids
        if encoded.token_type_ids is not None:
            assert again["token_type_ids"] == encoded.token_type_ids[0]


def test_texts_are_framed_as_their_model_reads_them(tokenizers):
    def tokens(name, *pairs):
        ours = tokenizers[name][0]
        return ours.convert_ids_to_tokens(encode_for_classifier(ours, ["red"], list(pairs) or None, 40).input_ids[0])

    assert tokens("ours")[-1] == "<|endoftext|>"
    assert (
        tokens("ours", "black")[-2:] == ["Ġblack"[1:], "<|endoftext|>"]
        or tokens("ours", "black")[-1] == "<|endoftext|>"
    )
    assert tokens("ours", "black").count("<|im_end|>") == 1
    assert tokens("bert", "blue") == ["[CLS]", "red", "[SEP]", "blue", "[SEP]"]
    assert encode_for_classifier(tokenizers["bert"][0], ["red"], ["blue"], 40).token_type_ids == [[0, 0, 0, 1, 1]]
    assert tokens("gpt2", "blue") == ["red", "<|endoftext|>", "blue", "<|endoftext|>"]
    assert tokens("llama") == ["red", "</s>"]


@pytest.mark.parametrize("name", MAKERS)
def test_padding_is_a_token_of_its_own(tokenizers, name):
    for tokenizer in tokenizers[name]:
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        ids = tokenizer(["red", "red blue green"], padding=True)["input_ids"]
        assert len(ids[0]) == len(ids[1])
        assert ids[0][-1] == tokenizer.pad_token_id


def test_long_texts_lose_their_ends_and_are_counted(tokenizers):
    ours = tokenizers["bert"][0]
    encoded = encode_for_classifier(ours, ["red " * 9, "blue"], None, 6)
    assert [len(row) for row in encoded.input_ids] == [6, 3]
    assert encoded.input_ids[0][-1] == ours.convert_tokens_to_ids("[SEP]")
    assert encoded.truncated == 1
    pairs = [("red " * 9, "blue " * 9, 4, 3), ("red " * 2, "blue " * 9, 2, 5), ("red " * 9, "blue", 6, 1)]
    for first, second, kept, rest in pairs:
        row = ours.convert_ids_to_tokens(encode_for_classifier(ours, [first], [second], 10).input_ids[0])
        assert (row.count("red"), row.count("blue")) == (kept, rest)
    with pytest.raises(ValueError, match="'max_length' is 2, of which control tokens take 2"):
        encode_for_classifier(ours, ["red"], None, 2)
