"""Formats of conversations, preferences and rankings: which one a row has, and what it says in the internal form.

The internal form is TRL's conversational one: `prompt` with `completion`, with `chosen` and `rejected`, or with
`completions` and their `ranks`; all are lists of messages (`hf_scratch_gpt.data.messages`), and `tools` stands beside
them where a row offers functions.

A row of **conversations** has one of

- `messages` (OpenAI, `tool_calls` and `tools` included) or `conversations` (ShareGPT): one row is made for every
  answer in it, with all that was said before as its prompt, so that every answer is learnt once; an assistant's
  message of `weight` 0 is only read;
- `prompt` and `completion` (or `response`), each text or messages;
- Alpaca's `instruction`, `input` (may be missing) and `output` (or `response`);
- `question` and `answer`;
- `text` that is an HH-RLHF transcript.

Text in a column `system` goes before all of these where they have no such message of their own.

A row of **preferences** has `chosen` and `rejected`, each text or messages, after `prompt`, `instruction` and `input`,
or `question`; without any of these, both are whole conversations that begin alike, as messages or as transcripts.

A row of **rankings** has a prompt and a list of two or more `completions` (or `answers`, or `responses`), each text,
messages, or an object that holds one. How good each is stands in `ranks` (1 is best) or `scores` (more is better)
beside the list or inside its objects; without either, the list goes from the best to the worst. Preferences are
rankings of two, and a ranking gives one preference for each two answers of different rank.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from hf_scratch_gpt.data.messages import (
    Message,
    check_text,
    is_transcript,
    kind_of,
    read_messages,
    read_tools,
    read_transcript,
    shown,
)

Row = dict[str, Any]

# Column of the question and column of its answer, in the order in which they are looked for.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_PROMPT_COLUMNS = ("prompt", "instruction", "question")
_LIST_COLUMNS = ("completions", "answers", "responses")
_RANK_COLUMNS, _SCORE_COLUMNS = ("ranks", "rank"), ("scores", "score", "overall_score", "pm_score")
_TEXT_COLUMNS = ("text", "content", "completion", "response", "answer", "messages")
_CONVERSATION_COLUMNS = (
    "messages; conversations; prompt and completion; instruction, input and output; question and answer; "
    "text with 'Human:' and 'Assistant:'"
)
_PREFERENCE_COLUMNS = (
    "prompt (or instruction and input), chosen and rejected; or a prompt and completions with ranks or scores"
)
# Columns that a conversion takes in, which are therefore not kept beside what it makes of them.
READ_COLUMNS = {
    *("messages", "conversations", "input", "chosen", "rejected", "tools", "functions", "system"),
    *(name for pair in _PAIRS[:4] for name in pair),
    *(*_LIST_COLUMNS, "ranks", "scores"),
}


class TeachesNothing(Exception):
    """A well-formed row from which nothing can be learnt; the text says why."""


def read_conversations(row: Row) -> Iterator[Row]:
    """The questions of a row, each as `prompt` and `completion` with `tools` if there are any.

    Raises:
        TeachesNothing: if an answer is empty.
        ValueError: if the row has none of the formats, or is malformed in one.
    """
    tools = _tools_of(row)
    for made in _conversations_of(row):
        yield {**made, **tools}


def _tools_of(row: Row) -> Row:
    for column in ("tools", "functions"):
        tools = read_tools(row.get(column), column)
        if tools is not None:
            return {"tools": tools}
    return {}


def _conversations_of(row: Row) -> Iterator[Row]:
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            messages = read_messages(row[column], column)
            whole = _with_system(row, messages)
            yield from _answers_in(whole, column, [*([{}] if len(whole) > len(messages) else []), *row[column]])
            return
    for question, answer in _PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            prompt, completion = _prompt(row, question), _as_messages(row[answer], answer, "assistant")
            _check_turns(prompt, question)
            if not any(_says_something(message) for message in completion):
                raise TeachesNothing("an empty answer")
            _check_answer(completion, answer)
            yield {"prompt": prompt, "completion": completion}
            return
    if is_transcript(row.get("text")):
        yield from _answers_in(_with_system(row, read_transcript(row["text"], "text")), "text", [])
        return
    raise _unknown_format(row, _CONVERSATION_COLUMNS)


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the row's `system`, where it has one and they do not begin with another."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": check_text(system, "'system'")}, *messages]


def _answers_in(messages: list[Message], column: str, raw: list[Any]) -> Iterator[Row]:
    """One row for each answer whose message in `raw` has no weight of 0: the prompt is everything before it."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"'{column}' ends with a message of '{messages[-1]['role']}', expected 'assistant'")
    if messages[0]["role"] == "assistant":
        raise ValueError(f"'{column}' begins with a message of 'assistant', expected 'user' or 'system'")
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not all(_says_something(messages[index]) for index in places):
        raise TeachesNothing("an empty answer")
    if raw:
        places = [index for index in places if raw[index].get("weight") != 0]
    if not places:
        raise TeachesNothing("no answer whose weight is not 0")
    for index in places:
        yield {"prompt": messages[:index], "completion": [messages[index]]}


def read_preferences(row: Row) -> Iterator[Row]:
    """The preferences of a row as `prompt`, `chosen` and `rejected` (with `tools`): one, or all pairs of a ranking.

    Raises:
        TeachesNothing: if it prefers nothing, or an answer is empty.
        ValueError: if the row has none of the formats, or is malformed in one.
    """
    for ranking in read_rankings(row):
        beside = {name: value for name, value in ranking.items() if name not in ("completions", "ranks")}
        ranked = zip(ranking["completions"], ranking["ranks"], strict=True)
        for (better, rank), (worse, lower) in combinations(ranked, 2):
            if rank < lower and better != worse:
                yield {**beside, "chosen": better, "rejected": worse}


def read_rankings(row: Row) -> Iterator[Row]:
    """The ranking of a row: `prompt`, `completions` from best to worst and their `ranks` (1 is best; ties share one).

    Raises:
        TeachesNothing: if it prefers nothing, or an answer is empty.
        ValueError: if the row has none of the formats, or is malformed in one.
    """
    column = next((name for name in _LIST_COLUMNS if isinstance(row.get(name), list | tuple)), None)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        yield {**_pair(row), **_tools_of(row)}
    elif column is not None:
        yield {**_ranking(row, column), **_tools_of(row)}
    else:
        raise _unknown_format(row, _PREFERENCE_COLUMNS)


def _pair(row: Row) -> Row:
    question = next((name for name in _PROMPT_COLUMNS if row.get(name) is not None), None)
    chosen, rejected = (_whole_or_answer(row[column], column) for column in ("chosen", "rejected"))
    prompt = _common_start(chosen, rejected) if question is None else _prompt(row, question)
    if not prompt:
        raise _unknown_format(row, _PREFERENCE_COLUMNS)
    _check_turns(prompt, question or "chosen")
    chosen, rejected = (_without_prompt(answer, prompt) for answer in (chosen, rejected))
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer:
            _check_answer(answer, column)
    if chosen == rejected:
        raise TeachesNothing("two equal answers")
    if not chosen or not rejected or not _says_something(chosen[-1]):
        raise TeachesNothing("an empty answer")
    return {"prompt": prompt, "completions": [chosen, rejected], "ranks": [1, 2]}


def _ranking(row: Row, column: str) -> Row:
    question = next((name for name in _PROMPT_COLUMNS if row.get(name) is not None), None)
    if question is None:
        raise _unknown_format(row, _PREFERENCE_COLUMNS)
    prompt = _prompt(row, question)
    _check_turns(prompt, question)
    entries = list(row[column])
    if len(entries) < 2:
        raise ValueError(f"'{column}' holds {len(entries)} answers, expected at least 2 to rank")
    answers = [_ranked_answer(entry, f"answer {number} of '{column}'") for number, entry in enumerate(entries, 1)]
    ranks = _ranks(row, column, entries)
    order = sorted(range(len(answers)), key=ranks.__getitem__)
    if any(not any(_says_something(message) for message in answer) for answer in answers):
        raise TeachesNothing("an empty answer")
    if len(set(ranks)) == 1:
        raise TeachesNothing("answers that all rank alike")
    if all(answer == answers[0] for answer in answers):
        raise TeachesNothing("equal answers")
    dense = {rank: number for number, rank in enumerate(sorted(set(ranks)), start=1)}
    return {
        "prompt": prompt,
        "completions": [answers[index] for index in order],
        "ranks": [dense[ranks[index]] for index in order],
    }


def _ranked_answer(entry: Any, where: str) -> list[Message]:
    if isinstance(entry, Mapping):
        name = next((name for name in _TEXT_COLUMNS if entry.get(name) is not None), None)
        if name is None:
            raise ValueError(f"{where} has {', '.join(map(shown, entry))}, expected one of {', '.join(_TEXT_COLUMNS)}")
        entry, where = entry[name], f"{where}: {name}"
    answer = [_answer(entry, where)] if isinstance(entry, str) else read_messages(entry, where)
    _check_answer(answer, where)
    return answer


def _answer(text: str, where: str) -> Message:
    return {"role": "assistant", "content": check_text(text, where)}


def _ranks(row: Row, column: str, entries: list[Any]) -> list[float]:
    """How the answers rank, smaller is better: from their ranks, their scores, or the order of the list."""
    for names, sign in ((_RANK_COLUMNS, 1), (_SCORE_COLUMNS, -1)):
        for name in names:
            values = row.get(name)
            if values is None and all(isinstance(entry, Mapping) and entry.get(name) is not None for entry in entries):
                values = [entry[name] for entry in entries]
            if values is not None:
                return [sign * value for value in _numbers(values, name, column, len(entries))]
    return list(range(len(entries)))


def _numbers(values: Any, name: str, column: str, count: int) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list | tuple) else kind_of(values)
        raise ValueError(f"'{name}' holds {found}, expected one for each of the {count} '{column}'")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"'{name}' holds {shown(value)}, expected numbers")
    return list(values)


def _whole_or_answer(value: Any, column: str) -> list[Message]:
    return read_transcript(value, column) if is_transcript(value) else _as_messages(value, column, "assistant")


def _common_start(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """What two whole conversations share, up to the last message before their answers differ."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    start = chosen[:shared]
    while start and start[-1]["role"] == "assistant":
        start = start[:-1]
    return start


def _without_prompt(answer: list[Message], prompt: list[Message]) -> list[Message]:
    """Some data sets repeat the prompt at the start of both answers."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _prompt(row: Row, column: str) -> list[Message]:
    value = row[column]
    prompt = read_transcript(value, column) if is_transcript(value) else _as_messages(value, column, "user")
    extra = row.get("input") if column == "instruction" else None
    if extra is not None and check_text(extra, "'input'").strip():
        prompt = [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{extra}"}]
    return _with_system(row, prompt)


def _check_turns(prompt: list[Message], column: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"'{column}' ends with a message of 'assistant', expected 'user'")
    if not any(message["content"].strip() for message in prompt):
        raise ValueError(f"'{column}' is empty")


def _check_answer(answer: list[Message], column: str) -> None:
    for place, at in (("begins", 0), ("ends", -1)):
        if answer[at]["role"] != "assistant":
            raise ValueError(f"'{column}' {place} with a message of '{answer[at]['role']}', expected 'assistant'")


def _as_messages(value: Any, column: str, role: str) -> list[Message]:
    """Text becomes one message of `role`; messages are checked."""
    if isinstance(value, str):
        return [{"role": role, "content": check_text(value, f"'{column}'")}]
    if not isinstance(value, list | tuple):
        raise ValueError(f"'{column}' holds {kind_of(value)}, expected text or a list of messages")
    return read_messages(list(value), column)


def _unknown_format(row: Row, expected: str) -> ValueError:
    found = ", ".join(
        shown(str(name)) + (" (empty)" if value is None else "") for name, value in list(row.items())[:12]
    )
    return ValueError(f"unknown format with the columns {found or 'none'}; expected {expected}")
