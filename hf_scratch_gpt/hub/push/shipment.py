"""Makes a folder ready to be sent: what goes up, as it goes up, with every check that needs no network."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from hf_scratch_gpt.hub.push.folder import CARD, Contents, LocalFile, read_folder
from hf_scratch_gpt.hub.push.leaks import find_home_path, find_path_value, find_secret, shorten_paths
from hf_scratch_gpt.hub.push.weights import OTHER_WEIGHTS, check_architecture, check_weights
from hf_scratch_gpt.runs.files import read_json, yaml_text
from hf_scratch_gpt.runs.folder import RECIPE
from hf_scratch_gpt.runs.identity import METRICS

CONFIG = "config.json"
_TEXT_SUFFIXES = (
    ".json",
    ".jsonl",
    ".yaml",
    ".yml",
    ".txt",
    ".md",
    ".py",
    ".jinja",
    ".toml",
    ".cfg",
    ".ini",
    ".csv",
    "",
)
_LARGEST_TEXT = 64 << 20
_TEXT_OF_BINARIES = 64 << 20
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Item:
    """One file as it goes up.

    Args:
        name (`str`): Its name in the repository.
        path (`Path`): Where it is.
        size (`int`): Bytes that are sent.
        content (`bytes`, *optional*): What is sent; text is held in memory, so that what was checked is what is sent.
        note (`str`, *optional*): What was changed in it.
    """

    name: str
    path: Path
    size: int
    content: bytes | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Shipment:
    """The files that go up and, with the reasons, those that stay."""

    folder: Path
    items: list[Item]
    left_out: dict[str, str]


def make_ready(folder: Path, include: list[str], without_card: bool = False) -> Shipment:
    """Check a model folder and list what is to be sent.

    Args:
        folder: The model folder.
        include: Patterns of files to send besides those that a model needs.
        without_card: Send it although it has no model card.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder holds what must not be published, its weights are damaged or incomplete, or it has no
            card; names the file and says what to do.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder}: expected a model folder, found a file")
        raise FileNotFoundError(f"no such model folder: {folder}")
    config = _read_config(folder)
    contents = read_folder(folder, _code_files(folder, config), include)
    _check_nothing_is_refused(contents.refused)
    names = [file.name for file in contents.chosen]
    shapes = check_weights(folder, names)
    if config.get("model_type") == "scratch_gpt":
        if not config.get("auto_map"):
            raise ValueError(
                f"{folder / CONFIG}: has no 'auto_map', so that the model would only load where this package is "
                "installed; save it anew with save_pretrained"
            )
        check_architecture(folder, config, shapes)
    _check_card(folder, names, without_card)
    leaks = [leak for file in _readable(folder, contents) if (leak := _token_in(folder, file))]
    items = []
    for file in contents.chosen:
        try:
            items.append(_item(folder, file))
        except ValueError as error:
            leaks.append(str(error))
    _check_nothing_is_refused(leaks)
    return Shipment(folder, items, contents.left_out)


def _check_nothing_is_refused(refused: list[str]) -> None:
    if refused:
        more = f" (and {len(refused) - 1} more such)" if len(refused) > 1 else ""
        raise ValueError(f"nothing was sent: {refused[0]}{more}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        if any(file.suffix in OTHER_WEIGHTS for file in folder.iterdir()):
            return {}
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder}: an adapter without its model; `scratch-gpt merge` makes a model of it")
        raise ValueError(f"{folder}: not a model folder (it has no {CONFIG})")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, found a {type(config).__name__}")
    return config


def _code_files(folder: Path, config: dict[str, Any]) -> set[str]:
    """The Python files that the `auto_map` of config and tokenizer asks for, and those that they import in turn."""
    classes: list[Any] = []
    configs = {CONFIG: config}
    if (folder / "tokenizer_config.json").is_file():
        configs["tokenizer_config.json"] = read_json(folder / "tokenizer_config.json")
    for name, values in configs.items():
        auto_map = values.get("auto_map") if isinstance(values, dict) else None
        for entry in (auto_map or {}).values():
            classes += [
                (name, item) for item in (entry if isinstance(entry, list) else [entry]) if isinstance(item, str)
            ]
    # `owner/name--file.Class` is code of another repository.
    queue = [(name, f"{entry.rpartition('.')[0]}.py") for name, entry in classes if "--" not in entry]
    found: set[str] = set()
    while queue:
        asked_by, file = queue.pop()
        if file in found:
            continue
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing, but {asked_by} asks for it; save the model again")
        found.add(file)
        text = _decode(folder / file, (folder / file).read_bytes())
        queue += [(file, f"{first or second}.py") for first, second in _RELATIVE_IMPORT.findall(text)]
    return found


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it anew") from error


def _check_card(folder: Path, names: list[str], without_card: bool) -> None:
    if CARD not in names:
        if without_card:
            return
        raise ValueError(
            f"{folder}: has no model card ({CARD}); `scratch-gpt card {folder}` writes one, "
            "and --without-card does without"
        )
    import yaml

    text = _decode(folder / CARD, (folder / CARD).read_bytes())
    parts = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(parts.group(1)) if parts else None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 2}" if place else ""
        raise ValueError(f"{folder / CARD}{where}: its metadata is not valid YAML") from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{folder / CARD}: has no metadata between two lines of '---' at its beginning; "
            f"`scratch-gpt card {folder}` writes it"
        )


def _readable(folder: Path, contents: Contents) -> list[LocalFile]:
    """The text files that stay at home: a token in one of them shows that the folder was not made ready."""
    files = [LocalFile(name, folder / name, (folder / name).stat().st_size) for name in contents.left_out]
    return [file for file in files if file.path.suffix in _TEXT_SUFFIXES and file.size <= _LARGEST_TEXT]


def _token_in(folder: Path, file: LocalFile) -> str | None:
    if not file.path.is_file():
        return None
    secret = find_secret(file.path.read_bytes().decode("utf-8", "replace"), assignments=False)
    return f"{folder / file.name}: holds {secret}; remove it, and revoke it if others had it" if secret else None


def _item(folder: Path, file: LocalFile) -> Item:
    """A file as it goes up; `ValueError` for one that holds a secret or a path of this machine."""
    path = folder / file.name
    if path.suffix not in _TEXT_SUFFIXES or file.size > _LARGEST_TEXT:
        if path.suffix != ".safetensors":  # whose only text was read with its header
            with open(path, "rb") as stream:
                _check_text(path, stream.read(_TEXT_OF_BINARIES).decode("latin-1"), assignments=False)
        return Item(file.name, path, file.size)
    content, note = path.read_bytes(), ""
    if file.name in (METRICS, RECIPE):
        content, note = _shorten(path, content)
    _check_text(path, _decode(path, content))
    return Item(file.name, path, len(content), content, note)


def _check_text(path: Path, text: str, assignments: bool = True) -> None:
    secret = find_secret(text, assignments)
    if secret:
        raise ValueError(f"{path}: holds {secret}; remove it, and revoke it if others had it")
    # A vocabulary learnt from text may hold any piece of it.
    local = find_home_path(text) if path.name not in ("tokenizer.json", "vocab.json", "merges.txt") else None
    if not local and path.suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict) and path.name == "tokenizer.json":
            value = {key: entry for key, entry in value.items() if key not in ("model", "added_tokens")}
        local = find_path_value(value) if path.name not in (METRICS, "vocab.json") else None
    if local:
        raise ValueError(f"{path}: holds the path '{local}' of this machine; replace it")


def _shorten(path: Path, content: bytes) -> tuple[bytes, str]:
    """The content of `metrics.json` or `recipe.yaml` with absolute paths cut to their last part, and a note of it."""
    import yaml

    if path.name == METRICS:
        value, count = shorten_paths(read_json(path))
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    else:
        try:
            value, count = shorten_paths(yaml.safe_load(content))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML; write it anew") from error
        comments = [line for line in _decode(path, content).splitlines() if line.startswith("#")]
        text = "\n".join([*comments, yaml_text(value)])
    if not count:
        return content, ""
    return text.encode("utf-8"), f"{count} local path{'s' if count > 1 else ''} cut to the last part"
