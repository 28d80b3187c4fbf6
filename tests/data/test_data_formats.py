"""Every format that a data set may have is told apart and becomes the same internal form."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.data.conversations import load_conversations, load_preferences, load_rankings
from hf_scratch_gpt.data.formats import TeachesNothing, read_conversations, read_preferences, read_rankings

FORMATS = Path(__file__).parent / "formats"
# Rows that each loader makes of a fixture; `None` where it is none of its formats.
FIXTURES = {
    "alpaca.json": (3, None, None),
    "sharegpt.jsonl": (3, None, None),
    "sharegpt_tools.jsonl": (3, None, None),
    "openai_messages.jsonl": (2, None, None),
    "openai_tools.jsonl": (3, None, None),
    "prompt_completion.jsonl": (2, None, None),
    "question_answer.csv": (2, None, None),
    "hh_text.jsonl": (2, None, None),
    "hh_rlhf.jsonl": (None, 2, 2),
    "preferences.jsonl": (None, 2, 2),
    "rankings_ranks.jsonl": (None, 2, 8),
    "rankings_scores.jsonl": (None, 1, 3),
    "rankings_ordered.jsonl": (None, 2, 6),
}
LOADERS = (load_conversations, load_rankings, load_preferences)


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


def plain(value):
    """Without the fields that are empty, which a table gives to all messages where one has them."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


def test_every_fixture_is_listed():
    assert {path.name for path in FORMATS.iterdir()} == set(FIXTURES)


@pytest.mark.parametrize("name", FIXTURES)
def test_every_format_is_told_apart(name):
    for load, count in zip(LOADERS, FIXTURES[name], strict=True):
        if count is None:
            with pytest.raises(ValueError, match=r"(line|row) \d+: unknown format with the columns"):
                load(FORMATS / name)
            continue
        rows = load(FORMATS / name)
        assert len(rows) == count
        for row in rows:
            answers = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
            for answer in [*answers, *row.get("completions", [])]:
                assert answer[0]["role"] == "assistant"
            assert row["prompt"][-1]["role"] in ("user", "tool")


def test_openai_tool_calls_keep_their_names_arguments_and_results():
    rows = [plain(row) for row in load_conversations(FORMATS / "openai_tools.jsonl")]
    calls = rows[0]["completion"][0]["tool_calls"]
    assert rows[0]["completion"][0]["content"] == ""
    assert [call["function"]["arguments"] for call in calls] == [
        {"location": "San Francisco, USA", "unit": "celsius"},
        {"location": "Zürich, Switzerland"},
    ], "the second call has not the first one's fields"
    assert [message["role"] for message in rows[1]["prompt"]] == ["user", "assistant", "tool", "tool"]
    assert rows[1]["prompt"][3]["tool_call_id"] == "call_2"
    assert [tool["function"]["name"] for tool in rows[2]["tools"]] == ["send_email", "get_current_weather"]
    raw = [json.loads(line) for line in (FORMATS / "openai_tools.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[2]["tools"] == raw[1]["tools"], "a schema comes through with no field added or lost"


def test_calls_are_the_same_however_they_are_written():
    call = {"name": "add", "arguments": {"first": 2, "second": [3, None]}}
    question, tools = say("user", "2 + 3?"), [{"name": "add", "parameters": {}}]
    wanted = say("assistant", "", tool_calls=[{"type": "function", "function": call}])
    text = json.dumps(call["arguments"])
    openai = {"type": "function", "function": {"name": "add", "arguments": text}}
    answers = [
        {"role": "assistant", "content": None, "tool_calls": [openai]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": text}},
        {"role": "assistant", "content": f"<tool_call>\n{json.dumps(call)}\n</tool_call>"},
    ]
    rows = [{"messages": [question, answer], "tools": tools} for answer in answers]
    rows.append(
        {
            "conversations": [
                {"from": "human", "value": "2 + 3?"},
                {"from": "function_call", "value": json.dumps(call)},
            ],
            "tools": json.dumps(tools),
        }
    )
    made = [list(read_conversations(row)) for row in rows]
    offered = [{"type": "function", "function": tools[0]}]
    assert made == [[{"prompt": [question], "completion": [wanted], "tools": offered}]] * len(rows)


@pytest.mark.parametrize(
    "text",
    [
        "A call is written <tool_call>{json}</tool_call>.",
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call> and more',
        '</tool_call><tool_call>{"name": "f"}</tool_call>',
        "<tool_call>",
    ],
)
def test_text_about_calls_stays_text(text):
    (row,) = read_conversations({"messages": [say("user", "x"), say("assistant", text)]})
    assert row["completion"] == [say("assistant", text)]


def test_text_before_written_calls_stays_and_each_call_is_found():
    call = '<tool_call>\n{"name": "%s", "arguments": {}}\n</tool_call>'
    text = f"Let me see.\n{call % 'f'}\n{call % 'g'}\n"
    (row,) = read_conversations({"messages": [say("user", "x"), say("assistant", text)]})
    assert row["completion"][0]["content"] == "Let me see."
    assert [one["function"]["name"] for one in row["completion"][0]["tool_calls"]] == ["f", "g"]


def test_an_answer_of_weight_0_is_read_but_not_learnt():
    data = load_conversations(FORMATS / "openai_messages.jsonl")
    assert data[1]["completion"] == [say("assistant", "About 238,900 miles.")]
    assert data[1]["prompt"][1]["content"] == "Around 384,400 kilometers."
    with pytest.raises(TeachesNothing, match="weight"):
        list(read_conversations({"messages": [say("user", "a"), say("assistant", "b", weight=0)]}))


def test_a_system_column_goes_before_what_has_none_of_its_own():
    system = say("system", "Be brief.")
    row = {"instruction": "Name a prime.", "output": "7", "system": "Be brief."}
    assert next(read_conversations(row))["prompt"] == [system, say("user", "Name a prime.")]
    turns = [say("user", "a"), say("assistant", "b", weight=0), say("user", "c"), say("assistant", "d")]
    (made,) = read_conversations({"messages": turns, "system": "Be brief."})
    assert [message["content"] for message in made["prompt"]] == ["Be brief.", "a", "b", "c"]
    own = [say("system", "Be long."), say("user", "a"), say("assistant", "b")]
    assert next(read_conversations({"messages": own, "system": "Be brief."}))["prompt"][0] == own[0]


def test_a_transcript_is_cut_at_its_speakers_only():
    text = "\n\nHuman: Who says 'Human: hi'?\n\nAssistant: A robot:\n\n- Human: no\n- Assistant: no\n\nHuman: Ok."
    pair = {"chosen": f"{text}\n\nAssistant: Good.", "rejected": f"{text}\n\nAssistant: Bad."}
    (made,) = read_preferences(pair)
    assert [message["content"] for message in made["prompt"]] == [
        "Who says 'Human: hi'?",
        "A robot:\n\n- Human: no\n- Assistant: no",
        "Ok.",
    ]
    assert (made["chosen"], made["rejected"]) == ([say("assistant", "Good.")], [say("assistant", "Bad.")])
    prompted = {"prompt": f"{text}\n\nAssistant:", "chosen": " Good.", "rejected": "Bad."}
    assert [message["role"] for message in next(read_preferences(prompted))["prompt"]] == ["user", "assistant", "user"]


def test_a_ranking_is_sorted_and_ties_share_a_rank():
    rows = load_rankings(FORMATS / "rankings_ranks.jsonl").to_list()
    assert rows[0]["ranks"] == [1, 2, 3, 4]
    assert rows[0]["completions"][0][0]["content"].startswith("The Earth pulls")
    assert rows[1]["ranks"] == [1, 1, 2]
    assert [answer[0]["content"] for answer in rows[1]["completions"]] == ["Apple.", "Pear.", "Car."]
    (scored,) = load_rankings(FORMATS / "rankings_scores.jsonl").to_list()
    assert scored["completions"][0][0]["content"].startswith("Cleaning windows")


@settings(max_examples=60, deadline=None)
@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=6), as_scores=st.booleans())
def test_a_ranking_gives_exactly_the_pairs_of_different_rank(ranks, as_scores):
    answers = [f"answer {number}" for number in range(len(ranks))]
    told = {"scores": [10 - rank for rank in ranks]} if as_scores else {"ranks": ranks}
    row = {"prompt": "x", "completions": answers, **told}
    if len(set(ranks)) == 1:
        with pytest.raises(TeachesNothing, match="all rank alike"):
            list(read_preferences(row))
        return
    made = {(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in read_preferences(row)}
    ranked = list(zip(answers, ranks, strict=True))
    either_way = [*combinations(ranked, 2), *combinations(reversed(ranked), 2)]
    assert made == {(better[0], worse[0]) for better, worse in either_way if better[1] < worse[1]}
    (ranking,) = read_rankings(row)
    assert len(ranking["completions"]) == len(ranks), "every answer stays in the group"
