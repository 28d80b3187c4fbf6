"""A stage's settings: one dataclass, read by TRL's parser from a YAML recipe and then from the command line."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hf_scratch_gpt.runs.values import check_recipe_values, nearest

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
        "checkpoint_steps",
        "checkpoint_seconds",
        "checkpoints_kept",
        "on_checkpoint_failure",
        "evaluation_batch_size",
        "num_processes",
        "distributed",
        "evaluation_steps",
        "sample_prompts",
        "sample_tokens",
        "spike_rollbacks",  # decides whether a run gets through, and a larger one must not undo what it has done
        "dataloader_num_workers",
        "dataset_num_proc",
        "num_workers",
        "reference_cache_dir",
        "trackio_space_id",
        "hub_token",
    }
)
SECRET_FIELDS = frozenset({"hub_token"})  # never written to a recipe


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


# What provides each tracker that `report_to` may name; any one of the modules will do.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Check that what a run should report to is installed; names that we do not know are left to transformers.

    Raises:
        ValueError: naming the tracker that is not installed.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        modules = _TRACKERS.get(name, ())
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(f"report_to is '{name}', which is not installed: pip install 'hf_scratch_gpt[track]'")


def _unique_key_loader() -> type:
    """A safe YAML loader that refuses a key given twice, of which YAML would silently take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key_node.value for key_node, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.MarkedYAMLError(problem=f"'{twice}' is given twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


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
        recipe = yaml.load(path.read_text(encoding="utf-8"), _unique_key_loader())
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"recipe {path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(recipe, dict):
        found = "an empty file" if recipe is None else f"a {type(recipe).__name__}"
        raise ValueError(f"recipe {path}: expected 'setting: value' lines, found {found}")
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

        def add_argument(self, *names: str, **options: Any) -> Any:
            if options.get("help"):  # argparse formats help texts: a lone percent sign would break --help
                options["help"] = re.sub(r"(?<!%)%(?![%(])", "%%", options["help"])
            return super().add_argument(*names, **options)

        def error(self, message: str) -> None:
            raise _CommandLineError(f"command line: {message}")

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            namespace, rest = super().parse_known_args(args, namespace)
            self.namespace = dict(vars(namespace))
            return namespace, rest

    usage = f"{program} [RECIPE.yaml] [--field value ...]"
    return Parser([argument_class], prog=program, usage=usage, allow_abbrev=False)


class _CommandLineError(ValueError):
    """What argparse finds wrong with the command line, as opposed to a recipe."""


def _read_checked_recipe(path: str, argument_class: type, known: Sequence[str]) -> dict[str, Any]:
    recipe = read_recipe(path)
    environment = recipe.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"recipe {path}: 'env' is {environment!r}, expected a mapping of environment variables")
    _check_keys(list(recipe), known, f"recipe {path}")
    recipe = check_recipe_values(argument_class, recipe, f"recipe {path}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return recipe


def parse_arguments(argument_class: type[T], arguments: Sequence[str], program: str = "scratch-gpt") -> T:
    """Read `[RECIPE.yaml] [--field value ...]` into `argument_class`; the command line wins over the recipe.

    A recipe's `env` mapping sets environment variables.

    Raises:
        FileNotFoundError: if the recipe is missing.
        ValueError: for an unknown setting (naming the nearest known one), a value of the wrong type, or a missing
            `output_dir`.
    """
    recipe_path, flags = _split_arguments(arguments)
    known = [field.name for field in dataclasses.fields(argument_class) if field.init]  # type: ignore[arg-type]
    recipe = _read_checked_recipe(recipe_path, argument_class, known) if recipe_path is not None else {}
    given = [flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    accepted = [*known, *(f"no_{name}" for name in known), "help"]
    _check_keys([name for name in given if name not in accepted], known, "command line")
    parser = _make_parser(argument_class, program)
    defaults = dict(vars(parser.parse_known_args([])[0]))  # as argparse reads them: some are texts that it converts
    parser.set_defaults_with_config(**recipe)
    try:
        parsed, unread = parser.parse_args_into_dataclasses(flags, True, look_for_args_file=False)
    except _CommandLineError:
        raise
    except (TypeError, ValueError) as error:  # from the class's own checks
        origin = f"recipe {recipe_path}" if recipe_path else "command line"
        raise ValueError(f"{origin}: {error}") from error
    if unread:
        raise ValueError(f"command line: unexpected '{unread[0]}'; write [RECIPE.yaml] [--field value ...]")
    parsed.given = {
        name: _plain(value)
        for name, value in parser.namespace.items()
        if name in known and name not in SECRET_FIELDS and value != defaults[name]
    }
    if hasattr(argument_class, "stated"):  # unlike `given`, with what is stated to be the default's value
        parsed.stated = frozenset([*recipe, *(name.removeprefix("no_") for name in given)])
    if not parsed.output_dir:
        raise ValueError("'output_dir' is missing: name the folder that this stage writes")
    return parsed


def _differing(argument_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The settings whose value is not the field's default, as plain JSON values."""
    differing = {}
    for field in dataclasses.fields(argument_class):
        if not field.init or field.name not in values or field.name in SECRET_FIELDS:
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
