"""A stage's settings: one dataclass, read by TRL's parser from a YAML recipe and then from the command line."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

# Settings that change neither weights nor metrics: a run that differs only in these is the same run.
VOLATILE_FIELDS = frozenset(
    {
        "output_dir",
        "report_to",
        "run_name",
        "project",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "log_level",
        "disable_tqdm",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "dataloader_num_workers",
        "dataset_num_proc",
        "trackio_space_id",
        "hub_token",
    }
)


@dataclasses.dataclass
class StageArguments:
    """What every stage of our own takes; the stages on TRL's trainers have the same names from `TrainingArguments`.

    Args:
        output_dir (`str`): Folder that the stage writes. Created; one stage a folder.
        seed (`int`, *optional*, defaults to `42`): Seed of everything random in the stage.
        report_to (`str`, *optional*, defaults to `"none"`): `"none"`, `"tensorboard"` or `"trackio"`.
    """

    # Fields that name what the stage reads: run folders, files or data set ids. They enter the fingerprint by content.
    input_fields: ClassVar[tuple[str, ...]] = ()

    output_dir: str = dataclasses.field(default="", metadata={"help": "Folder that the stage writes."})
    seed: int = dataclasses.field(default=42, metadata={"help": "Seed of everything random in the stage."})
    report_to: str = dataclasses.field(
        default="none", metadata={"help": "Where to log besides curve.jsonl: none, tensorboard or trackio."}
    )


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or an empty string if none is near."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe as a mapping of setting to value.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, not YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such recipe: {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"recipe {path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path}: expected 'setting: value' lines, found {type(recipe).__name__}")
    return recipe


def _check_keys(keys: Sequence[str], known: Sequence[str], origin: str) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"{origin}: unknown setting '{key}'{nearest(str(key), known)}")


def _split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _make_parser(argument_class: type, program: str) -> Any:
    from trl import TrlParser

    class Parser(TrlParser):
        namespace: dict[str, Any]

        def error(self, message: str) -> None:  # type: ignore[override]
            raise ValueError(message)

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            namespace, rest = super().parse_known_args(args, namespace)
            self.namespace = dict(vars(namespace))
            return namespace, rest

    return Parser([argument_class], prog=program, allow_abbrev=False)


def parse_arguments(argument_class: type[T], arguments: Sequence[str], program: str = "scratch-gpt") -> T:
    """Read `[RECIPE.yaml] [--field value ...]` into `argument_class`; the command line wins over the recipe.

    Raises:
        FileNotFoundError: if the recipe is missing.
        ValueError: for an unknown setting (naming the nearest known one), a value of the wrong type, or a missing
            `output_dir`.
    """
    recipe_path, flags = _split_arguments(arguments)
    parser = _make_parser(argument_class, program)
    known = [field.name for field in dataclasses.fields(argument_class) if field.init]  # type: ignore[arg-type]
    if recipe_path is not None:
        recipe = read_recipe(recipe_path)
        _check_keys([key for key in recipe if key != "env"], known, f"recipe {recipe_path}")
        flags += ["--config", recipe_path]
    given = [flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    accepted = [*known, *(f"no_{name}" for name in known), "config", "help"]
    _check_keys([name for name in given if name not in accepted], known, "command line")
    try:
        (parsed,) = parser.parse_args_and_config(flags)
    except (TypeError, ValueError) as error:
        origin = f"recipe {recipe_path}" if recipe_path else "command line"
        raise ValueError(f"{origin}: {error}") from error
    parsed.given = _differing(argument_class, parser.namespace)
    if not parsed.output_dir:
        raise ValueError("'output_dir' is missing: name the folder that this stage writes")
    return parsed


def _differing(argument_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The settings whose value is not the field's default, as plain JSON values."""
    differing = {}
    for field in dataclasses.fields(argument_class):  # type: ignore[arg-type]
        if not field.init or field.name not in values:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if values[field.name] != default:
            differing[field.name] = _plain(values[field.name])
    return differing


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(getattr(value, "value", value))


def given_settings(arguments: Any) -> dict[str, Any]:
    """The settings that `arguments` gives beyond its class's defaults: what a recipe needs to say to make it again."""
    given = getattr(arguments, "given", None)
    return given if given is not None else _differing(type(arguments), vars(arguments))
