import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from hf_scratch_gpt.data.conversations import load_conversations, load_preferences


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


WANTED = {"prompt": [user("Name a prime.")], "completion": [assistant("Seven.")]}

CONVERSATION_ROWS = {
    "messages": {"messages": [user("Name a prime."), assistant("Seven.")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]},
    "prompt and completion as text": {"prompt": "Name a prime.", "completion": "Seven."},
    "prompt and completion as messages": {"prompt": [user("Name a prime.")], "completion": [assistant("Seven.")]},
    "prompt and response": {"prompt": "Name a prime.", "response": "Seven."},
    "alpaca without input": {"instruction": "Name a prime.", "input": "", "output": "Seven."},
    "alpaca with the column input missing": {"instruction": "Name a prime.", "output": "Seven."},
    "question and answer": {"question": "Name a prime.", "answer": "Seven."},
}

PREFERENCE_ROWS = {
    "text": {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."},
    "messages": {
        "prompt": [user("Name a prime.")],
        "chosen": [assistant("Seven.")],
        "rejected": [assistant("Eight.")],
    },
    "alpaca": {"instruction": "Name a prime.", "input": "", "output": "x", "chosen": "Seven.", "rejected": "Eight."},
    "prompt repeated in both answers": {
        "prompt": "Name a prime.",
        "chosen": [user("Name a prime."), assistant("Seven.")],
        "rejected": [user("Name a prime."), assistant("Eight.")],
    },
    "whole conversations": {
        "chosen": [user("Name a prime."), assistant("Seven.")],
        "rejected": [user("Name a prime."), assistant("Eight.")],
    },
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", CONVERSATION_ROWS)
def test_every_conversation_format_becomes_the_same_row(tmp_path, name):
    data = load_conversations(write_lines(tmp_path / "data.jsonl", [CONVERSATION_ROWS[name]]))
    assert data.to_list() == [WANTED]


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_every_preference_format_becomes_the_same_row(tmp_path, name):
    data = load_preferences(write_lines(tmp_path / "data.jsonl", [PREFERENCE_ROWS[name]]))
    wanted = {"prompt": [user("Name a prime.")], "chosen": [assistant("Seven.")], "rejected": [assistant("Eight.")]}
    assert data.to_list() == [wanted]


def test_every_file_kind_gives_the_same_rows(tmp_path):
    rows = [{"instruction": f"Add {n}, please.", "input": 'to "one"', "output": str(n + 1)} for n in range(3)]
    lines = write_lines(tmp_path / "data.jsonl", rows)
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    quoted = [f'"Add {n}, please.","to ""one""",{n + 1}' for n in range(3)]
    (tmp_path / "data.csv").write_text("\n".join(["instruction,input,output", *quoted]), encoding="utf-8")
    tabbed = ["\t".join(row.values()) for row in rows]
    (tmp_path / "data.tsv").write_text("\n".join(["instruction\tinput\toutput", *tabbed]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    wanted = load_conversations(lines).to_list()
    assert wanted[2]["prompt"] == [user('Add 2, please.\n\nto "one"')]
    for ending in ("json", "csv", "tsv", "parquet"):
        assert load_conversations(tmp_path / f"data.{ending}").to_list() == wanted, ending


def test_each_answer_of_a_conversation_is_learnt_once_after_all_that_was_said_before(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    turns = [system, user("One?"), assistant("1"), user("Two?"), assistant("2")]
    data = load_conversations(write_lines(tmp_path / "chat.jsonl", [{"messages": turns}]))
    assert [(row["prompt"], row["completion"]) for row in data] == [(turns[:2], turns[2:3]), (turns[:4], turns[4:])]


def test_streaming_gives_the_same_rows(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", list(CONVERSATION_ROWS.values()))
    assert list(load_conversations(path, streaming=True)) == load_conversations(path).to_list()


def test_other_columns_are_kept_only_when_asked_for(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b", "family": "words", "answer": "b"}])
    assert load_conversations(path).column_names == ["prompt", "completion"]
    assert set(load_conversations(path, keep_columns=True).column_names) == {
        "prompt",
        "completion",
        "family",
        "answer",
    }


def test_a_prepare_folder_gives_its_tasks_by_split(tmp_path):
    (tmp_path / "tasks").mkdir()
    write_lines(tmp_path / "tasks" / "train.jsonl", [{"prompt": "a", "completion": "train"}])
    write_lines(tmp_path / "tasks" / "heldout.jsonl", [{"prompt": "a", "completion": "heldout"}])
    write_lines(tmp_path / "tasks" / "preferences_heldout.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert load_conversations(tmp_path)[0]["completion"] == [assistant("train")]
    assert load_conversations(tmp_path, split="heldout")[0]["completion"] == [assistant("heldout")]
    assert load_preferences(tmp_path, split="heldout")[0]["rejected"] == [assistant("c")]
    with pytest.raises(FileNotFoundError, match="preferences_train"):
        load_preferences(tmp_path)
    with pytest.raises(ValueError, match="'validation'"):
        load_conversations(tmp_path, split="validation")


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": text} for text in ("b", " ", "c")])
    with caplog.at_level(logging.WARNING):
        assert len(load_conversations(path)) == 2
    assert "1 of 3 rows: 1 with an empty answer" in caplog.text
    equal = write_lines(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ValueError, match="no usable rows; found 1 rows, 1 with two equal answers"):
        load_preferences(equal)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"columns 'text'; expected messages"),
        ({"prompt": "a", "completion": None}, r"'completion' \(empty\)"),
        ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": 3, "completion": "b"}, "'prompt' holds a number"),
        ({"messages": []}, "'messages' holds an empty list"),
        ({"messages": "hello"}, "'messages' holds text"),
        ({"messages": [user("a")]}, "ends with a message of 'user'"),
        ({"messages": [assistant("a")]}, "begins with a message of 'assistant'"),
        (
            {"messages": [user("a"), {"role": "robot", "content": "b"}]},
            "message 2 of 'messages': unknown role 'robot'",
        ),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "'content' holds null"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "message 2 of 'messages' has 'role'"),
        ({"instruction": "a", "input": 4, "output": "b"}, "'input' holds a number"),
        ({"prompt": [assistant("a")], "completion": "b"}, "'prompt' ends with a message of 'assistant'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, message):
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "fine", "completion": "fine"}, row])
    with pytest.raises(ValueError, match=message) as error:
        load_conversations(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(error.value)


def test_preferences_without_a_prompt_or_an_answer_are_refused(tmp_path):
    for row in ({"chosen": "a", "rejected": "b"}, {"prompt": "a", "chosen": "b"}):
        with pytest.raises(ValueError, match=r"line 1: unknown format with the columns .* chosen and rejected"):
            load_preferences(write_lines(tmp_path / "data.jsonl", [row]))


def test_unreadable_sources_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}'.encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", ')
    for name, message in (
        ("empty", "an empty file"),
        ("latin", "not UTF-8 at byte 12"),
        ("broken", "line 1: not valid"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_conversations(tmp_path / f"{name}.jsonl")
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_conversations(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_conversations(tmp_path / "missing.jsonl", streaming=True)
    with pytest.raises(ValueError, match="a file has no split 'heldout'"):
        load_conversations(tmp_path / "empty.jsonl", split="heldout")


def test_public_instructions_with_preferences_load_both_ways(shared_data):
    path = shared_data / "instructions_with_preferences.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    conversations, preferences = load_conversations(path), load_preferences(path)
    assert len(conversations) == len(raw)
    assert [row["completion"][0]["content"] for row in conversations] == [row["output"] for row in raw]
    assert len(preferences) == sum(row["chosen"] != row["rejected"] for row in raw)
