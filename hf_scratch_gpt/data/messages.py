"""Messages of a conversation, as the many formats write them, in the one form that chat templates read.

A message is `{"role", "content"}` with the roles system, user, assistant and tool, and text as its content. An
assistant's message may have `tool_calls`, each `{"type": "function", "function": {"name", "arguments"}}` with a JSON
object as arguments; a tool's may have `name` and `tool_call_id`. Every complaint is a `ValueError` of one line.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_OPENAI_ROLES = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
    **{"function_call": "assistant", "observation": "tool", "function_response": "tool"},
}
# HH-RLHF (Bai et al. 2022, https://huggingface.co/papers/2204.05862): one text, each turn after its speaker's name.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# As ChatML models write a call, alone at the end of their text.
_WRITTEN_CALLS = re.compile(r"\s*<tool_call>(?:(?!</?tool_call>).)*</tool_call>\s*\Z", re.DOTALL)
_LONGEST_SHOWN = 40


def shown(value: Any) -> str:
    """A value for a message to a person: its beginning, on one line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number"}
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)


def check_text(value: Any, where: str) -> str:
    """`value`, which has to be text that UTF-8 can hold.

    Raises:
        ValueError: if it is another type or has half a surrogate pair, as a cut `\\ud83d` in JSON gives.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {kind_of(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair at character {error.start}, expected text") from None
    return value


def read_messages(value: Any, column: str) -> list[Message]:
    """A list of OpenAI's messages, with `tool_calls`, or of ShareGPT's (`from`, `value`).

    Raises:
        ValueError: naming the message and what is wrong with it.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{column}' holds {kind_of(value)}, expected a list of messages with 'role' and 'content'")
    is_sharegpt = all(isinstance(message, Mapping) and "from" in message for message in value)
    read = _read_sharegpt if is_sharegpt else _read_openai
    messages = [read(message, f"message {number} of '{column}'") for number, message in enumerate(value, start=1)]
    _check_order(messages, column)
    return messages


def _read_openai(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"{where} {_found(message)}, expected 'role' and 'content'")
    role = _role(message["role"], _OPENAI_ROLES, where, "role")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if calls and role != "assistant":
        raise ValueError(f"{where}: 'tool_calls' of the role '{role}', expected 'assistant'")
    if message.get("content") is None and not calls:
        found = f" {_found(message)}" if "content" not in message else ": 'content' holds null"
        raise ValueError(f"{where}{found}, expected 'content'" + (" or 'tool_calls'" if role == "assistant" else ""))
    return _make(role, _text_of(message.get("content"), where), calls, message, where)


def _read_sharegpt(message: Mapping, where: str) -> Message:
    role = _role(message["from"], _SHAREGPT_ROLES, where, "from")
    if "value" not in message:
        raise ValueError(f"{where} {_found(message)}, expected 'from' and 'value'")
    text = check_text(message["value"], f"{where}: 'value'")
    if message["from"] == "function_call":
        call = _parse_json(text, f"{where}: 'value' of a function_call")
        return _make(role, "", call if isinstance(call, list) else [call], message, where)
    return _make(role, text, [], message, where)


def _make(role: str, text: str, calls: Any, message: Mapping, where: str) -> Message:
    made: Message = {"role": role, "content": text}
    if role == "assistant" and not calls:
        made["content"], calls = _written_calls(text)
    if calls:
        if not isinstance(calls, list | tuple):
            raise ValueError(f"{where}: 'tool_calls' holds {kind_of(calls)}, expected a list")
        made["tool_calls"] = [_tool_call(call, where) for call in calls]
    if role == "tool":
        named = {name: message.get(name) for name in ("name", "tool_call_id")}
        made |= {name: check_text(value, f"{where}: '{name}'") for name, value in named.items() if value is not None}
    return made


def _found(message: Any) -> str:
    return f"has {', '.join(map(shown, message))}" if isinstance(message, Mapping) else f"is {kind_of(message)}"


def _role(role: Any, known: dict[str, str], where: str, key: str) -> str:
    if not isinstance(role, str) or role not in known:
        raise ValueError(f"{where}: unknown {key} {shown(role)}, expected {', '.join(known)}")
    return known[role]


def _text_of(content: Any, where: str) -> str:
    """Text, or a list of `{"type": "text", "text": ...}` parts joined; nothing beside tool calls."""
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        return check_text(content, f"{where}: 'content'")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            found = f"a part of type {shown(part['type'])}" if isinstance(part, Mapping) else kind_of(part)
            raise ValueError(f"{where}: 'content' holds {found}, expected text parts")
        texts.append(check_text(part.get("text"), f"{where}: 'text' of a part"))
    return "".join(texts)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({getattr(error, 'msg', 'nested too deeply')})") from None


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """OpenAI's call, wrapped in `function` or not, its arguments as JSON text or as an object."""
    where = f"{where}: a tool call"
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} {_found(call)}, expected a function with 'name' and 'arguments'")
    name = check_text(function["name"], f"{where}'s 'name'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", f"{where}'s 'arguments'")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}'s 'arguments' holds {kind_of(arguments)}, expected an object")
    made = {"type": "function", "function": {"name": name, "arguments": check_values(arguments, where)}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def check_values(value: Any, where: str) -> Any:
    """JSON values as plain dicts and lists, with all of their text checked."""
    if isinstance(value, Mapping):
        return {check_text(key, f"{where}: a key"): check_values(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [check_values(item, where) for item in value]
    return check_text(value, where) if isinstance(value, str) else value


def _written_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Text, and the calls that stand written out at its end: as text they would never become the calls' tokens."""
    calls: list[dict[str, Any]] = []
    rest = text
    while match := _last_call(rest):
        try:
            call = json.loads(match.group().strip().removeprefix("<tool_call>").removesuffix("</tool_call>"))
        except (json.JSONDecodeError, RecursionError):
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            return text, []
        calls.insert(0, call)
        rest = rest[: match.start()]
    return rest, calls


def _last_call(text: str) -> re.Match | None:
    start = text.rfind("<tool_call>")
    if start < 0:
        return None
    return _WRITTEN_CALLS.match(text, len(text[:start].rstrip()))


def _check_order(messages: list[Message], column: str) -> None:
    before = ""
    for number, message in enumerate(messages, start=1):
        role, where = message["role"], f"message {number} of '{column}'"
        if role == "system" and number > 1:
            raise ValueError(f"{where}: 'system' after '{before}', expected at the beginning only")
        if role == "assistant" and before == "assistant":
            raise ValueError(f"{where}: 'assistant' after 'assistant', expected 'user' or 'tool' between them")
        if role == "tool" and before not in ("assistant", "tool"):
            raise ValueError(f"{where}: 'tool' {f'after {before!r}' if before else 'first'}, expected after a call")
        before = role


def is_transcript(text: Any) -> bool:
    """Whether a text is a transcript as HH-RLHF writes it: it begins with `Human:` and has an `Assistant:`."""
    if not isinstance(text, str):
        return False
    turns = _TURN.findall(text)
    return bool(turns) and _TURN.match(text) is not None and turns[0] == "Human" and "Assistant" in turns


def read_transcript(text: str, column: str) -> list[Message]:
    """The messages of an HH-RLHF transcript; the empty `Assistant:` at the end of a prompt is left out.

    Raises:
        ValueError: if one speaker's turn follows another of the same, or a turn is empty.
    """
    check_text(text, f"'{column}'")
    turns = list(_TURN.finditer(text))
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    messages = [
        {"role": _SPEAKERS[turn.group(1)], "content": text[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    for number, message in enumerate(messages, start=1):
        if not message["content"] and number < len(messages):
            raise ValueError(f"turn {number} of '{column}' ({turns[number - 1].group(1)}) is empty")
    _check_order(messages, column)
    return messages


def read_tools(value: Any, column: str = "tools") -> list[dict[str, Any]] | None:
    """The functions that a row offers, as a list of JSON schemas or as the text of one; `None` for none.

    Raises:
        ValueError: if it is neither, or a function has no name.
    """
    if isinstance(value, str):
        value = _parse_json(value, f"'{column}'") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f"'{column}' holds {kind_of(value)}, expected a list of functions")
    tools = []
    for number, tool in enumerate(value, start=1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"function {number} of '{column}' {_found(tool)}, expected 'name' and 'parameters'")
        wrapped = tool if "function" in tool else {"type": "function", "function": tool}
        tools.append(check_values(wrapped, f"function {number} of '{column}'"))
    return tools
