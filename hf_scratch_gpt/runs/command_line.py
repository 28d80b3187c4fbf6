"""The parser of commands that are not stages: argparse whose complaints are one line."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_scratch_gpt.runs.values import nearest


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are a `ValueError` of one line that names the nearest flag."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError` instead of printing the usage and leaving."""
        raise ValueError(f"{self.prog}: {message}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The settings; `ValueError` for what is none, naming the nearest that is."""
        parsed, unread = self.parse_known_args(args, namespace)
        if unread:
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            hint = nearest(unread[0].lstrip("-").split("=")[0], known)
            raise ValueError(f"command line: unexpected '{unread[0]}'{hint}")
        return parsed
