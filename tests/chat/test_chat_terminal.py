"""`scratch-gpt chat` as a process: piped or single-shot, its commands, and each mistake in one line."""

import io
import os
import signal
import subprocess
import sys

import pytest

from hf_scratch_gpt.chat.answering import Sampling
from hf_scratch_gpt.chat.terminal import Session, _typed_lines, main


class RecordingModel:
    """Answers with the number of the answer, and stops where a test wants it to."""

    context_length = 200

    def __init__(self, tokenizer, interrupt=False):
        self.tokenizer, self.prompts, self.interrupt = tokenizer, [], interrupt

    def answer(self, token_ids, sampling, room, show, should_stop):
        self.prompts.append(self.tokenizer.decode(token_ids))
        show(f"answer {len(self.prompts)}")
        if self.interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert should_stop()
            return
        show(" ends")


@pytest.fixture
def session(tiny_chat_model):
    return Session(RecordingModel(tiny_chat_model.tokenizer), Sampling(), None, io.StringIO(), io.StringIO())


def test_a_conversation_has_turns_and_reset_forgets_them(session):
    assert session.run(iter(["One?\n", "\n", "Two?\n", "/reset\n", "Three?\n"])) == 0
    assert session.output.getvalue() == "answer 1 ends\nanswer 2 ends\nanswer 3 ends\n"
    first, second, third = session.model.prompts
    assert second.startswith(first.removesuffix("<|im_start|>assistant\n"))
    assert "answer 1 ends<|im_end|>" in second
    assert third == "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"


def test_the_system_message_is_set_kept_by_reset_and_removed(session):
    session.run(iter(["/system Be brief.", "One?", "/reset", "Two?", "/system", "Three?"]))
    assert [prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") for prompt in session.model.prompts] == [
        True,
        True,
        False,
    ]


def test_quit_ends_the_conversation_and_help_lists_every_command(session):
    assert session.run(iter(["/help", "/quit", "One?"])) == 0
    assert session.model.prompts == []
    assert all(f"/{name}" in session.notices.getvalue() for name in ("reset", "system", "set", "help", "quit"))


@pytest.mark.parametrize("line", ["/set temperature 0.5", "/set temperature=0.5", "/set  temperature  0.5"])
def test_set_changes_a_sampling_setting(session, line):
    session.run(iter([line]))
    assert session.sampling.temperature == 0.5
    assert "temperature 0.5" in session.notices.getvalue()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/rest", "no command '/rest'; did you mean 'reset'?"),
        ("/", "no command '/'"),
        ("/set temperature", "write /set NAME VALUE"),
        ("/set temperature hot", "temperature is 'hot', expected a number from 0"),
        ("/set colour 3", "no sampling setting 'colour'"),
        ("x" * 500, "tokens, and 150 fit (the context is 200"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(session, line, told):
    session.run(iter(["One?", line, "Two?"]))
    (notice,) = session.notices.getvalue().splitlines()
    assert told in notice
    assert len(session.model.prompts) == 2
    assert "One?" in session.model.prompts[1]


def test_two_slashes_send_a_message_that_begins_with_one(session):
    session.run(iter(["//etc?"]))
    assert "<|im_start|>user\n/etc?<|im_end|>" in session.model.prompts[0]


def test_forgotten_turns_are_told(session):
    session.run(iter(["long question " * 5, "long question " * 5, "long question " * 5]))
    assert "the oldest 1 turn(s) no longer fit" in session.notices.getvalue()


def test_ctrl_c_stops_the_answer_keeps_its_beginning_and_the_conversation_goes_on(session):
    session.model.interrupt = True
    session.run(iter(["One?", "Two?"]))
    assert session.output.getvalue() == "answer 1\nanswer 2\n"
    assert "answer 1<|im_end|>" in session.model.prompts[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_model_cannot_send_control_codes_to_a_terminal(session):
    session.output = Terminal()
    show = session._shower(pieces := [])
    show("red \x1b[31m\x9b\x07\tend\n")
    assert session.output.getvalue() == "red �[31m��\tend\n"
    assert pieces == ["red \x1b[31m\x9b\x07\tend\n"]


def test_a_single_prompt_prints_only_the_answer_and_a_seed_repeats_it(tiny_model_folder, capsys):
    printed = []
    for seed in ("1", "1", "2"):
        arguments = [str(tiny_model_folder), "--prompt", "Hello?", "--temperature", "2", "--max-new-tokens", "9"]
        assert main([*arguments, "--seed", seed]) == 0
        printed.append(capsys.readouterr())
    assert [text.err for text in printed] == ["", "", ""]
    assert printed[0].out == printed[1].out != printed[2].out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["MODEL", "--temprature", "1"], "unexpected '--temprature'; did you mean 'temperature'?"),
        (["MODEL", "--temperature", "hot"], "temperature is 'hot'"),
        (["MODEL", "--seed", "x"], "invalid int value: 'x'"),
        (["MODEL", "--prompt", ""], "the message is empty"),
        (["MODEL", "--prompt", "x" * 100], "tokens, and 48 fit"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tiny_model_folder, capsys, arguments, told):
    from hf_scratch_gpt.cli import main as command_line

    status = command_line(["chat", *[str(tiny_model_folder) if word == "MODEL" else word for word in arguments]])
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_input_that_is_not_utf8_is_told_by_its_byte():
    lines = _typed_lines(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"), io.StringIO())
    with pytest.raises(ValueError, match="standard input is not UTF-8 \\(byte 0xe9\\)"):
        next(lines)


def test_a_process_streams_stops_at_ctrl_c_goes_on_and_ends_with_its_input(make_tiny_model, tmp_path):
    folder = make_tiny_model(tmp_path / "modèle", context_length=20_000)
    command = [sys.executable, "-m", "hf_scratch_gpt", "chat", str(folder), "--max_new_tokens", "5000"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdin.write("héllo 日本 🙂?\n".encode())
    process.stdin.flush()
    first = process.stdout.read(1)  # a piece of an answer that would go on for a long time
    process.send_signal(signal.SIGINT)
    output, notices = process.communicate(b"/set max_new_tokens 5\nand you?\n", timeout=120)
    assert process.returncode == 0
    assert first
    assert len(output) > 1
    assert len(output) < 30_000
    output.decode("utf-8")
    assert "max_new_tokens 5" in notices.decode("utf-8")
    assert "modèle · context: 20000 tokens" in notices.decode("utf-8")
    assert b"Traceback" not in notices
