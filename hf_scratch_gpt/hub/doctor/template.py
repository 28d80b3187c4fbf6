"""A tokenizer and its chat template under examination, without a model: `scratch-gpt doctor --template PATH`."""

import json
from pathlib import Path
from typing import Any

from hf_scratch_gpt.hub.doctor import checks_chat, checks_template, checks_tokenizer
from hf_scratch_gpt.hub.doctor.checks_chat import render
from hf_scratch_gpt.hub.doctor.outcome import Check, Skipped
from hf_scratch_gpt.runs.loading import loading

CHECKS: list[Check] = [
    *(check for check in checks_tokenizer.CHECKS if check.name == "special-tokens"),
    *checks_chat.CHECKS,
    *checks_template.CHECKS,
    *checks_template.LINT_ONLY,
]


class TemplateSubject:
    """What the checks of a chat template ask of a subject: the tokenizer, and at which tokens generation stops.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        ends (`set[int]`): Ids at which generation stops.
    """

    def __init__(self, tokenizer: Any, ends: set[int]):
        self.tokenizer, self._ends = tokenizer, ends

    def needs_tokenizer(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    def needs_chat_template(self) -> Any:
        """The tokenizer, which has a chat template.

        Raises:
            Skipped: if it has no fast version.
        """
        if not self.tokenizer.is_fast:
            raise Skipped("a tokenizer without a fast version has no character offsets")
        return self.tokenizer

    def end_token_ids(self) -> set[int]:
        """Ids at which generation stops."""
        return self._ends


def load_template(path: str, tokenizer: str | None = None) -> TemplateSubject:
    """The template of a tokenizer's folder or Hub id, or one in a file with a tokenizer of its own.

    Args:
        path (`str`): A folder or Hub id, or a .jinja file.
        tokenizer (`str`, *optional*): The tokenizer for a .jinja file; unset: that of the file's folder.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        OSError: if a Hub id is not to be had.
        ValueError: if there is no tokenizer or template, or the template is no Jinja.
    """
    file = Path(path)
    is_file = file.is_file() or (tokenizer is not None and not file.is_dir()) or file.suffix == ".jinja"
    if not is_file:
        if tokenizer is not None:
            raise ValueError(f"{path}: a folder has its own tokenizer; --tokenizer goes with a .jinja file")
        return _subject(path, None)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if tokenizer is None:
        if not (file.parent / "tokenizer.json").is_file():
            raise ValueError(f"{path}: no tokenizer beside it; name one with --tokenizer FOLDER")
        tokenizer = str(file.parent)
    return _subject(tokenizer, file)


def _subject(source: str, file: Path | None) -> TemplateSubject:
    from transformers import AutoTokenizer

    import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes

    path = Path(source)
    if path.is_file():
        raise ValueError(f"{source}: expected the folder of a tokenizer, found a file")
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2):
        raise FileNotFoundError(f"{source}: no such folder")
    with loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if file is not None:
        tokenizer.chat_template = _read(file)
    if not tokenizer.chat_template:
        raise ValueError(f"{source}: the tokenizer has no chat template")
    _check_syntax(tokenizer, str(file or source))
    return TemplateSubject(tokenizer, _end_token_ids(tokenizer, path))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None


def _check_syntax(tokenizer: Any, source: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        render(tokenizer, [{"role": "user", "content": "x"}])
    except TemplateSyntaxError as error:
        raise ValueError(f"{source}, line {error.lineno} of the chat template: {error.message}") from None
    except Exception:  # what it makes of a conversation is the checks' question
        return


def _end_token_ids(tokenizer: Any, folder: Path) -> set[int]:
    """Where generation stops: what the folder's generation config says, or else the tokenizer's end token."""
    settings = folder / "generation_config.json"
    if settings.is_file():
        value = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
        if value is not None:
            return set(value) if isinstance(value, list) else {value}
    return set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
