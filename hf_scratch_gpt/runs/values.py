"""Checks a recipe's values against the types of a settings dataclass; argparse checks only what is a string."""

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or an empty string if none is near."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: those of a union, or the hint alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _choices(hint: Any) -> list[Any] | None:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [member.value for member in hint]
    return None


def _read_as(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether `value` is what a type hint wants, and the value as that type."""
    origin = typing.get_origin(hint) or hint
    choices = _choices(hint)
    if choices is not None:
        plain = value.value if isinstance(value, enum.Enum) else value
        return any(plain == choice and type(plain) is type(choice) for choice in choices), value
    if origin is bool:
        known = _BOOLEANS.get(value.lower()) if isinstance(value, str) else value
        return isinstance(known, bool), known
    if origin in (int, float):
        return _read_number(origin, value)
    if origin is str:
        return isinstance(value, str), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, value
        item_hint = (*typing.get_args(hint), Any)[0]
        read = [_read_as(item_hint, item) for item in value]
        return all(fits for fits, _ in read), [item for _, item in read]
    if origin is dict:
        return isinstance(value, dict | str), value  # TrainingArguments reads text as JSON
    return True, value  # a type that only its own class can judge


def _read_number(kind: Any, value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    if kind is int and isinstance(value, float):
        return False, value
    try:
        return True, kind(value)  # YAML 1.1 reads 1e-3, which has no point, as text
    except ValueError:
        return False, value


def _expectation(hints: Sequence[Any], value: Any) -> str:
    for hint in hints:
        choices = _choices(hint)
        if choices is not None:
            quote = (
                ""
                if not isinstance(value, bool)
                else " (quote it: YAML reads a bare yes, no, on and off as true, false)"
            )
            return (
                f"one of {', '.join(map(str, choices))}{quote}{nearest(str(value), [str(item) for item in choices])}"
            )
    names = []
    for hint in hints:
        origin = typing.get_origin(hint) or hint
        if origin in (list, tuple):
            items = {int: "of integers", float: "of numbers", str: "of texts"}.get(
                (*typing.get_args(hint), Any)[0], ""
            )
            names.append(f"a list {items}".strip())
        elif hint is not type(None):
            names.append(_NAMES.get(origin, str(hint)))
    is_text = hints and hints[0] is str and not isinstance(value, str | list | dict)
    return " or ".join(names) + (" (quote it)" if is_text else "")


def read_mapping(value: Any, setting: str, form: str, split: Callable[[str, str], tuple[str, str, str]]) -> dict:
    """A setting that is a mapping in a recipe, and a JSON object or `key=value` texts on the command line.

    Args:
        value: The mapping, a text, texts, or `None` for an empty mapping.
        setting (`str`): Its name, for messages.
        form (`str`): What one text is expected to be, such as `"key=value"`.
        split: `str.partition`, or `str.rpartition` where a key may contain an equals sign; a value is YAML.

    Raises:
        ValueError: for a text that is neither.
    """
    import yaml

    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{setting}: '{value}' is not a JSON object") from error
    if isinstance(value, dict):
        return dict(value)
    texts = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value or []
    mapping = {}
    for text in texts:
        key, equals, content = split(str(text), "=")
        if not equals:
            raise ValueError(f"{setting}: '{text}' is not of the form {form}")
        mapping[key.strip()] = yaml.safe_load(content)
    return mapping


def check_recipe_values(argument_class: type, recipe: dict[str, Any], origin: str) -> dict[str, Any]:
    """The recipe with each value as its field's type.

    Raises:
        ValueError: for a value that is not of its field's type, naming setting, value and what was expected.
    """
    hints = typing.get_type_hints(argument_class)
    fields = {field.name: field for field in dataclasses.fields(argument_class)}
    checked: dict[str, Any] = {}
    for name, value in recipe.items():
        members = _members(hints[name])
        if value is None:
            if type(None) not in members and fields[name].default is not None:
                expected = _expectation(members, value)
                raise ValueError(f"{origin}: '{name}' has no value, expected {expected}")
            checked[name] = None
            continue
        reads = [_read_as(member, value) for member in members if member is not type(None)]
        fitting = [read for fits, read in reads if fits]
        choices = fields[name].metadata.get("choices")  # argparse holds only the command line to them
        if choices is not None and fitting and value not in choices:
            listed = ", ".join(map(str, choices))
            raise ValueError(
                f"{origin}: '{name}' is {value!r}, expected one of {listed}{nearest(str(value), [*choices])}"
            )
        if not fitting:
            raise ValueError(f"{origin}: '{name}' is {value!r}, expected {_expectation(members, value)}")
        checked[name] = next((read for read in fitting if type(read) is type(value)), fitting[0])
    return checked
