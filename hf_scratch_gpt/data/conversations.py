"""The one place that knows conversation formats: every common one becomes TRL's conversational `prompt`/`completion`
or `prompt`/`chosen`/`rejected`, lists of `{"role", "content"}` messages.

Read are local .jsonl, .json, .csv, .tsv and .parquet files, a folder of the stage `prepare` (its tasks), and
`datasets` ids. A row of conversations has one of

- `messages`, or `conversations` as ShareGPT writes them (`from`, `value`): one row is made for every answer in it,
  with all that was said before as its prompt, so that every answer is learnt once;
- `prompt` and `completion` (or `response`), each text or messages;
- Alpaca's `instruction`, `input` (may be missing) and `output` (or `response`);
- `question` and `answer`.

A row of preferences has `chosen` and `rejected`, each text or messages, after `prompt`, `instruction` and `input`, or
`question`; without any of these, both are whole conversations that begin alike.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.manifest import find_file
from hf_scratch_gpt.data.rows import ROW_SUFFIXES, read_rows

logger = logging.getLogger(__name__)

Message = dict[str, str]
Row = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}
# Column of the question and column of its answer, in the order in which they are looked for.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_PROMPT_COLUMNS = ("prompt", "instruction", "question")
_CONVERSATION_COLUMNS = (
    "messages; conversations; prompt and completion; instruction, input and output; question and answer"
)
_PREFERENCE_COLUMNS = "prompt (or instruction and input), chosen and rejected"
_FILES = {
    ("conversations", "train"): "train.jsonl",
    ("conversations", "heldout"): "heldout.jsonl",
    ("preferences", "train"): "preferences_train.jsonl",
    ("preferences", "heldout"): "preferences_heldout.jsonl",
}


def load_conversations(
    source: str | Path, split: str | None = None, streaming: bool = False, keep_columns: bool = False
) -> Any:
    """Load questions with their answers as a `datasets.Dataset` with the columns `prompt` and `completion`.

    Args:
        source (`str` or `Path`): A local file, a `prepare` folder (its tasks), or a `datasets` id, `owner/name` or
            `owner/name:configuration`.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"heldout"` of a `prepare` folder, or any split
            of a `datasets` id; a file has none.
        streaming (`bool`, *optional*, defaults to `False`): Return an `IterableDataset` that reads as it is read.
        keep_columns (`bool`, *optional*, defaults to `False`): Keep the row's other columns (`family`, `answer`, ...).

    Raises:
        FileNotFoundError: if a local source is missing.
        OSError: if a data set cannot be read.
        ValueError: for text that is not UTF-8, a malformed row or a row of an unknown format (naming file and row),
            and where no row is left.
    """
    return _load(source, split, streaming, keep_columns, "conversations", _read_conversations)


def load_preferences(
    source: str | Path, split: str | None = None, streaming: bool = False, keep_columns: bool = False
) -> Any:
    """Load preferences as a `datasets.Dataset` with the columns `prompt`, `chosen` and `rejected`.

    Arguments and errors are those of `load_conversations`. Pairs whose two answers are the same are left out, since
    they prefer nothing; a warning says how many.
    """
    return _load(source, split, streaming, keep_columns, "preferences", _read_preferences)


def _load(
    source: str | Path,
    split: str | None,
    streaming: bool,
    keep_columns: bool,
    kind: str,
    convert: Callable[[Row], Iterator[Row]],
) -> Any:
    from datasets import Dataset, IterableDataset

    def converted() -> Iterator[Row]:
        return _convert(_open(source, split, streaming, kind), str(source), convert, keep_columns)

    if not streaming:
        return Dataset.from_list(list(converted()))
    _open(source, split, streaming, kind)  # a missing file or split shows now, not at the first row
    return IterableDataset.from_generator(converted)


def _open(source: str | Path, split: str | None, streaming: bool, kind: str) -> Iterator[tuple[str, Row]]:
    """The raw rows of a source as `(file and place, row)`."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_of_folder(path, split or "train", kind)
    elif path.is_file() and split not in (None, "train"):
        raise ValueError(f"{path}: a file has no split '{split}'; name the file that holds it")
    if path.is_file():
        return ((f"{path}, {place}", row) for place, row in read_rows(path))
    text = str(source)
    is_path = path.is_absolute() or text.startswith((".", "~")) or len(path.parts) > 2
    if not text or is_path or path.suffix.lower() in ROW_SUFFIXES:
        raise FileNotFoundError(f"no such file or folder: '{source}'")
    return _read_data_set(text, split or "train", streaming)


def _file_of_folder(folder: Path, split: str, kind: str) -> Path:
    if (kind, split) not in _FILES:
        raise ValueError(f"{folder}: no split '{split}'; a prepare folder has 'train' and 'heldout'")
    name = _FILES[kind, split]
    for place in (f"tasks/{name}", name):
        path = find_file(folder, place)
        if path is not None:
            return path
    raise FileNotFoundError(
        f"{folder}: holds no tasks/{name}; make it by the stage 'prepare' with tasks, or name a file"
    )


def _read_data_set(source: str, split: str, streaming: bool) -> Iterator[tuple[str, Row]]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"data set {source}, row {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"'{source}' is no local file or folder, and cannot be read as a data set id: {error}"
        ) from error


def _convert(
    rows: Iterable[tuple[str, Row]], source: str, convert: Callable[[Row], Iterator[Row]], keep_columns: bool
) -> Iterator[Row]:
    """Convert rows; those that teach nothing are left out and counted, malformed ones raise with their place."""
    skipped: Counter[str] = Counter()
    total = kept = 0
    for place, row in rows:
        total += 1
        try:
            made = list(convert(row))
        except _TeachesNothing as reason:
            skipped[str(reason)] += 1
            continue
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        kept += len(made)
        extra = {name: value for name, value in row.items() if name not in _READ_COLUMNS} if keep_columns else {}
        yield from ({**extra, **new} for new in made)
    reasons = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
    if not kept:
        raise ValueError(f"{source}: no usable rows; found {f'{total} rows, {reasons}' if total else 'an empty file'}")
    if skipped:
        logger.warning("%s: leaving out %d of %d rows: %s", source, skipped.total(), total, reasons)


# Columns that a conversion takes in, which are therefore not kept beside what it makes of them.
_READ_COLUMNS = {"messages", "conversations", "input", "chosen", "rejected"} | {
    name for pair in _PAIRS[:4] for name in pair
}


class _TeachesNothing(Exception):
    """A well-formed row from which nothing can be learnt; the text says why."""


def _read_conversations(row: Row) -> Iterator[Row]:
    for column, read in (("messages", _messages), ("conversations", _sharegpt_messages)):
        if row.get(column) is not None:
            yield from _answers_in(read(row[column], column), column)
            return
    for question, answer in _PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            prompt, completion = _prompt(row, question), _as_messages(row[answer], answer, "assistant")
            _check_turns(prompt, question)
            if not any(message["content"].strip() for message in completion):
                raise _TeachesNothing("an empty answer")
            if completion[-1]["role"] != "assistant":
                raise ValueError(f"'{answer}' ends with a message of '{completion[-1]['role']}', expected 'assistant'")
            yield {"prompt": prompt, "completion": completion}
            return
    raise _unknown_format(row, _CONVERSATION_COLUMNS)


def _answers_in(messages: list[Message], column: str) -> Iterator[Row]:
    """One row for each answer: the prompt is everything before it."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"'{column}' ends with a message of '{messages[-1]['role']}', expected 'assistant'")
    if messages[0]["role"] == "assistant":
        raise ValueError(f"'{column}' begins with a message of 'assistant', expected 'user' or 'system'")
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if not message["content"].strip():
                raise _TeachesNothing("an empty answer")
            yield {"prompt": messages[:index], "completion": [message]}


def _read_preferences(row: Row) -> Iterator[Row]:
    if row.get("chosen") is None or row.get("rejected") is None:
        raise _unknown_format(row, _PREFERENCE_COLUMNS)
    chosen, rejected = (_as_messages(row[column], column, "assistant") for column in ("chosen", "rejected"))
    question = next((column for column in _PROMPT_COLUMNS if row.get(column) is not None), None)
    prompt = _common_start(chosen, rejected) if question is None else _prompt(row, question)
    if not prompt:
        raise _unknown_format(row, _PREFERENCE_COLUMNS)
    _check_turns(prompt, question or "chosen")
    chosen, rejected = (_without_prompt(answer, prompt) for answer in (chosen, rejected))
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer and answer[-1]["role"] != "assistant":
            raise ValueError(f"'{column}' ends with a message of '{answer[-1]['role']}', expected 'assistant'")
    if chosen == rejected:
        raise _TeachesNothing("two equal answers")
    if not chosen or not rejected or not chosen[-1]["content"].strip():
        raise _TeachesNothing("an empty answer")
    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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
    prompt = _as_messages(row[column], column, "user")
    extra = row.get("input") if column == "instruction" else None
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"'input' holds {type(extra).__name__}, expected text")
    if extra and extra.strip():
        prompt = [{"role": "user", "content": f"{prompt[0]['content']}\n\n{extra}"}]
    return prompt


def _check_turns(prompt: list[Message], column: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"'{column}' ends with a message of 'assistant', expected 'user'")
    if not any(message["content"].strip() for message in prompt):
        raise ValueError(f"'{column}' is empty")


def _as_messages(value: Any, column: str, role: str) -> list[Message]:
    """Text becomes one message of `role`; messages are checked."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, column)


def _messages(value: Any, column: str, role_key: str = "role", text_key: str = "content") -> list[Message]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise ValueError(
            f"'{column}' holds {found}, expected text or a list of messages with '{role_key}' and '{text_key}'"
        )
    checked = []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of '{column}'"
        if not isinstance(message, Mapping) or role_key not in message or text_key not in message:
            found = ", ".join(message) if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(f"{where} has {found}, expected '{role_key}' and '{text_key}'")
        if not isinstance(message[text_key], str):
            raise ValueError(f"{where}: '{text_key}' holds {type(message[text_key]).__name__}, expected text")
        checked.append({"role": _role(message[role_key], where, role_key), "content": message[text_key]})
    return checked


def _sharegpt_messages(value: Any, column: str) -> list[Message]:
    return _messages(value, column, "from", "value")


def _role(role: Any, where: str, role_key: str) -> str:
    known = _SHAREGPT_ROLES if role_key == "from" else {role: role for role in ROLES}
    if role not in known:
        raise ValueError(f"{where}: unknown {role_key} '{role}', expected {', '.join(known)}")
    return known[role]


def _unknown_format(row: Row, expected: str) -> ValueError:
    names = [f"'{name if len(name) <= 40 else name[:37] + '...'}'" for name in row]
    found = ", ".join(
        name + (" (empty)" if value is None else "") for name, value in zip(names[:12], row.values(), strict=False)
    )
    return ValueError(f"unknown format with the columns {found or 'none'}; expected {expected}")
