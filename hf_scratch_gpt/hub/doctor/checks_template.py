"""Lint of a chat template over whole conversations: turns, tools, and which tokens are trained."""

import json
from itertools import pairwise
from typing import Any

from hf_scratch_gpt.hub.doctor.checks_chat import conversation, marks_answers, render
from hf_scratch_gpt.hub.doctor.outcome import Checks, Finding, Skipped, all_of
from hf_scratch_gpt.hub.doctor.subject import Subject
from hf_scratch_gpt.model.safe_encoding import encode_conversation

CHECKS = Checks()
# Only where somebody asks about a template: most models on the Hub have no marks, and are no worse models for it.
LINT_ONLY = Checks()

_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count_legs",
        "description": "Counts the legs of an animal",
        "parameters": {
            "type": "object",
            "properties": {"animal": {"type": "string", "description": "Its name"}},
            "required": ["animal"],
        },
    },
}
_ARGUMENTS = {"animal": "centipede"}
_ASKED = {"role": "user", "content": "How many legs has a centipede?"}
_RESULT, _ANSWER = "between 30 and 382", "From thirty to hundreds."


def _tool_turns(tokenizer: Any) -> list[dict[str, Any]]:
    """A conversation with a call of a tool, its arguments as the template takes them: an object, or JSON text."""

    def turns(arguments: Any) -> list[dict[str, Any]]:
        # Nine letters and digits: some templates take no other id.
        call = {"id": "callno123", "type": "function", "function": {"name": "count_legs", "arguments": arguments}}
        return [
            _ASKED,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "count_legs", "tool_call_id": "callno123", "content": _RESULT},
            {"role": "assistant", "content": _ANSWER},
        ]

    try:
        render(tokenizer, turns(_ARGUMENTS), tools=[_TOOL])
    except TypeError:  # from text that is joined to an object
        return turns(json.dumps(_ARGUMENTS))
    return turns(_ARGUMENTS)


@CHECKS.add(
    "chat-prefix-stable",
    expected="each shorter conversation is the beginning of the longer one",
    remedy="render a turn alike whatever follows it, or caches are lost and training sees other prompts than chat",
)
def chat_prefix_stable(subject: Subject) -> Finding:
    """Whether a conversation that goes on begins with the tokens that it had before."""
    tokenizer = subject.needs_chat_template()
    messages = conversation(tokenizer)
    complete = [length for length in range(1, len(messages) + 1) if messages[length - 1]["role"] == "assistant"]
    encoded = [encode_conversation(tokenizer, messages[:length])["input_ids"] for length in complete]
    for length, (shorter, longer) in zip(complete, pairwise(encoded), strict=False):
        if longer[: len(shorter)] != shorter:
            places = enumerate(zip(shorter, longer, strict=False))
            place = next((place for place, (one, other) in places if one != other), len(longer))
            before, after = (tokenizer.decode(ids[place : place + 8]) for ids in (shorter, longer))
            return Finding(False, f"{before!r} of {length} messages becomes {after!r} when the next follow")
    return Finding(True, f"{len(encoded)} lengths of a conversation begin alike")


def _trained_text(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    """What is trained, passage by passage."""
    encoded = encode_conversation(tokenizer, messages, **settings)
    passages: list[list[int]] = []
    previous = 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask and not previous:
            passages.append([])
        if mask:
            passages[-1].append(token)
        previous = mask
    return [tokenizer.decode(passage) for passage in passages]


def _needs_marks(subject: Subject) -> Any:
    tokenizer = subject.needs_chat_template()
    if not marks_answers(tokenizer):
        raise Skipped("the template has no {% generation %}, so it tells no trained part")
    return tokenizer


@CHECKS.add(
    "chat-every-turn",
    expected="each of several answers is trained, as a passage of its own",
    remedy="put {% generation %} around the assistant's text inside the loop, whether the turn is the last or not",
)
def chat_every_turn(subject: Subject) -> Finding:
    """Whether every answer of a conversation is trained exactly once, not only the last."""
    tokenizer = _needs_marks(subject)
    messages = conversation(tokenizer)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    passages = _trained_text(tokenizer, messages)
    for number, answer in enumerate(answers, start=1):
        count = sum(answer in passage for passage in passages)
        # That the last is trained is the question of another check.
        if count > 1 or (count == 0 and number < len(answers)):
            return Finding(False, f"answer {number} of {len(answers)} is trained {count} times")
    joined = [passage for passage in passages if sum(answer in passage for answer in answers) > 1]
    calls = _trained_text(tokenizer, _tool_turns(tokenizer), tools=[_TOOL]) if _takes_tools(tokenizer) else None
    return all_of(
        Finding(not joined, f"several answers are one trained passage: {joined and joined[0][:60]!r}"),
        Finding(calls is None or any("count_legs" in passage for passage in calls), "a call of a tool is not trained"),
        Finding(True, f"{len(answers)} answers, each trained once{'' if calls is None else ', and a call of a tool'}"),
    )


@CHECKS.add(
    "chat-user-untrained",
    expected="nothing that system, user or tool say is trained",
    remedy="close {% endgeneration %} before the next turn begins",
)
def chat_user_untrained(subject: Subject) -> Finding:
    """Whether the words of all others stay outside the trained part."""
    tokenizer = _needs_marks(subject)
    conversations: list[tuple[list[dict[str, Any]], Any]] = [(conversation(tokenizer), None)]
    if _takes_tools(tokenizer):
        conversations.append((_tool_turns(tokenizer), [_TOOL]))
    checked = 0
    for messages, tools in conversations:
        trained = "\n".join(_trained_text(tokenizer, messages, tools=tools))
        for message in messages:
            checked += message["role"] != "assistant"
            if message["role"] != "assistant" and message["content"] in trained:
                return Finding(False, f"what the {message['role']} says is trained: {message['content']!r}")
    return Finding(True, f"{checked} messages of others are untrained")


def _takes_tools(tokenizer: Any) -> bool:
    """Whether the template says anything of tools."""
    return "tools" in tokenizer.get_chat_template(tools=[_TOOL])


@CHECKS.add(
    "chat-tools",
    expected="the functions offered, a call with its arguments and its result are rendered",
    remedy="render tools, message.tool_calls (name and arguments) and messages of the role tool",
)
def chat_tools(subject: Subject) -> Finding:
    """Whether a template that speaks of tools renders all that a conversation with them has."""
    tokenizer = subject.needs_chat_template()
    if not _takes_tools(tokenizer):
        raise Skipped("the template knows no tools")
    turns = _tool_turns(tokenizer)
    text = render(tokenizer, turns, tools=[_TOOL])
    without_tools = render(tokenizer, turns[:1])
    offered = render(tokenizer, turns[:1], tools=[_TOOL])
    called = render(tokenizer, turns[:2], tools=[_TOOL]).removeprefix(offered)
    missing = {
        "the function that is offered": "count_legs" in offered and offered != without_tools,
        "the call's name": "count_legs" in called,
        "the call's arguments": all(json.dumps(value)[1:-1] in called for value in _ARGUMENTS.values()),
        "the result": _RESULT in text,
        "the answer after it": _ANSWER in text,
    }
    lost = [what for what, is_there in missing.items() if not is_there]
    return Finding(not lost, f"not rendered: {', '.join(lost)}" if lost else f"{len(missing)} parts are rendered")


@LINT_ONLY.add(
    "chat-mask-not-empty",
    expected="every conversation with an answer has trained tokens: one turn, several, and calls of tools",
    remedy="put {% generation %} … {% endgeneration %} around what the assistant writes, calls of tools included",
)
def chat_mask_not_empty(subject: Subject) -> Finding:
    """Whether there is something to train on in each kind of answer."""
    tokenizer = subject.needs_chat_template()
    messages = conversation(tokenizer)
    kinds: dict[str, tuple[list[dict[str, Any]], Any]] = {
        "one answer": (messages[:-2], None),
        "two answers": (messages, None),
    }
    if _takes_tools(tokenizer):
        turns = _tool_turns(tokenizer)
        kinds |= {"a call of a tool": (turns[:2], [_TOOL]), "an answer after a call": (turns, [_TOOL])}
    empty = [
        kind
        for kind, (spoken, tools) in kinds.items()
        if not any(encode_conversation(tokenizer, spoken, tools=tools)["assistant_masks"])
    ]
    found = f"nothing is trained of: {', '.join(empty)}" if empty else f"{len(kinds)} kinds of answers are trained"
    return Finding(not empty, found)
