"""`scratch-gpt chat RUN`: a conversation in the terminal, streamed, with commands that begin with a slash."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from hf_scratch_gpt.runs.arguments import nearest
from hf_scratch_gpt.runs.command_line import CommandParser
from hf_scratch_gpt.runs.signals import StopRequest

if TYPE_CHECKING:
    from hf_scratch_gpt.chat.answering import ChatModel, Sampling

HELP = """\
/reset             forget the conversation; the system message stays
/system TEXT       set the system message; without TEXT remove it
/set NAME VALUE    change a sampling setting: temperature, top_p, top_k, max_new_tokens; without NAME show them
/help              this list
/quit              leave; so do Ctrl-D, and Ctrl-C at the prompt. Ctrl-C during an answer stops the answer
//TEXT             send TEXT with one slash at its beginning"""
COMMANDS = ("reset", "system", "set", "help", "quit")
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "max_new_tokens")
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# Codes with which a text could move the cursor or write to the clipboard of a terminal; tab and newline stay.
_CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _make_parser() -> CommandParser:
    parser = CommandParser(
        prog="scratch-gpt chat",
        description="Talk to a model in the terminal. In the conversation:\n\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a model folder, a quickstart's folder, or a Hub id")
    for name, meaning in (
        ("temperature", "0 takes the likeliest token; higher is more varied"),
        ("top_p", "draw among the likeliest tokens of this total probability"),
        ("top_k", "draw among so many of the likeliest tokens; 0 for all"),
        ("max_new_tokens", "longest answer in tokens"),
    ):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, help=meaning)
    parser.add_argument("--seed", type=int, help="makes the answers repeatable")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one message, print only the answer, and leave")
    parser.add_argument(
        "--trust_remote_code", "--trust-remote-code", action="store_true", help="run a model's own code"
    )
    return parser


class Session:
    """One conversation with a model, from lines of text to lines of text.

    Args:
        model (`ChatModel`): What answers.
        sampling (`Sampling`): How it draws; `/set` changes it.
        system (`str`, *optional*): System message.
        output (`TextIO`): Gets the answers.
        notices (`TextIO`): Gets everything else.
    """

    def __init__(self, model: "ChatModel", sampling: "Sampling", system: str | None, output: TextIO, notices: TextIO):
        from hf_scratch_gpt.chat.conversation import Conversation, make_encoder

        self.model, self.sampling = model, sampling
        self.output, self.notices = output, notices
        self.conversation = Conversation(make_encoder(model.tokenizer), model.context_length, system)
        self.stopped_by: str | None = None

    def note(self, text: str) -> None:
        """Tell the user something that is no answer."""
        print(text, file=self.notices, flush=True)

    def _shower(self, pieces: list[str]) -> Callable[[str], None]:
        def show(piece: str) -> None:
            pieces.append(piece)
            self.output.write(_CONTROL_CODES.sub("\ufffd", piece) if self.output.isatty() else piece)
            self.output.flush()

        return show

    def say(self, text: str) -> None:
        """Answer the user's message, streaming; a signal stops the answer, and what there is of it counts.

        Raises:
            ValueError: if the message does not fit into the context; the conversation is then unchanged.
        """
        prompt = self.conversation.ask(text, self.sampling.max_new_tokens)
        if prompt.dropped_turns:
            self.note(f"(the oldest {prompt.dropped_turns} turn(s) no longer fit into the context and are forgotten)")
        pieces: list[str] = []
        with StopRequest() as stop:
            try:
                self.model.answer(
                    prompt.token_ids, self.sampling, prompt.room, self._shower(pieces), stop.is_requested
                )
            except KeyboardInterrupt:  # a second Ctrl-C does not wait for the token to end
                stop.requested = signal.SIGINT.name
        self.stopped_by = stop.requested
        self.output.write("\n")
        self.output.flush()
        if pieces or not self.stopped_by:
            self.conversation.record(prompt, "".join(pieces))

    def command(self, line: str) -> bool:
        """Do what a line such as `/set top_k 5` says; returns whether the conversation goes on.

        Raises:
            ValueError: for an unknown command or a bad value.
        """
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name == "quit":
            return False
        if name == "help":
            self.note(HELP)
        elif name == "reset":
            self.conversation.reset()
            self.note("(the conversation is forgotten)")
        elif name == "system":
            self.conversation.system = rest or None
            self.note("(the system message is set)" if rest else "(there is no system message any more)")
        elif name == "set":
            self._set(rest)
        else:
            raise ValueError(f"no command '/{name}'{nearest(name, COMMANDS)} (/help lists them)")
        return True

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            if not value.strip():
                raise ValueError("write /set NAME VALUE, such as /set temperature 0.7")
            self.sampling.set(name, value.strip())
        self.note("  ".join(f"{name} {value}" for name, value in vars(self.sampling).items()))

    def run(self, lines: Any) -> int:
        """Answer line after line until they end or `/quit`; returns the exit status."""
        while (line := next(lines, None)) is not None:
            line = line.rstrip("\r\n")
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self.command(line):
                        break
                elif line.strip():
                    self.say(line[1:] if line.startswith("//") else line)
            except ValueError as error:
                self.note(f"({error})")
            if self.stopped_by == signal.SIGTERM.name:
                return 128 + signal.SIGTERM
        return 0


def _typed_lines(stream: TextIO, notices: TextIO) -> Any:
    """The lines of standard input: asked for one by one at a terminal, else read as they come."""
    at_terminal = stream.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            line = input("> ") if at_terminal else stream.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=notices)
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 (byte {error.object[error.start]:#x})") from error
        if not line and not at_terminal:
            return
        yield line


def _use_utf8(*streams: Any) -> None:
    """Speak UTF-8 whatever the locale says; what a terminal cannot show is replaced rather than an error."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "replace")


def _start(parsed: argparse.Namespace) -> Session:
    """Load the model and set the session up.

    Raises:
        OSError, ValueError: as `find_model`, `load_chat_model` and `Sampling.set`.
    """
    from hf_scratch_gpt.chat.answering import Sampling, find_model, load_chat_model
    from hf_scratch_gpt.chat.conversation import check_text

    checked = Sampling()
    given = {name: getattr(parsed, name) for name in SAMPLING_FLAGS if getattr(parsed, name) is not None}
    for name, value in given.items():  # a bad value is told before minutes of loading
        checked.set(name, value)
    if parsed.prompt is not None:
        check_text(parsed.prompt)
    source, chosen = find_model(parsed.run)
    model = load_chat_model(source, parsed.trust_remote_code)
    sampling = Sampling.of(getattr(model.model, "generation_config", None))
    for name, value in given.items():
        sampling.set(name, value)
    session = Session(model, sampling, parsed.system, sys.stdout, sys.stderr)
    if parsed.prompt is None:
        context = "no limit" if model.context_length is None else f"{model.context_length} tokens"
        session.note(f"{chosen} · context: {context} · /help lists the commands")
        if not model.tokenizer.chat_template:
            session.note("(its tokenizer has no chat template: the model continues your text)")
    return session


def main(arguments: Sequence[str]) -> int:
    """`scratch-gpt chat RUN …`; returns the exit status.

    Raises:
        OSError: if there is no such folder or no model in it.
        ValueError: for a bad setting, a model that does not talk, or (with `--prompt`) a message that does not fit.
    """
    parsed = _make_parser().parse_args(list(arguments))
    _use_utf8(sys.stdin, sys.stdout, sys.stderr)
    session = _start(parsed)
    if parsed.seed is not None:
        from transformers import set_seed

        set_seed(parsed.seed)
    if parsed.prompt is None:
        return session.run(_typed_lines(sys.stdin, sys.stderr))
    session.say(parsed.prompt)
    return EXIT_INTERRUPTED if session.stopped_by else 0
