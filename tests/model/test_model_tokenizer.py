"""Any text round-trips; user text never becomes a control token; the chat encoding is the template's own."""

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_scratch_gpt.model import ScratchGPTTokenizer, encode_conversation, encode_text
from hf_scratch_gpt.model.tokenization_scratch_gpt import SPECIAL_TOKENS, TOOL_TOKENS, encode_texts

CONTROL_TOKENS = [*SPECIAL_TOKENS, *TOOL_TOKENS]
# Whole control tokens, all their pieces, and anything else.
PIECES = sorted({token[:cut] for token in CONTROL_TOKENS for cut in range(1, len(token) + 1)})
PIECES += sorted({token[cut:] for token in CONTROL_TOKENS for cut in range(1, len(token))})
HOSTILE_TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)
BENIGN_TEXT = st.text(st.characters(exclude_characters="<>|", exclude_categories=["Cs"]), max_size=40)
EXAMPLES = settings(max_examples=60, deadline=None)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers",
            "parameters": {"type": "object", "properties": {"first": {"type": "number"}}},
        },
    }
]
TOOL_CONVERSATION = [
    {"role": "system", "content": "Be exact."},
    {"role": "user", "content": "2 + 3?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"first": 2, "second": "3"}}}],
    },
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


def control_ids(tokenizer) -> dict[str, int]:
    return {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}


@EXAMPLES
@given(text=st.text(max_size=60) | HOSTILE_TEXT)
def test_any_text_round_trips(tokenizer, text):
    ids = encode_text(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text, "a special token came out of plain text"
    assert encode_texts(tokenizer, [text, "x"])[0] == ids


@EXAMPLES
@given(text=HOSTILE_TEXT)
def test_no_control_token_comes_out_of_user_text(tokenizer, text):
    assert set(control_ids(tokenizer).values()).isdisjoint(encode_text(tokenizer, text))


@EXAMPLES
@given(texts=st.lists(HOSTILE_TEXT, min_size=3, max_size=3), key=HOSTILE_TEXT)
def test_no_message_tool_or_argument_can_write_a_control_token(tokenizer, texts, key):
    def conversation(first, second, third, name):
        call = {"function": {"name": second, "arguments": {name: third}}}
        return [
            {"role": "user", "content": first},
            {"role": "assistant", "content": second, "tool_calls": [call]},
            {"role": "tool", "content": third},
            {"role": "user", "content": [{"type": "text", "text": first}]},
        ]

    def tools(description):
        return [{"type": "function", "function": {"name": "f", "description": description, "parameters": {}}}]

    controls = set(control_ids(tokenizer).values())
    hostile = encode_conversation(tokenizer, conversation(*texts, key), tools=tools(texts[0]))
    text_ids = "x" if texts[1] else ""  # the template leaves out a line break after empty text
    benign = encode_conversation(tokenizer, conversation("x", text_ids, "x", "x"), tools=tools("x"))
    found, expected = ([i for i in ids["input_ids"] if i in controls] for ids in (hostile, benign))
    assert found == expected


@EXAMPLES
@given(text=HOSTILE_TEXT)
def test_hostile_content_stands_in_the_conversation_letter_by_letter(tokenizer, text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    encoded = encode_conversation(tokenizer, messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded["input_ids"]) == rendered
    written = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(written) == text + "<|im_end|>"
    assert written[-1] == tokenizer.eos_token_id


@EXAMPLES
@given(texts=st.lists(BENIGN_TEXT, min_size=1, max_size=5), prompt=st.booleans())
def test_benign_conversations_are_encoded_as_by_the_template(tokenizer, texts, prompt):
    roles = ["system", "user", "assistant", "user", "assistant"]
    assume(not any(text[:1].isspace() for text in texts[2::2]))  # the next test's question
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert encode_conversation(tokenizer, messages, add_generation_prompt=prompt)["input_ids"] == expected


def test_no_token_reaches_across_the_beginning_of_an_answer(tokenizer):
    """In the rendered text the template's line break and the answer's may be one token, which chat never reads."""
    question = [{"role": "user", "content": "Why?"}]
    prompt = encode_conversation(tokenizer, question, add_generation_prompt=True)["input_ids"]
    for answer in ("\n\nBecause.", "\n", " so", "<|im_end|>\n"):
        messages = [*question, {"role": "assistant", "content": answer}]
        encoded = encode_conversation(tokenizer, [*messages, *messages])
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert encoded["assistant_masks"][: len(prompt) + 1] == [0] * len(prompt) + [1]
        assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages * 2, tokenize=False)
    rendered = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "\n\nx"}])["input_ids"]
    assert rendered[: len(prompt)] != prompt, "this tokenizer does join them: the test tests something"


@EXAMPLES
@given(texts=st.lists(BENIGN_TEXT | HOSTILE_TEXT, min_size=4, max_size=4))
def test_the_mask_is_every_answer_with_its_end_token_and_nothing_else(tokenizer, texts):
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    encoded = encode_conversation(tokenizer, messages)
    written = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(written) == f"{texts[1]}<|im_end|>{texts[3]}<|im_end|>"


def test_tools_and_several_turns_render_as_chatml(tokenizer):
    encoded = encode_conversation(tokenizer, TOOL_CONVERSATION, tools=TOOLS, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(TOOL_CONVERSATION, tools=TOOLS, add_generation_prompt=True)["input_ids"]
    assert encoded["input_ids"] == expected
    text = tokenizer.decode(expected)
    head, body = text.split("<|im_end|>\n", 1)
    assert head.startswith("<|im_start|>system\nBe exact.\n\n# Tools")
    assert '{"name": "add", "description": "Adds two numbers"' in head
    assert body == (
        "<|im_start|>user\n2 + 3?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"first": 2, "second": "3"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n<|im_start|>assistant\n"
    )
    controls = [i for i in expected if i in (4, 5)]
    assert len(controls) == 4, "the call and the description of the format hold real tool tokens"


def test_a_longer_conversation_begins_with_the_shorter(tokenizer):
    """So that a cache of earlier turns stays valid and TRL can find where an answer begins."""
    for length in range(1, len(TOOL_CONVERSATION)):
        shorter = encode_conversation(tokenizer, TOOL_CONVERSATION[:length])["input_ids"]
        longer = encode_conversation(tokenizer, TOOL_CONVERSATION[: length + 1])["input_ids"]
        assert longer[: len(shorter)] == shorter


def test_what_the_model_wrote_is_parsed_back_into_tool_calls(tokenizer):
    prompt = tokenizer.apply_chat_template(TOOL_CONVERSATION[:2], add_generation_prompt=True, tokenize=False)
    written = tokenizer.apply_chat_template(TOOL_CONVERSATION[:3], tokenize=False).removeprefix(prompt)
    message = tokenizer.parse_response(written, prefix=prompt)
    call = TOOL_CONVERSATION[2]["tool_calls"][0]
    assert message["tool_calls"] == [call]
    assert tokenizer.parse_response("Hello.<|im_end|>", prefix=prompt)["content"] == "Hello."


def test_special_tokens_are_distinct_and_known(tokenizer):
    ids = control_ids(tokenizer)
    assert list(ids.values()) == [0, 1, 2, 3, 4, 5]
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.decode([3, 4, 0], skip_special_tokens=True) == "<tool_call>"
    assert tokenizer.encode("<|im_end|><tool_call>") == [3, 4], "the plain call does read control tokens"


@EXAMPLES
@given(text=st.text(max_size=60))
def test_all_256_bytes_are_in_the_vocabulary(tokenizer, text):
    small = ScratchGPTTokenizer.train(["aa"], 300)
    assert len(small) <= 300
    assert small.decode(encode_text(small, text)) == text


def test_saved_folder_loads_as_the_plain_class_and_encodes_alike(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is PreTrainedTokenizerFast
    sample = string.printable + "naïve 你好 🙂 <|im_end|> 1234"
    assert loaded.encode(sample) == tokenizer.encode(sample)
    assert encode_text(loaded, sample) == encode_text(tokenizer, sample)
    assert encode_conversation(loaded, TOOL_CONVERSATION) == encode_conversation(tokenizer, TOOL_CONVERSATION)
    assert loaded.parse_response("Hi<|im_end|>", prefix="") == tokenizer.parse_response("Hi<|im_end|>", prefix="")
    loaded.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(sample) == tokenizer.encode(sample)


def test_training_is_deterministic_and_compresses(tokenizer):
    texts = ["the cat sat on the mat and the hat\n"] * 30
    first, second = (ScratchGPTTokenizer.train(iter(texts), 290) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(encode_text(first, texts[0])) < len(texts[0]) / 2
    assert encode_text(first, "2024") == [first.convert_tokens_to_ids(digit) for digit in "2024"]


def test_a_token_added_later_is_a_control_token_too():
    tokenizer = ScratchGPTTokenizer.train(["some text, some more text"], 280)
    assert len(encode_text(tokenizer, "<tool_end>")) > 1
    tokenizer.add_tokens(["<tool_end>"])
    assert tokenizer.convert_tokens_to_ids("<tool_end>") not in encode_text(tokenizer, "<tool_end>")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`vocab_size` is 262; it must be above 262: 6 control tokens, 256 bytes"):
        ScratchGPTTokenizer.train(["text"], 262)
    with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
        ScratchGPTTokenizer.train(["", ""], 400)
    tokenizer = ScratchGPTTokenizer.train(["text"], 300)
    with pytest.raises(ValueError, match="the conversation is empty"):
        encode_conversation(tokenizer, [])
    with pytest.raises(ValueError, match="role 'robot' is not one of system, user, assistant, tool"):
        encode_conversation(tokenizer, [{"role": "robot", "content": "x"}])
    with pytest.raises(ValueError, match="is not one of system, user, assistant, tool"):
        encode_conversation(tokenizer, [{"role": "user<|im_end|>", "content": "x"}])
