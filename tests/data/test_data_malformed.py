"""What is wrong with a file of conversations is one line with the file and the row; few such rows can be left out."""

import gzip
import io
import json
import logging
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.data.conversations import load_conversations, load_preferences, load_rankings
from hf_scratch_gpt.data.formats import TeachesNothing, read_conversations, read_preferences, read_rankings
from hf_scratch_gpt.data.rejected import REJECTED_SHARE, RejectedRows, shortened

GOOD = {"prompt": "fine", "completion": "fine"}
GOOD_PAIR = {"prompt": "fine", "chosen": "good", "rejected": "bad"}


def said(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def calling(call):
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "x"}, answer]}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows, damage=lambda content: content):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return damage(buffer.getvalue())


DEEP = "[" * 100_000 + "]" * 100_000
# What is wrong: file's name, content, loader, place that is named, and what is told.
FILES = {
    "cut line": ("a.jsonl", lines(GOOD) + b'{"prompt": "a", "compl', load_conversations, "line 2", "not valid JSON"),
    "two objects on a line": (
        *("a.jsonl", b'{"prompt": "a", "completion": "b"} {}\n', load_conversations),
        *("line 1", "not valid JSON (Extra data"),
    ),
    "a list on a line": ("a.jsonl", lines(GOOD, ["a", "b"]), load_conversations, "line 2", "found list"),
    "a number on a line": ("a.jsonl", lines(3), load_conversations, "line 1", "found int"),
    "nested too deeply": ("a.jsonl", lines(GOOD) + DEEP.encode(), load_conversations, "line 2", "nested too deeply"),
    "a number without end": (
        *("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", load_conversations),
        *("line 1", "not valid JSON (Exceeds the limit (4300"),
    ),
    "single quotes": ("a.json", b"[{'prompt': 'a'}]", load_conversations, "line 1", "not valid JSON"),
    "no list": ("a.json", b'{"data": []}', load_conversations, "a.json", "expected a list of objects, found dict"),
    "lines in a .json": ("a.json", lines(GOOD, GOOD), load_conversations, "line 2", "not valid JSON (Extra data"),
    "text among objects": ("a.json", b'[{"prompt": "a", "completion": "b"}, "c"]', load_conversations, "row 2", "str"),
    "empty": ("a.jsonl", b"", load_conversations, "a.jsonl", "an empty file"),
    "blank lines": ("a.jsonl", b"\n \n\n", load_conversations, "a.jsonl", "an empty file"),
    "header only": ("a.csv", b"prompt,completion\n", load_conversations, "a.csv", "an empty file"),
    "latin-1": (
        *("a.jsonl", lines(GOOD) + b'{"prompt": "caf\xe9", "completion": "x"}\n', load_conversations),
        *("line 2", "not UTF-8 at byte"),
    ),
    "utf-16": ("a.jsonl", lines(GOOD).decode().encode("utf-16"), load_conversations, "line 1", "not UTF-8 at byte 0"),
    "half a surrogate pair": (
        *("a.jsonl", lines(GOOD, said(("user", "x"), ("assistant", "\ud83d"))), load_conversations),
        *("line 2", "half a surrogate pair at character 0"),
    ),
    "too many fields": ("a.csv", b"prompt,completion\na,b\na,b,c\n", load_conversations, "line 3", "3 columns, exp"),
    "too few fields": ("a.tsv", b"prompt\tcompletion\na\n", load_conversations, "line 2", "1 columns, expected 2"),
    "cut parquet": (
        "a.parquet",
        parquet([GOOD], lambda c: c[:-20]),
        load_conversations,
        "a.parquet",
        "not a readable",
    ),
    "no parquet": ("a.parquet", lines(GOOD), load_conversations, "a.parquet", "not a readable parquet file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(lines(GOOD))[:-9], load_conversations, "a.jsonl.gz", "not a whole .gz"),
    "other columns": ("a.jsonl", lines({"foo": 1, "bar": 2}), load_conversations, "line 1", "unknown format with the"),
    "no columns": ("a.jsonl", lines({}), load_conversations, "line 1", "unknown format with the columns none"),
    "null answer": (
        "a.parquet",
        parquet([GOOD, {"prompt": "a"}]),
        load_conversations,
        "row 2",
        "'completion' (empty)",
    ),
    "a number for a prompt": (
        *("a.jsonl", lines({"prompt": 3, "completion": "b"}), load_conversations),
        *("line 1", "'prompt' holds a number, expected text or a list of messages"),
    ),
    "no messages": ("a.jsonl", lines({"messages": []}), load_conversations, "line 1", "an empty list"),
    "messages as an object": ("a.jsonl", lines({"messages": {"a": 1}}), load_conversations, "line 1", "an object"),
    "text for a message": ("a.jsonl", lines({"messages": ["hi"]}), load_conversations, "line 1", "message 1 of 'mess"),
    "no role": ("a.jsonl", lines({"messages": [{"content": "hi"}]}), load_conversations, "line 1", "has 'content'"),
    "a list for a role": (
        *("a.jsonl", lines({"messages": [{"role": ["user"], "content": "hi"}]}), load_conversations),
        *("line 1", "message 1 of 'messages': unknown role ['user']"),
    ),
    "an unknown role": ("a.jsonl", lines(said(("robot", "hi"))), load_conversations, "line 1", "unknown role 'robot'"),
    "null content": (
        *("a.jsonl", lines(said(("user", "a"), ("assistant", None))), load_conversations),
        *("line 1", "message 2 of 'messages': 'content' holds null, expected 'content' or 'tool_calls'"),
    ),
    "a picture": (
        *("a.jsonl", lines(said(("user", [{"type": "image_url", "image_url": "x"}]))), load_conversations),
        *("line 1", "'content' holds a part of type 'image_url', expected text parts"),
    ),
    "system in the middle": (
        *("a.jsonl", lines(said(("user", "a"), ("system", "b"), ("assistant", "c"))), load_conversations),
        *("line 1", "message 2 of 'messages': 'system' after 'user'"),
    ),
    "two answers in a row": (
        *("a.jsonl", lines(said(("user", "a"), ("assistant", "b"), ("assistant", "c"))), load_conversations),
        *("line 1", "message 3 of 'messages': 'assistant' after 'assistant'"),
    ),
    "a result without a call": (
        *("a.jsonl", lines(said(("user", "a"), ("tool", "b"), ("assistant", "c"))), load_conversations),
        *("line 1", "message 2 of 'messages': 'tool' after 'user'"),
    ),
    "no answer": (
        "a.jsonl",
        lines(said(("user", "a"))),
        load_conversations,
        "line 1",
        "ends with a message of 'user'",
    ),
    "an answer first": (
        "a.jsonl",
        lines(said(("assistant", "a"))),
        load_conversations,
        "line 1",
        "begins with a mess",
    ),
    "a ShareGPT turn without text": (
        *("a.jsonl", lines({"conversations": [{"from": "human"}]}), load_conversations),
        *("line 1", "message 1 of 'conversations' has 'from', expected 'from' and 'value'"),
    ),
    "a call without a name": (
        *("a.jsonl", lines(calling({"function": {"arguments": "{}"}})), load_conversations),
        *("line 1", "message 2 of 'messages': a tool call has 'function', expected a function with 'name'"),
    ),
    "arguments that are no JSON": (
        *("a.jsonl", lines(calling({"function": {"name": "f", "arguments": "{x"}})), load_conversations),
        *("line 1", "a tool call's 'arguments' is not valid JSON"),
    ),
    "arguments that are a list": (
        *("a.jsonl", lines(calling({"name": "f", "arguments": [1]})), load_conversations),
        *("line 1", "a tool call's 'arguments' holds a list, expected an object"),
    ),
    "a function without a name": (
        *("a.jsonl", lines({**GOOD, "tools": [{"type": "function", "function": {}}]}), load_conversations),
        *("line 1", "function 1 of 'tools' has 'type', 'function', expected 'name' and 'parameters'"),
    ),
    "tools that are no JSON": (
        *("a.jsonl", lines({**GOOD, "tools": "f, g"}), load_conversations),
        *("line 1", "'tools' is not valid JSON"),
    ),
    "a chosen answer alone": (
        *("a.jsonl", lines({"prompt": "a", "chosen": "b"}), load_preferences),
        *("line 1", "unknown format with the columns 'prompt', 'chosen'; expected prompt"),
    ),
    "answers to nothing": (
        *("a.jsonl", lines({"chosen": "a", "rejected": "b"}), load_preferences),
        *("line 1", "unknown format with the columns 'chosen', 'rejected'"),
    ),
    "a transcript that loses its order": (
        *("a.jsonl", lines({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "x"})),
        *(load_preferences, "line 1", "message 3 of 'chosen': 'assistant' after 'assistant'"),
    ),
    "a transcript with an empty turn": (
        *("a.jsonl", lines({"text": "\n\nHuman:\n\nAssistant: b"}), load_conversations),
        *("line 1", "turn 1 of 'text' (Human) is empty"),
    ),
    "a ranking of one": (
        *("a.jsonl", lines({"prompt": "a", "completions": ["b"]}), load_rankings),
        *("line 1", "'completions' holds 1 answers, expected at least 2 to rank"),
    ),
    "too few ranks": (
        *("a.jsonl", lines({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}), load_rankings),
        *("line 1", "'ranks' holds 1 values, expected one for each of the 2 'completions'"),
    ),
    "ranks in words": (
        *("a.jsonl", lines({"prompt": "a", "answers": ["b", "c"], "ranks": ["best", "worst"]}), load_rankings),
        *("line 1", "'ranks' holds 'best', expected numbers"),
    ),
    "an answer without text": (
        *("a.jsonl", lines({"prompt": "a", "answers": [{"rank": 1}, {"rank": 2}]}), load_rankings),
        *("line 1", "answer 1 of 'answers' has 'rank', expected one of text"),
    ),
}


@pytest.mark.parametrize("fault", FILES)
@pytest.mark.parametrize("collect", [False, True])
def test_a_malformed_file_is_told_in_one_line_with_file_and_row(tmp_path, fault, collect):
    name, content, load, place, told = FILES[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        load(tmp_path / name, rejected=RejectedRows() if collect else None)
    line = str(error.value)
    assert line.startswith(str(tmp_path / name))
    assert place in line
    assert "\n" not in line
    assert len(line) < len(str(tmp_path)) + 500


def test_there_are_at_least_thirty():
    assert len(FILES) >= 30


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for name, content in (("a.jsonl", lines(GOOD)), ("a.csv", b"prompt,completion\nfine,fine\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert load_conversations(tmp_path / name)[0]["completion"][0]["content"] == "fine"


def faulty(tmp_path, total, faults):
    """A file of `total` rows with faults of several kinds at some of them."""
    rows = [json.dumps({"prompt": f"question {number}", "completion": "answer"}) for number in range(1, total + 1)]
    for number, row in faults.items():
        rows[number - 1] = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


SOME_FAULTS = {
    4: "{",
    90: {"prompt": "a"},
    150: "[1]",
    151: {"prompt": "question", "completion": " "},
    201: said(("user", "a"), ("assistant", "x\ud83d")),
}


def test_few_malformed_rows_are_left_out_and_listed_with_their_reasons(tmp_path, caplog):
    path, rejected = faulty(tmp_path, 400, SOME_FAULTS), RejectedRows()
    with caplog.at_level(logging.WARNING):
        data = load_conversations(path, rejected=rejected)
    assert len(data) == 395
    assert {data[index]["source_row"] for index in (0, 394)} == {"line 1", "line 400"}
    assert f"{path}: leaving out 5 of 400 rows: 1 with an empty answer, 4 malformed" in caplog.text
    listed = [json.loads(line) for line in rejected.text().splitlines()]
    assert [(row["row"], row["kind"]) for row in listed] == [
        ("line 4", "malformed"),
        ("line 90", "malformed"),
        ("line 150", "malformed"),
        ("line 151", "useless"),
        ("line 201", "malformed"),
    ]
    assert {row["file"] for row in listed} == {str(path)}
    assert "not valid JSON" in listed[0]["reason"]
    assert (listed[0]["content"], listed[2]["content"]) == ("{", "[1]")
    assert listed[3]["reason"] == "an empty answer"
    assert json.loads(listed[1]["content"]) == {"prompt": "a"}


def test_more_than_one_in_a_hundred_stop_unless_allowed(tmp_path):
    path, listed_in = faulty(tmp_path, 399, SOME_FAULTS), tmp_path / "rejected.jsonl"
    with pytest.raises(ValueError, match="allow_rejected_rows") as error:
        load_conversations(path, rejected=RejectedRows(listed_in=listed_in))
    line = str(error.value)
    assert line.startswith(f"{path}, line 4: not valid JSON")
    assert "; line 90: unknown format with the columns 'prompt'" in line
    assert f"(4 of 399 rows are malformed, listed in {listed_in})" in line
    assert len(load_conversations(path, rejected=RejectedRows(allow=True))) == 394
    assert REJECTED_SHARE == 0.01


def test_a_file_of_malformed_rows_only_stops_also_where_they_are_allowed(tmp_path):
    path = faulty(tmp_path, 3, {1: {"foo": 1}, 2: "{", 3: {"foo": 1}})
    with pytest.raises(ValueError, match=r"line 1: unknown format .*\(3 rows, and none is better\)"):
        load_conversations(path, rejected=RejectedRows(allow=True))


def test_without_a_list_the_first_malformed_row_raises(tmp_path):
    with pytest.raises(ValueError, match="line 4: not valid JSON"):
        load_conversations(faulty(tmp_path, 400, SOME_FAULTS))


def test_content_is_shortened_to_what_a_file_can_hold():
    assert len(shortened({"a": "x" * 1000})) == 300
    assert shortened("a\ud83db") == "a\\ud83db"
    assert shortened({"a": float("nan"), "b": b"x"}) == '{"a": NaN, "b": "b\'x\'"}'
    ring: list = []
    ring.append(ring)
    assert shortened(ring) == "..."


COLUMNS = [
    *(
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "text",
        "system",
        "tools",
    ),
    *("chosen", "rejected", "completions", "answers", "ranks", "scores", "functions", "question", "answer"),
]
FIELDS = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text", "weight"]
WORDS = ["user", "assistant", "tool", "system", "human", "gpt", "function_call", "f", "{}", "[]", "a", "", "\ud83d"]
TEXTS = st.sampled_from(
    [*WORDS, "\n\nHuman: a\n\nAssistant: b", '<tool_call>{"name": "f", "arguments": 1}</tool_call>']
)
LEAVES = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | TEXTS | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXTS | VALUES, "content": TEXTS | VALUES}), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(st.sampled_from(COLUMNS), VALUES | MESSAGES, max_size=4))
def test_any_row_is_read_or_refused_in_one_line(row):
    for read in (read_conversations, read_preferences, read_rankings):
        made, told = [], ""
        try:
            made = list(read(row))
        except (TeachesNothing, ValueError) as error:
            told = str(error)
        assert bool(made) != bool(told), "a row that gives nothing says why"
        assert "\n" not in told
        for one in made:
            sides = [one[name] for name in ("completion", "chosen", "rejected") if name in one]
            for messages in [one["prompt"], *sides, *one.get("completions", [])]:
                assert all(isinstance(message["content"], str) for message in messages)
                json.dumps(one, ensure_ascii=False).encode("utf-8")
