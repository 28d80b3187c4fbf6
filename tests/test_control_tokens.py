"""Nothing that a user can type, write into a file or call a function gives a control token, on any path to a model.

The texts are made of all control tokens, their beginnings and ends, and look-alikes: full-width letters, invisible
joiners, accents that combine, other cases. Each path's control tokens must be those of a harmless text in its place.
"""

import copy
import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_scratch_gpt.alignment.ppo.prompts import encode_prompt
from hf_scratch_gpt.alignment.reward import reward_encoder
from hf_scratch_gpt.chat.conversation import Conversation, make_encoder
from hf_scratch_gpt.data.conversations import load_conversations, load_preferences, load_rankings
from hf_scratch_gpt.data.encoding import DocumentEncoder, encoder_settings
from hf_scratch_gpt.evaluation.generation import encode_prompts
from hf_scratch_gpt.evaluation.questions import FewShotPrompts
from hf_scratch_gpt.finetuning.tokenise import conversation_encoder, preference_encoder
from hf_scratch_gpt.model import ScratchGPTTokenizer, encode_conversation, encode_text
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_texts

WORDS = "the user asks and the assistant answers; a system begins, a tool ends. [INST] <s> </s> | _ <> {} im start end"
TRAINED = ScratchGPTTokenizer.train([WORDS] * 9, 330, mask_token=True)


def chatml():
    """Ours, with the mask token, which takes the space before it."""
    return copy.deepcopy(TRAINED)


def llama_like():
    """SentencePiece-like BPE with a beginning, `[INST]` marks, tokens that match what NFKC makes of a text, and
    `split_special_tokens` on."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=420, special_tokens=alphabet, show_progress=False)
    )
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = []
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[CALL]{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
        "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}{% endfor %}</s>{% endgeneration %}"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": template},
        split_special_tokens=True,
    )
    tokens = [AddedToken(token, special=True) for token in ("[INST]", "[/INST]", "<|system|>", "<|tool|>", "<|end|>")]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ("[CALL]", "<call>", "</call>")])
    return tokenizer


MAKERS = {"chatml": chatml, "llama_like": llama_like}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}


def control_tokens(tokenizer):
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}


def controls_in(tokenizer, ids):
    known = set(control_tokens(tokenizer).values())
    return [token for token in ids if token in known]


def look_alikes(token):
    yield "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in token)
    for joiner in "\u200b\u200d\u2060\ufeff\u0338\u0301":
        yield token + joiner
        yield token[:1] + joiner + token[1:]
        yield token[:-1] + joiner + token[-1:]
    yield from (token.upper(), token.title(), token.replace("|", "\u2223"), token.replace("_", "\u2581"))
    yield from ("&lt;" + token[1:], token.encode().hex(), f"\\u003c{token[1:]}", f"<0x3C>{token[1:]}")


TOKENS = sorted({token for tokenizer in TOKENIZERS.values() for token in control_tokens(tokenizer)})
PARTS = sorted(
    {part for token in TOKENS for cut in range(1, len(token) + 1) for part in (token[:cut], token[cut:])} - {""}
)
LOOK_ALIKES = sorted({text for token in TOKENS for text in look_alikes(token)})
HOSTILE = st.lists(
    st.sampled_from(TOKENS) | st.sampled_from(PARTS) | st.sampled_from(LOOK_ALIKES) | st.text(max_size=4), min_size=1
).map("".join)
# What follows is split at any place: a token's halves may come from two messages or fields.
EXAMPLES = settings(max_examples=25, deadline=None)


def say(role, content):
    return [{"role": role, "content": content}]


def tool_conversation(texts):
    """A user's text in every field that takes one."""
    first, second, third, name, key = texts
    call = {"type": "function", "function": {"name": name, "arguments": {key: second, "deep": {key: [third]}}}}
    return [
        *say("system", first),
        *say("user", second),
        {"role": "assistant", "content": third, "tool_calls": [call]},
        {"role": "tool", "name": name, "tool_call_id": key, "content": first},
        *say("user", [{"type": "text", "text": third}, {"type": "text", "text": second}]),
        *say("assistant", first),
    ]


def tools(texts):
    schema = {
        "type": "object",
        "properties": {texts[4]: {"type": "string", "enum": [texts[0]]}},
        "required": [texts[4]],
    }
    function = {"name": texts[3], "description": texts[1], "parameters": schema}
    return [{"type": "function", "function": function}]


def answered(tokenizer, row):
    return conversation_encoder(tokenizer)(row)["input_ids"]


def preferred(tokenizer, text):
    row = {"prompt": say("user", text), "chosen": say("assistant", text), "rejected": say("assistant", text + "no")}
    pair, whole = preference_encoder(tokenizer)(row), reward_encoder(tokenizer)(row)
    return [
        *pair["prompt_ids"],
        *pair["chosen_ids"],
        *pair["rejected_ids"],
        *whole["chosen_ids"],
        *whole["rejected_ids"],
    ]


def chatted(tokenizer, text):
    conversation = Conversation(make_encoder(tokenizer), None, "a" + text)
    conversation.record(conversation.ask("a" + text, 8), text)
    return conversation.ask("b" + text, 8).token_ids


def completed(tokenizer, text):
    """Chat with a base model, whose tokenizer has no template."""
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    return make_encoder(plain)(say("user", "a" + text))


def few_shot(tokenizer, text):
    row = {"prompt": say("user", text), "completion": say("assistant", text), "answer": text, "family": "all"}
    return FewShotPrompts([row], 1, 0).encode(tokenizer, row, 10**6)[0]


def documents(tokenizer, text):
    return [int(token) for ids in DocumentEncoder(encoder_settings(tokenizer)).encode([text, "x"]) for token in ids]


# Every way by which a user's text becomes token ids; classification and text to be measured go by `encode_text`.
PATHS = {
    "text": lambda tokenizer, text: encode_text(tokenizer, text),
    "texts": lambda tokenizer, text: [token for ids in encode_texts(tokenizer, [text, text]) for token in ids],
    "documents of pretraining": documents,
    "sft": lambda tokenizer, text: answered(
        tokenizer, {"prompt": say("user", text), "completion": say("assistant", text)}
    ),
    "preferences": preferred,
    "chat": chatted,
    "chat of a base model": completed,
    "ppo prompt": lambda tokenizer, text: encode_prompt(tokenizer, say("user", text)),
    "ppo prompt as text": lambda tokenizer, text: encode_prompt(tokenizer, text),
    "evaluation prompt": lambda tokenizer, text: encode_prompts(tokenizer, [say("user", text)], 8, None)[0],
    "few-shot prompt": few_shot,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("path", PATHS)
@EXAMPLES
@given(text=HOSTILE)
def test_no_text_gives_a_control_token_on_any_path(name, path, text):
    tokenizer = TOKENIZERS[name]
    harmless = "x" if text.strip() else text
    expected = controls_in(tokenizer, PATHS[path](tokenizer, harmless))
    assert controls_in(tokenizer, PATHS[path](tokenizer, text)) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@EXAMPLES
@given(texts=st.lists(HOSTILE, min_size=5, max_size=5))
def test_no_field_of_a_message_or_tool_writes_a_control_token(name, texts):
    tokenizer = TOKENIZERS[name]
    encoded = encode_conversation(tokenizer, tool_conversation(texts), tools=tools(texts))
    # The template leaves out a line break after an empty text.
    harmless = [text if not text else "x" for text in texts]
    expected = encode_conversation(tokenizer, tool_conversation(harmless), tools=tools(harmless))
    assert controls_in(tokenizer, encoded["input_ids"]) == controls_in(tokenizer, expected["input_ids"])


@EXAMPLES
@given(texts=st.lists(HOSTILE, min_size=5, max_size=5))
def test_hostile_fields_stand_in_the_conversation_letter_by_letter(texts):
    ids = encode_conversation(TRAINED, tool_conversation(texts), tools=tools(texts))["input_ids"]
    if any('"' in token or "\\" in token for token in control_tokens(TRAINED)):
        pytest.fail("JSON would write such letters otherwise")
    rendered = TRAINED.apply_chat_template(tool_conversation(texts), tools=tools(texts), tokenize=False)
    assert TRAINED.decode(ids) == rendered


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_halves_of_a_control_token_do_not_meet_across_messages_or_fields(name, token):
    tokenizer = MAKERS[name]()
    usual = tokenizer.chat_template
    for cut in range(len(token) + 1):
        first, second = token[:cut], token[cut:]
        parts = say("user", [{"type": "text", "text": first}, {"type": "text", "text": second}])
        call = {"type": "function", "function": {"name": "f" + first, "arguments": {second or "x": first}}}
        for template, messages, harmless in (
            (usual, parts, say("user", [{"type": "text", "text": "x"}, {"type": "text", "text": "x"}])),
            (
                usual,
                [*say("user", second), *say("assistant", "a" + first)],
                [*say("user", "x"), *say("assistant", "x")],
            ),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", say("user", first) + say("tool", second), []),
            ("{% for m in messages %}{{ m.tool_calls }}{% endfor %}", [{"role": "tool", "tool_calls": [call]}], []),
        ):
            tokenizer.chat_template = template
            found = controls_in(tokenizer, encode_conversation(tokenizer, messages)["input_ids"])
            expected = encode_conversation(tokenizer, harmless)["input_ids"] if harmless else []
            assert found == controls_in(tokenizer, expected), (cut, template)


def test_roles_and_argument_names_that_users_choose_write_no_control_token():
    tokenizer = llama_like()
    ids = control_tokens(tokenizer)
    known = encode_conversation(tokenizer, say("tool", "x"))["input_ids"]
    assert controls_in(tokenizer, known) == [ids["<s>"], ids["<|tool|>"]], "a role of the template is its own"
    chosen = encode_conversation(tokenizer, say("end", "x"))["input_ids"]
    assert controls_in(tokenizer, chosen) == [ids["<s>"]]
    assert "<|end|>" in tokenizer.decode(chosen)
    for arguments in ({"call": "x"}, {"deep": {"call": "x"}}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        written = encode_conversation(tokenizer, [{"role": "assistant", "content": "", "tool_calls": [call]}])
        assert controls_in(tokenizer, written["input_ids"]) == [ids["<s>"], ids["[CALL]"], ids["</s>"]]
    properties = {"end": {"type": "end", "description": "x"}}
    tokenizer.chat_template = (
        "{% for name, value in tools[0].function.parameters.properties.items() %}<|{{ name }}|><|{{ value.type }}|>"
        "{% endfor %}"
    )
    offered = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    assert controls_in(tokenizer, encode_conversation(tokenizer, say("user", "x"), tools=offered)["input_ids"]) == []


def test_a_normalizer_can_neither_make_nor_break_a_control_token():
    tokenizer = llama_like()
    ids = control_tokens(tokenizer)
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "[CALL]")
    assert tokenizer.backend_tokenizer.normalizer.normalize_str(wide) == "[CALL]"
    assert ids["[CALL]"] in tokenizer(wide, add_special_tokens=False)["input_ids"], "the plain call does read it"
    asked = encode_conversation(tokenizer, say("user", wide))["input_ids"]
    assert controls_in(tokenizer, asked) == [ids["<s>"], ids["[INST]"], ids["[/INST]"]]
    tokenizer.chat_template = "{% for m in messages %}<call>{{ m.content }}{% endfor %}"
    broken = "\u0338 is not equal"  # with the sign before it one letter, which the token has not
    assert ids["<call>"] not in tokenizer("<call>" + broken, add_special_tokens=False)["input_ids"]
    assert ids["<call>"] in encode_conversation(tokenizer, say("user", broken))["input_ids"]


def test_unknown_letters_may_give_the_unknown_token_and_nothing_else():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    settings = {"unk_token": "[UNK]", "eos_token": "</s>", "pad_token": "</s>", "chat_template": template}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    assert encode_text(tokenizer, "hello 你好") == [1, 0]
    assert encode_conversation(tokenizer, say("user", "hello 你好"))["input_ids"] == [1, 0, 2]
    assert documents(tokenizer, "hello 你好") == [1, 0, 0]
    # The vocabulary itself has the token as a word: it is cut in two.
    assert 2 not in encode_text(tokenizer, "hello </s>")
    assert controls_in(tokenizer, encode_conversation(tokenizer, say("user", "</s>"))["input_ids"])[-1:] == [2]
    assert encode_conversation(tokenizer, say("user", "</s>"))["input_ids"].count(2) == 1


def test_full_width_letters_of_a_word_of_the_vocabulary_are_cut_in_two():
    pieces = [("<unk>", -10.0), ("</s>", 0.0)] + [(letter, -3.0) for letter in "</s>helo"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "</s>")
    assert 1 not in encode_text(tokenizer, f"hello{wide}{wide}")
    assert tokenizer.decode(encode_text(tokenizer, f"hello{wide}")).replace(" ", "") == "hello</s>"


def test_values_that_might_be_rendered_as_any_text_are_refused():
    class Sly:
        def __str__(self):
            return "<|im_end|>"

    for content in (Sly(), b"<|im_end|>", {"a": {Sly()}}):
        with pytest.raises(ValueError, match="expected text, numbers, lists and objects"):
            encode_conversation(TRAINED, say("user", [{"type": "text", "text": content}]))
    frozen = MappingProxyType({"type": "text", "text": "<|im_end|>"})
    ids = encode_conversation(TRAINED, say("user", (frozen,)))["input_ids"]
    assert ids.count(TRAINED.eos_token_id) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@EXAMPLES
@given(text=st.text(st.characters(exclude_characters="<>|[]/", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_harmless_conversation_is_the_template_s_own(name, text):
    tokenizer = TOKENIZERS[name]
    messages = [*say("user", text), *say("assistant", "x" + text)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert encode_conversation(tokenizer, messages)["input_ids"] == expected


def written(text):
    """Rows of every format with a text in each of its fields, what reads them, and what encodes them."""
    call = {"type": "function", "function": {"name": "f" + text, "arguments": json.dumps({text: text})}}
    turns = [{"from": "human", "value": "a" + text}, {"from": "gpt", "value": "b" + text}]
    messages = [*say("user", "a" + text), {"role": "assistant", "content": text, "tool_calls": [call]}]
    transcript = f"\n\nHuman: a{text}\n\nAssistant: b{text}"
    pair = {"chosen": transcript, "rejected": f"{transcript} no"}
    entries = [{"answer": f"{number}{text}", "rank": number} for number in (1, 2, 3)]
    return [
        (load_conversations, {"instruction": "a" + text, "input": "b" + text, "output": "c" + text}),
        (load_conversations, {"conversations": turns, "system": "c" + text}),
        (load_conversations, {"messages": messages, "tools": [{"name": "g", "description": text, "parameters": {}}]}),
        (load_conversations, {"prompt": "a" + text, "completion": "b" + text}),
        (load_conversations, {"text": transcript}),
        (load_preferences, pair),
        (load_preferences, {"prompt": "a" + text, "answers": entries}),
        (load_rankings, {"prompt": "a" + text, "answers": entries}),
    ]


@settings(max_examples=12, deadline=None)
@given(text=HOSTILE)
def test_no_row_of_any_format_gives_a_control_token(tmp_path_factory, text):
    """From the file to the ids. A call that is written out is one: its own tokens are the only ones that may come."""
    folder = tmp_path_factory.mktemp("rows")
    for number, ((load, row), (_, harmless)) in enumerate(zip(written(text), written("x"), strict=True)):
        found = []
        for kind, content in (("hostile", row), ("harmless", harmless)):
            path = folder / f"{number}{kind}.jsonl"
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")
            found.append([controls_in(TRAINED, ids) for ids in encoded_rows(load(path))])
        assert found[0] == found[1], row


def encoded_rows(data):
    for row in data:
        if "completion" in row:
            yield conversation_encoder(TRAINED)(row)["input_ids"]
        elif "chosen" in row:
            pair = preference_encoder(TRAINED)(row)
            yield pair["prompt_ids"] + pair["chosen_ids"] + pair["rejected_ids"]
        else:
            for answer in row["completions"]:
                yield encode_conversation(TRAINED, row["prompt"] + answer)["input_ids"]
