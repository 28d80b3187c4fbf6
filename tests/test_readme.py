"""The README's commands work as they stand, but for their size."""

import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest

from hf_scratch_gpt.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
# What makes a command small; it is appended, and the last flag wins.
TOY_FLAGS = {
    "tokenizer": "--vocab_size 1024 --heldout_fraction 0.3",
    "prepare": "--heldout_fraction 0.3",
    "pretrain": "--max_minutes 0 --max_steps 2 --compile false --evaluation_bytes 2000 "
    "--model_overrides hidden_size=32,num_hidden_layers=1,intermediate_size=64",
    "sft": "--max_steps 2",
    "chat": "--prompt Hello --max_new_tokens 4",
    "classify": "--max_steps 2",
}


def commands_under(heading: str) -> list[list[str]]:
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("scratch-gpt ")]


def test_a_users_own_text_goes_from_file_to_chat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for stem in ("shutil", "textwrap", "string", "fractions", "statistics", "bisect"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{stem}.py", tmp_path / "my_texts" / f"{stem}.txt")
    row = '{"prompt": "What is %d + 1?", "completion": "%d"}\n'
    (tmp_path / "my_instructions.jsonl").write_text("".join(row % (n, n + 1) for n in range(40)))
    row = "%s\tthis is message %d\n"
    (tmp_path / "my_texts.tsv").write_text("".join(row % ("good" if n % 3 else "bad", n) for n in range(40)))
    commands = commands_under("Your own text")
    commands += commands_under("Sort texts")
    assert [command[0] for command in commands] == list(TOY_FLAGS)
    for command in commands:
        assert main([*command, *TOY_FLAGS[command[0]].split()]) == 0, f"{command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("marker", ["quickstart command", "test command"])
def test_each_of_the_two_commands_at_the_top_is_one_line(marker):
    block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    assert block is not None
    assert block.group(1).count("\n") == 1
