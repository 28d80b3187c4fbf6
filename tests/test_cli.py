"""The command line: help without heavy imports, mistakes in one line with status 2, defects with their traceback."""

import importlib
import os
import subprocess
import sys
import types

import pytest

from hf_scratch_gpt import __version__, cli
from hf_scratch_gpt.cli import COMMANDS, STAGES, main
from hf_scratch_gpt.runs import Interrupted
from hf_scratch_gpt.runs.folder import MainProcessFailed

WITHOUT_HEAVY_IMPORTS = """
import sys
from hf_scratch_gpt.cli import main
status = main({arguments!r})
heavy = {{"torch", "transformers", "datasets", "trl", "peft", "accelerate", "tokenizers", "numpy", "yaml"}}
print("heavy:", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["pretrian"]])
def test_what_runs_no_stage_imports_nothing_heavy(arguments):
    done = run_python("-c", WITHOUT_HEAVY_IMPORTS.format(arguments=arguments))
    assert done.stderr.splitlines()[-1] == "heavy: []"


def test_help_lists_every_stage_and_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in [*STAGES, *COMMANDS])


def test_the_module_runs_as_the_command_does():
    done = run_python("-m", "hf_scratch_gpt", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    done = run_python("-m", "hf_scratch_gpt", "pretrian")
    assert done.returncode == 2
    assert done.stderr == "scratch-gpt: error: no stage or command 'pretrian'; did you mean 'pretrain'?\n"


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_settings_with_help_and_names_its_inputs(name, capsys):
    import dataclasses

    module = importlib.import_module(STAGES[name][0])
    fields = {field.name for field in dataclasses.fields(module.Arguments)}
    assert {"output_dir", "seed", "report_to"} <= fields
    assert set(getattr(module.Arguments, "input_fields", ())) <= fields
    assert callable(module.run)
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: scratch-gpt {name} [RECIPE.yaml]" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name):
    module, function, _ = COMMANDS[name]
    assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture
def toy_stage(monkeypatch):
    """A stage `toy` whose `run` a test sets."""
    from hf_scratch_gpt.runs import StageArguments

    module = types.ModuleType("toy_stage")
    module.Arguments = StageArguments
    module.run = lambda arguments: arguments.output_dir
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(cli.STAGES, "toy", ("toy_stage", "a toy"))
    return module


def raising(error):
    def run(arguments):
        raise error

    return run


def test_a_stage_tells_its_folder_and_only_once_of_many_ranks(toy_stage, capsys, monkeypatch):
    assert main(["toy", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out == "toy: out\n"
    monkeypatch.setenv("RANK", "1")
    assert main(["toy", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("row 3: no 'prompt'"), 2, "scratch-gpt: error: row 3: no 'prompt'"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "scratch-gpt: error: a.txt: No such file"),
        (OSError(28, "No space left on device"), 2, "scratch-gpt: error: the disk is full"),
        (
            Interrupted("out: stopped by SIGTERM at step 3"),
            75,
            "scratch-gpt: out: stopped by SIGTERM at step 3; the same",
        ),
        (KeyboardInterrupt(), 75, "scratch-gpt: interrupted; the same command continues it"),
    ],
)
def test_what_a_user_can_cause_is_one_line_without_traceback(toy_stage, capsys, error, status, line):
    toy_stage.run = raising(error)
    assert main(["toy", "--output_dir", "out"]) == status
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)


def test_debug_shows_the_traceback_wherever_it_stands(toy_stage, capsys):
    toy_stage.run = raising(ValueError("row 3"))
    for arguments in (["--debug", "toy", "--output_dir", "out"], ["toy", "--output_dir", "out", "--debug"]):
        assert main(arguments) == 1
        printed = capsys.readouterr().err
        assert "Traceback" in printed
        assert "ValueError: row 3" in printed


def test_a_defect_of_ours_keeps_its_traceback(toy_stage, capsys):
    toy_stage.run = raising(AttributeError("oops"))
    assert main(["toy", "--output_dir", "out"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_rank_that_stops_because_of_the_main_one_is_silent(toy_stage, capsys):
    toy_stage.run = raising(MainProcessFailed("disk full"))
    assert main(["toy", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["toy", "nowhere.yaml"], "no such recipe: nowhere.yaml"),
        (["toy"], "'output_dir' is missing"),
        (["toy", "--sed", "1"], "command line: unknown setting 'sed'; did you mean 'seed'?"),
        (["toy", "--seed", "x"], "invalid int value: 'x'"),
        (["chatt"], "no stage or command 'chatt'; did you mean 'chat'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(toy_stage, capsys, arguments, told):
    assert main(arguments) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert told in printed


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from hf_scratch_gpt.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert "Traceback" not in done.stderr
