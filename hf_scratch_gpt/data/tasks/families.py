"""The families of questions: each builder turns one definition into a question, its code, its answer and wrong ones.

All but `module_closed_book`, `words` and `arithmetic` are open book: what the question needs stands in the code
shown with it, so that a small model is asked to read rather than to know. Many show a second definition that could be
mistaken for the one asked about.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from hf_scratch_gpt.data.tasks.functions import Definition

LARGEST_OPERAND = 20
COMMON_DEFAULTS = ("None", "False", "True", "0", "1", "-1", "''", "()")
COMMON_EXCEPTIONS = ("ValueError", "TypeError", "KeyError", "OSError", "RuntimeError", "IndexError", "AttributeError")
SEPARATORS = ("-", "_", "/", ".", "+")
SHARE_WITH_DISTRACTOR = 0.4


@dataclass(frozen=True)
class Question:
    """A question before it is worded.

    Args:
        family (`str`): the family it is counted under.
        wording (`str`): key into the wordings, such as `summary` or `words/join`.
        name (`str`): the subject.
        answer (`str`): the one right answer.
        wrong (`tuple[str, ...]`): wrong answers of the same type, most plausible first.
        code (`str`): the code shown, may be empty.
        fields (`dict[str, str]`): what the wording's placeholders stand for, besides `name`.
    """

    family: str
    wording: str
    name: str
    answer: str
    wrong: tuple[str, ...]
    code: str = ""
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """What a split may use: its definitions, its plain words and its pairs of operands; nothing of the other split."""

    definitions: tuple[Definition, ...]
    words: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    closed_book: tuple[Definition, ...]


def _another(
    subject: Definition, candidates: Sequence[Definition], differs: Callable[[Definition], str], random: Random
):
    """A random definition of another name whose `differs` is neither empty nor that of `subject`."""
    for _ in range(30):
        other = random.choice(candidates)
        if other.name != subject.name and differs(other) and differs(other) != differs(subject):
            return other
    return None


def _several(
    subject: Definition, candidates: Sequence[Definition], value: Callable[[Definition], str], random: Random
):
    """Values of other definitions, those nearest in length to the subject's first: plausible wrong answers."""
    others = [_another(subject, candidates, value, random) for _ in range(6)]
    length = len(value(subject))
    return sorted({value(other) for other in others if other}, key=lambda text: (abs(len(text) - length), text))


def _shuffled(blocks: list[str], random: Random, separator: str = "\n") -> str:
    random.shuffle(blocks)
    return separator.join(blocks)


def _unique(wrong: Sequence[str], answer: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in wrong if text and text != answer))


def _usage(definition: Definition, random: Random) -> str:
    """A line that names both module and definition."""
    module, name = definition.module, definition.name
    call = f"{module}.{name}({', '.join(definition.required[:3])})"
    return random.choice((f"from {module} import {name}", call))


def module_of(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """Which module provides this name? It shows a line that uses it, often among others; `None` for a method."""
    if definition.kind == "method":
        return None
    blocks = [_usage(definition, random)]
    top_level = [other for other in random.sample(pool.definitions, min(40, len(pool.definitions))) if not other.owner]
    if not top_level:
        return None
    other = _another(definition, top_level, lambda d: d.module, random)
    wrong = _several(definition, top_level, lambda d: d.module, random)
    if other and random.random() < 0.6:
        blocks.append(_usage(other, random))
        wrong.insert(0, other.module)
    wrong = _unique([*wrong, definition.name], definition.module)
    return Question("module_of", "module_of", definition.name, definition.module, wrong, _shuffled(blocks, random))


def module_closed_book(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """Which module provides this name? Nothing is shown; `None` outside the pool's closed-book names."""
    if definition not in pool.closed_book:
        return None
    wrong = _unique(_several(definition, pool.closed_book, lambda d: d.module, random), definition.module)
    return Question("module_closed_book", "module_closed_book", definition.name, definition.module, wrong)


def _without_body(definition: Definition) -> str:
    return f"{definition.header}\n    ..."


def _with_docstring(definition: Definition) -> str:
    if not definition.summary:
        return _without_body(definition)
    return f'{definition.header}\n    """{definition.summary}"""'


def _as_help(definition: Definition) -> str:
    """As `help()` prints it."""
    return f"{definition.signature}\n    {definition.summary or '...'}"


def _code_with_distractor(
    definition: Definition,
    pool: Pool,
    show: Callable[[Definition], str],
    usable: Callable[[Definition], str],
    random: Random,
) -> tuple[str, Definition | None]:
    """Code of the definition and, for a share of the questions, of a second one before or after it."""
    other = None
    if random.random() < SHARE_WITH_DISTRACTOR:
        other = _another(definition, pool.definitions, usable, random)
    if other and len(show(definition)) + len(show(other)) > 230:
        other = None
    blocks = [show(definition)] + ([show(other)] if other else [])
    return _shuffled(blocks, random), other


def summary(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """What does this do? The answer is its docstring's first line, which is shown; `None` without one."""
    if not definition.summary or not definition.header:
        return None
    code, other = _code_with_distractor(
        definition, pool, _with_docstring, lambda d: d.summary if d.header else "", random
    )
    wrong = _several(definition, pool.definitions, lambda d: d.summary, random)
    if other:
        wrong.insert(0, other.summary)
    return Question(
        "summary", "summary", definition.name, definition.summary, _unique(wrong, definition.summary), code
    )


def change_list(items: Sequence[str], spare: str, random: Random) -> list[list[str]]:
    """Lists that differ from `items` by one change: two swapped, one dropped, one replaced by `spare`, or it added."""
    changed = []
    if len(items) >= 2:
        at = random.randrange(len(items) - 1)
        changed.append([*items[:at], items[at + 1], items[at], *items[at + 2 :]])
    if items:
        at = random.randrange(len(items))
        changed.append([*items[:at], *items[at + 1 :]])
        changed.append([*items[:at], spare, *items[at + 1 :]])
    at = random.randrange(len(items) + 1)
    changed.append([*items[:at], spare, *items[at:]])
    random.shuffle(changed)
    return changed


def _arguments(signature: str) -> list[str]:
    """The arguments in the outermost brackets of `name(a, b=(1, 2))`, as source."""
    inside = signature[signature.index("(") + 1 : -1]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(inside):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(inside[start:position].strip())
            start = position + 1
    return [*parts, inside[start:].strip()] if inside.strip() else []


def signature(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """How is this called? The answer is `name(arguments)`, as shown; `None` where it is too long."""
    if definition.kind == "class" or not definition.header or len(definition.signature) > 70:
        return None
    show = random.choice((_as_help, _with_docstring)) if definition.summary else _without_body
    code, other = _code_with_distractor(
        definition, pool, show, lambda d: d.signature if d.owner or d.kind == "function" else "", random
    )
    spare = random.choice(
        random.choice([d.parameters for d in random.sample(pool.definitions, 60)] + [("value",)]) or ("data",)
    )
    wrong = [
        f"{definition.name}({', '.join(items)})"
        for items in change_list(_arguments(definition.signature), spare, random)
    ]
    if other:
        wrong.insert(random.randrange(3), other.signature)
    return Question(
        "signature", "signature", definition.name, definition.signature, _unique(wrong, definition.signature), code
    )


def complete_call(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """Complete a call that begins with some of the required arguments; `None` where there are none."""
    required = definition.required
    if not required or not definition.header or definition.kind == "class":
        return None
    given = random.randrange(len(required))
    target = f"self.{definition.name}" if definition.owner else definition.name
    begun = f"{target}({''.join(name + ', ' for name in required[:given])}".strip()
    answer = f"{', '.join(required[given:])})"
    spare = random.choice([*(name for name, _ in definition.defaults), *required[:given], definition.name, "value"])
    wrong = [f"{', '.join(items)})" for items in change_list(required[given:], spare, random)]
    code, _ = _code_with_distractor(
        definition, pool, _without_body, lambda d: d.name if d.required and d.header else "", random
    )
    return Question(
        "complete_call", "complete_call", definition.name, answer, _unique(wrong, answer), code, {"begun": begun}
    )


def parameter(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """What is the first, or the last, parameter's name? `None` with fewer than two."""
    names = definition.parameters
    if len(names) < 2 or not definition.header:
        return None
    # What comes first after `self` is a matter of opinion, so methods are asked for the last one only.
    which = random.choice(("first", "last")) if not definition.owner else "last"
    answer = names[0 if which == "first" else -1]
    code, other = _code_with_distractor(
        definition,
        pool,
        _without_body,
        lambda d: d.name if d.parameters and d.header else "",
        random,
    )
    wrong = [names[-1 if which == "first" else 0], *names, *(other.parameters if other else ()), definition.name]
    return Question("parameter", "parameter", definition.name, answer, _unique(wrong, answer), code, {"which": which})


def default(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """What is a parameter's default value? `None` where no parameter has one."""
    if not definition.defaults or not definition.header:
        return None
    # None and False are the default of most parameters; others are preferred where there is a choice.
    uncommon = [pair for pair in definition.defaults if pair[1] not in ("None", "False")]
    name, answer = random.choice(uncommon or definition.defaults)
    code, other = _code_with_distractor(
        definition, pool, _without_body, lambda d: d.name if d.defaults and d.header else "", random
    )
    shown = [text for _, text in (*definition.defaults, *(other.defaults if other else ()))]
    common = random.sample(COMMON_DEFAULTS, 3)
    wrong = _unique([*shown, *sorted(common, key=lambda text: abs(len(text) - len(answer))), name], answer)
    return Question("default", "default", definition.name, answer, wrong, code, {"parameter": name})


def class_base(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """From which class does this class inherit? `None` where it has no base."""
    if not definition.base:
        return None
    show = random.choice((_with_docstring, _without_body))
    code, other = _code_with_distractor(definition, pool, show, lambda d: d.base, random)
    wrong = _several(definition, [d for d in random.sample(pool.definitions, 200) if d.base], lambda d: d.base, random)
    wrong = [*([other.base] if other else []), definition.name, *wrong]
    return Question(
        "class_base", "class_base", definition.name, definition.base, _unique(wrong, definition.base), code
    )


def returns(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """What does this return? The answer is the returned expression as source; `None` where there is none."""
    if not definition.returned or not definition.header:
        return None
    code, other = _code_with_distractor(
        definition,
        pool,
        lambda d: f"{d.header}\n    ...\n    return {d.returned}",
        lambda d: d.returned if d.header else "",
        random,
    )
    wrong = _several(definition, pool.definitions, lambda d: d.returned, random)
    words = sorted(set(re.findall(r"[A-Za-z_]\w*", definition.returned)) - {"self"})
    if words:
        replaced, other_word = random.choice(words), random.choice([*definition.parameters, definition.name, "data"])
        wrong.insert(0, re.sub(rf"\b{replaced}\b", other_word, definition.returned))
    if other:
        wrong.insert(0, other.returned)
    return Question(
        "returns", "returns", definition.name, definition.returned, _unique(wrong, definition.returned), code
    )


def raises(definition: Definition, pool: Pool, random: Random) -> Question | None:
    """Which exception does this raise? `None` where it raises none."""
    name, _ = definition.raised
    if not name or not definition.header:
        return None
    code, other = _code_with_distractor(
        definition,
        pool,
        lambda d: f"{d.header}\n    ...\n    {d.raised[1]}",
        lambda d: d.raised[0] if d.header else "",
        random,
    )
    wrong = [*([other.raised[0]] if other else []), *random.sample(COMMON_EXCEPTIONS, 3), definition.name]
    return Question("raises", "raises", definition.name, name, _unique(wrong, name), code)


def words(pool: Pool, random: Random) -> Question | None:
    """Operations on a few names: the first or last of them, the one after another, join them, repeat one."""
    chosen = random.sample(pool.words, random.randint(3, 5))
    subject, fields = chosen[0], {}
    operation = random.choice(("end", "after", "join", "repeat"))
    if operation == "end":
        which = random.choice(("first", "last"))
        answer = subject = chosen[0 if which == "first" else -1]
        wrong, fields = [chosen[-1 if which == "first" else 0], *chosen], {"which": which}
    elif operation == "after":
        at = random.randrange(len(chosen) - 1)
        answer, subject = chosen[at + 1], chosen[at]
        wrong, fields = [*chosen[at + 2 :], *chosen[:at], subject], {"word": subject}
    elif operation == "join":
        chosen, separator = chosen[:3], random.choice(SEPARATORS)
        answer = separator.join(chosen)
        wrong = [separator.join(items) for items in change_list(chosen, random.choice(pool.words), random)]
        wrong += [other.join(chosen) for other in SEPARATORS if other != separator]
        fields = {"separator": separator}
    else:
        count = random.choice((2, 3))
        answer = " ".join([subject] * count)
        wrong = [
            " ".join([subject] * (5 - count)),
            " ".join([chosen[1]] * count),
            " ".join([subject] * (count - 1) + [chosen[1]]),
        ]
        fields = {"word": subject, "times": "twice" if count == 2 else "three times"}
    code = "" if operation == "repeat" else random.choice(("\n", "\n", " ")).join(chosen)
    return Question("words", f"words/{operation}", subject, answer, _unique(wrong, answer), code, fields)


def arithmetic(pool: Pool, random: Random) -> Question | None:
    """Sums and differences of the operands 1 to 20; a pair of operands belongs to one split in any order."""
    small, large = random.choice(pool.pairs)
    if random.random() < 0.5:
        operation, (first, second) = "sum", random.choice(((small, large), (large, small)))
        answer = first + second
    else:
        operation, first, second, answer = "difference", large, small, large - small
    other = first - second if operation == "sum" else first + second
    wrong = [str(value) for value in (answer + 1, answer - 1, answer + 10, answer + 2, abs(other)) if value >= 0]
    random.shuffle(wrong)
    fields = {"first": str(first), "second": str(second)}
    name = f"{small},{large}"
    return Question(
        "arithmetic", f"arithmetic/{operation}", name, str(answer), _unique(wrong, str(answer)), fields=fields
    )


OF_DEFINITIONS: dict[str, Callable[[Definition, Pool, Random], Question | None]] = {
    builder.__name__: builder
    for builder in (
        summary, signature, module_of, complete_call, parameter, default, returns, class_base, raises,
        module_closed_book,
    )
}  # fmt: skip
FREE: dict[str, Callable[[Pool, Random], Question | None]] = {"words": words, "arithmetic": arithmetic}

# How much of the tuning rows each family gets: what needs exact copying of a long text gets most, since it needs most.
TUNING_SHARES = {
    "summary": 0.16, "signature": 0.11, "returns": 0.10, "module_of": 0.10, "complete_call": 0.10, "words": 0.10,
    "parameter": 0.08, "default": 0.07, "class_base": 0.06, "arithmetic": 0.06, "raises": 0.04,
    "module_closed_book": 0.02,
}  # fmt: skip
