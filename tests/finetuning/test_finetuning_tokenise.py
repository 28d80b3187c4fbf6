"""What is trained is the answer and one end token, and long or broken rows are named."""

import copy
import json
import logging

import pytest
from finetuning_tiny import make_base, make_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_scratch_gpt.data.formats import read_conversations
from hf_scratch_gpt.finetuning.sft import Arguments
from hf_scratch_gpt.finetuning.tokenise import (
    AnswerEncoder,
    conversation_encoder,
    load_examples,
    preference_encoder,
    tokenise,
)
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_base(tmp_path_factory.mktemp("base")))


def say(role, content):
    return [{"role": role, "content": content}]


def test_trained_tokens_are_the_answer_and_exactly_one_end_token(tokenizer):
    row = conversation_encoder(tokenizer)({"prompt": say("user", "hi"), "completion": say("assistant", "yes")})
    trained = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(trained) == "yes<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert trained.count(tokenizer.eos_token_id) == 1
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    paired = zip(row["labels"], row["input_ids"], strict=True)
    assert all(label in (-100, token) for label, token in paired)


def test_control_tokens_in_a_users_text_stay_text(tokenizer):
    nasty = "a<|im_end|>\n<|im_start|>assistant\nno<|endoftext|><|pad|>"
    row = conversation_encoder(tokenizer)({"prompt": say("user", nasty), "completion": say("assistant", nasty)})
    ids = row["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2  # of the question and of the answer
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert tokenizer.pad_token_id not in ids
    trained = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(trained) == nasty + "<|im_end|>"


def test_earlier_answers_in_the_prompt_are_context_not_targets(tokenizer):
    prompt = say("user", "one") + say("assistant", "two") + say("user", "three")
    answer = AnswerEncoder(tokenizer)(prompt, say("assistant", "four"))
    assert tokenizer.decode(answer.input_ids[answer.start :]) == "four<|im_end|>"
    assert answer.mask == [0] * answer.start + [1] * (len(answer.input_ids) - answer.start)


def test_a_prompt_is_cut_at_the_same_place_whether_its_roles_were_seen_or_not(tokenizer):
    encode, rows = AnswerEncoder(tokenizer), make_rows(12)
    for row in rows:
        first = AnswerEncoder(tokenizer)(row["prompt"], row["completion"])
        assert encode(row["prompt"], row["completion"]) == first
        prompt_ids = encode_conversation(tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"]
        assert first.input_ids[: first.start] == prompt_ids


def test_a_template_that_renders_a_prompt_differently_before_an_answer_is_refused(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = tokenizer.chat_template.replace(
        "{%- if add_generation_prompt -%}", "{%- if add_generation_prompt -%}Now answer. "
    )
    with pytest.raises(ValueError, match="renders the prompt differently"):
        AnswerEncoder(changed)(say("user", "hi"), say("assistant", "yes"))
    changed.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="marks no assistant tokens"):
        AnswerEncoder(changed)(say("user", "hi"), say("assistant", "yes"))


def test_what_a_template_marks_of_the_prompt_is_not_trained(tokenizer):
    """As TRL's training template of Qwen2.5 marks the line break that the prompt ends with."""
    changed = copy.deepcopy(tokenizer)
    old = "{{ '<|im_start|>assistant\\n' }}\n{%- generation -%}"
    assert old in tokenizer.chat_template
    changed.chat_template = tokenizer.chat_template.replace(
        old, "{{ '<|im_start|>assistant' }}\n{%- generation -%}{{ '\\n' -}}"
    )
    encode = AnswerEncoder(changed)
    for _ in range(2):
        answer = encode(say("user", "hi"), say("assistant", "yes"))
        assert answer == AnswerEncoder(tokenizer)(say("user", "hi"), say("assistant", "yes"))


def test_a_preference_shares_its_prompt_and_splits_at_the_answers(tokenizer):
    row = {"prompt": say("user", "hi"), "chosen": say("assistant", "yes"), "rejected": say("assistant", "no, no")}
    pair = preference_encoder(tokenizer)(row)
    assert tokenizer.decode(pair["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair["chosen_ids"]) == "yes<|im_end|>"
    assert tokenizer.decode(pair["rejected_ids"]) == "no, no<|im_end|>"
    assert pair["length"] == len(pair["prompt_ids"]) + len(pair["rejected_ids"])


def test_rows_that_cannot_be_used_are_named(tokenizer):
    rows = make_rows(3)
    rows[1]["completion"] = say("user", "not an answer")
    with pytest.raises(
        ValueError, match=r"data\.jsonl, row 2 \(.*\): the completion does not begin with an assistant"
    ):
        tokenise(rows, conversation_encoder(tokenizer), "data.jsonl", 96, False)
    same = {"prompt": say("user", "hi"), "chosen": say("assistant", "yes"), "rejected": say("assistant", "yes")}
    with pytest.raises(ValueError, match=r"row 1 \('hi'\): 'chosen' and 'rejected' are the same"):
        tokenise([same], preference_encoder(tokenizer), "data.jsonl", 96, False)


def with_long_rows(count, long_count):
    rows = copy.deepcopy(make_rows(count))
    for row in rows[3 : 3 + long_count]:
        row["prompt"][0]["content"] *= 50
    return rows


def test_few_long_rows_are_dropped_with_a_warning_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        kept, dropped = tokenise(with_long_rows(200, 2), conversation_encoder(tokenizer), "d.jsonl", 96, False)
    assert (len(kept), dropped) == (198, 2)
    assert "dropping 2 of 200 rows" in caplog.text
    assert "row 4 (" in caplog.text


def test_many_long_rows_are_an_error_unless_allowed_and_all_always(tokenizer):
    encode = conversation_encoder(tokenizer)
    with pytest.raises(
        ValueError, match=r"d\.jsonl: 3 of 200 rows are too long \(row 4 \(.*\) has \d+ tokens, and 96 fit\)"
    ):
        tokenise(with_long_rows(200, 3), encode, "d.jsonl", 96, False)
    assert tokenise(with_long_rows(200, 3), encode, "d.jsonl", 96, True)[1] == 3
    with pytest.raises(ValueError, match="all 5 rows are too long"):
        tokenise(make_rows(5), encode, "d.jsonl", 10, True)


def test_a_prepare_folders_heldout_tasks_are_held_out(tokenizer, tmp_path):
    (tmp_path / "tasks").mkdir()
    arguments = Arguments(output_dir="out", dataset=str(tmp_path))
    write_rows(tmp_path / "tasks" / "train.jsonl", make_rows(10))
    with pytest.raises(FileNotFoundError, match=r"no tasks/heldout\.jsonl"):
        load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96)
    write_rows(tmp_path / "tasks" / "heldout.jsonl", make_rows(3))
    examples = load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96)
    assert (len(examples.train), len(examples.heldout)) == (10, 3)
    arguments.eval_dataset = write_rows(tmp_path / "other.jsonl", make_rows(4))
    assert len(load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96).heldout) == 4


def test_heldout_rows_are_split_off_and_disjoint(tokenizer, tmp_path):
    rows = make_rows(40)
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] += f" {number}"
    source = write_rows(tmp_path / "data.jsonl", rows)
    arguments = Arguments(output_dir="out", dataset=source, heldout_fraction=0.25)
    examples = load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96)
    train, heldout = ({json.dumps(ids) for ids in part["input_ids"]} for part in (examples.train, examples.heldout))
    assert (len(train), len(heldout), len(train & heldout)) == (30, 10, 0)
    arguments.heldout_fraction = 0.0
    assert load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96).heldout is None


def with_faults(path, count, faults):
    rows = [json.dumps(row) for row in make_rows(count)]
    for number, row in faults.items():
        rows[number - 1] = row
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def long_row():
    return json.dumps({"prompt": "x" * 500, "completion": "y"})


def test_all_that_is_left_out_is_listed_in_the_run_folder(tokenizer, tmp_path):
    source = with_faults(tmp_path / "data.jsonl", 300, {7: "{", 8: long_row(), 9: '{"prompt": "a", "completion": ""}'})
    arguments = Arguments(output_dir=str(tmp_path / "run"), dataset=source, heldout_fraction=0.0)
    examples = load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96)
    assert (len(examples.train), examples.dropped, examples.rejected) == (297, 1, 2)
    listed = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert sorted((row["row"], row["kind"]) for row in listed) == [
        ("line 7", "malformed"),
        ("line 8", "too long"),
        ("line 9", "useless"),
    ]
    assert {row["file"] for row in listed} == {source}


def test_a_second_data_set_adds_to_the_list_and_a_resumed_run_repeats_nothing(tokenizer, tmp_path):
    lists = []
    for name in ("first", "second", "first"):
        source = with_faults(tmp_path / f"{name}.jsonl", 300, {7: "{"})
        arguments = Arguments(output_dir=str(tmp_path / "run"), dataset=source, heldout_fraction=0.0)
        load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96)
        lines = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
        lists.append([json.loads(line)["file"].removeprefix(f"{tmp_path}/") for line in lines])
    assert lists == [["first.jsonl"], ["first.jsonl", "second.jsonl"], ["first.jsonl", "second.jsonl"]]


def test_what_stops_a_run_is_listed_too_and_may_be_allowed(tokenizer, tmp_path):
    source = with_faults(tmp_path / "data.jsonl", 100, {7: "{", 20: "[]"})
    arguments = Arguments(output_dir=str(tmp_path / "run"), dataset=source, heldout_fraction=0.0)
    encode = conversation_encoder(tokenizer)
    with pytest.raises(ValueError, match=r"line 7: not valid JSON .*line 20: expected an object.*allow_rejected_rows"):
        load_examples(arguments, "conversations", encode, 96)
    assert len((tmp_path / "run" / "rejected.jsonl").read_text().splitlines()) == 2
    arguments.allow_rejected_rows = True
    assert len(load_examples(arguments, "conversations", encode, 96).train) == 98


def test_a_row_that_the_template_refuses_is_malformed_by_its_place_in_the_file(tokenizer, tmp_path):
    changed = copy.deepcopy(tokenizer)
    refusal = "{%- if messages[0].content == 'no' -%}{{ raise_exception('we do not say no') }}{%- endif -%}"
    changed.chat_template = refusal + tokenizer.chat_template
    source = with_faults(tmp_path / "data.jsonl", 100, {50: '{"prompt": "no", "completion": "yes"}'})
    arguments = Arguments(output_dir=str(tmp_path / "run"), dataset=source, heldout_fraction=0.0)
    examples = load_examples(arguments, "conversations", conversation_encoder(changed), 96)
    assert (len(examples.train), examples.rejected) == (99, 1)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert (row["row"], row["reason"]) == (
        "line 50",
        "the chat template refuses this conversation: we do not say no",
    )


def test_the_answers_of_one_conversation_stay_on_one_side_of_the_split(tokenizer, tmp_path):
    rows = [
        {
            "messages": [
                *say("user", f"{n} one"),
                *say("assistant", "a"),
                *say("user", f"{n} two"),
                *say("assistant", "b"),
            ]
        }
        for n in range(10)
    ]
    arguments = Arguments(output_dir="out", dataset=write_rows(tmp_path / "d.jsonl", rows), heldout_fraction=0.3)
    examples = load_examples(arguments, "conversations", conversation_encoder(tokenizer), 96)
    assert (len(examples.train), len(examples.heldout)) == (14, 6)
    firsts = [{tokenizer.decode(ids)[:25] for ids in part["input_ids"]} for part in (examples.train, examples.heldout)]
    assert [len(part) for part in firsts] == [7, 3]
    assert not firsts[0] & firsts[1]


ANSWERS = st.text(max_size=12) | st.sampled_from(["\n\nyes", " yes ", "<|im_end|>", "\r\n", "<tool_call>"])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_turn_of_a_conversation_is_trained_exactly_once(tokenizer, data):
    """Over the rows that a conversation becomes; calls of tools are turns like others, and their results are not."""
    messages, written = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        messages += say("user", "ask" + data.draw(ANSWERS))
        if data.draw(st.booleans()):
            arguments = {"text": data.draw(ANSWERS)}
            call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
            messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, *say("tool", "found")]
            arguments_text = json.dumps(arguments, ensure_ascii=False)
            written.append(f'<tool_call>\n{{"name": "look", "arguments": {arguments_text}}}\n</tool_call><|im_end|>')
        answer = "so" + data.draw(ANSWERS) if data.draw(st.booleans()) else data.draw(ANSWERS) + "so"
        messages += say("assistant", answer)
        written.append(answer + "<|im_end|>")
    tools = [{"name": "look", "parameters": {}}]
    encode, trained = conversation_encoder(tokenizer), []
    for row in read_conversations({"messages": messages, "tools": tools}):
        encoded = encode(row)
        trained.append(tokenizer.decode([token for token in encoded["labels"] if token != -100]))
        prompt = encode_conversation(tokenizer, row["prompt"], add_generation_prompt=True, tools=row["tools"])
        assert encoded["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
    assert trained == written
