"""What users get wrong on the command line: one line that names the culprit, status 2, nothing finished is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_scratch_gpt.cli import STAGES, main

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix jugs of pale yellow wax by the old quay"
LONG = "word " * 2000
ONLINE = {
    **{"model_name_or_path": "road/sft", "reward_model": "road/reward", "dataset": "questions.jsonl"},
    **{"max_steps": "1", "num_generations": "2", "per_device_train_batch_size": "4", "max_completion_length": "4"},
}
INPUTS = {
    "tokenizer": {"sources": "corpus", "vocab_size": "300"},
    "prepare": {"tokenizer_dir": "road/tokenizer", "sources": "corpus"},
    "pretrain": {
        **{"dataset_dir": "road/prepare", "preset": "modern-5m", "context_length": "64", "max_steps": "1"},
        **{"compile": "false", "batch_size": "2", "model_overrides": '{"hidden_size": 32, "num_hidden_layers": 1}'},
    },
    "sft": {"model_name_or_path": "road/pretrain", "dataset": "questions.jsonl", "max_steps": "1"},
    "classify": {"model_name_or_path": "road/pretrain", "dataset": "labels.tsv", "max_steps": "1"},
    "rlaif": {
        **{"model_name_or_path": "road/sft", "dataset": "questions.jsonl", "judge_model": "road/sft"},
        **{"answers_per_question": "2", "max_completion_length": "4"},
    },
    "reward": {"model_name_or_path": "road/sft", "dataset": "preferences.jsonl", "max_steps": "1"},
    "dpo": {"model_name_or_path": "road/sft", "dataset": "preferences.jsonl", "max_steps": "1"},
    "ppo": {
        **{"model_name_or_path": "road/sft", "reward_model": "road/reward", "dataset": "questions.jsonl"},
        **{"max_steps": "1", "rollout_batch_size": "4", "per_device_train_batch_size": "4", "max_new_tokens": "4"},
    },
    "kto": {"model_name_or_path": "road/sft", "dataset": "preferences.jsonl", "max_steps": "1"},
    "grpo": {**ONLINE},
    "rloo": {**ONLINE},
    "best_of_n": {
        **{"model_name_or_path": "road/sft", "reward_model": "road/reward", "dataset": "questions.jsonl"},
        **{"answers_per_question": "2", "max_completion_length": "4", "max_steps": "1"},
    },
    "iterate": {
        **{"model_name_or_path": "road/sft", "dataset": "questions.jsonl"},
        **{"rank_recipe": "recipes/relatives/rlaif.yaml", "reward_recipe": "recipes/quickstart/reward.yaml"},
        **{"ppo_recipe": "recipes/quickstart/ppo.yaml"},
    },
    "evaluate": {
        **{"models": "road/sft", "model_names": "sft", "questions_source": "questions.jsonl", "questions": "4"},
        **{"samples_per_prompt": "0", "max_new_tokens": "4", "dataset_dir": "", "reward_model": ""},
    },
}
TUNING = ("sft", "reward", "dpo", "ppo", "kto", "grpo", "rloo", "best_of_n", "rlaif")
OF_QUESTIONS = ("sft", "ppo", "grpo", "rloo", "best_of_n", "rlaif", "evaluate")


def command(stage, output_dir="new", **changed):
    settings = {name: value for name, value in {**INPUTS[stage], **changed}.items() if value}
    return [
        stage,
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
        "--output_dir",
        output_dir,
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder):
    (folder / "corpus").mkdir()
    words = WORDS.split()
    for number in range(40):
        text = " ".join(words[(number * step) % len(words)] + str(number) for step in range(1, 40))
        (folder / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    rows = [{"prompt": f"say {word}", "completion": word} for word in words]
    write_rows(folder / "questions.jsonl", rows)
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    write_rows(folder / "preferences.jsonl", pairs)
    labels = "".join(f"{'x' if number % 3 else 'y'}\t{word}\n" for number, word in enumerate(words))
    (folder / "labels.tsv").write_text(labels, encoding="utf-8")


def write_mistakes(folder):
    for name in ("empty", "blank", "no_model"):
        (folder / name).mkdir()
    (folder / "blank" / "a.txt").write_text(" \n\n", encoding="utf-8")
    (folder / "no_model" / "thesis.txt").write_text("dear reader", encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").touch()
    (folder / "file").write_text("x", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n')
    write_rows(folder / "columns.jsonl", [{"foo": "a", "bar": "b"}])
    long_row = {"prompt": LONG, "completion": "x", "chosen": "x", "rejected": "y"}
    write_rows(folder / "long.jsonl", [long_row])
    write_rows(folder / "long_questions.jsonl", [{"prompt": LONG, "completion": "x"}])
    for name in ("cut", "no_tokenizer", "bad_tokenizer", "bad_config", "no_weights", "lacking", "other_tokenizer"):
        shutil.copytree(folder / "road" / "sft", folder / name)
    weights = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    (folder / "bad_tokenizer" / "tokenizer.json").write_text('{"version', encoding="utf-8")
    (folder / "bad_config" / "config.json").write_text('{"model_type', encoding="utf-8")
    (folder / "no_weights" / "model.safetensors").unlink()
    drop_a_weight(folder / "lacking" / "model.safetensors")
    shutil.copytree(folder / "road" / "sft", folder / "masked")
    config = json.loads((folder / "masked" / "config.json").read_text(encoding="utf-8"))
    config |= {"is_causal": False, "architectures": ["ScratchGPTForMaskedLM"]}
    (folder / "masked" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    from hf_scratch_gpt.model import ScratchGPTTokenizer

    ScratchGPTTokenizer.train([WORDS * 9], 320).save_pretrained(folder / "other_tokenizer")


def drop_a_weight(path):
    from safetensors.torch import load_file, save_file

    weights = {name: tensor for name, tensor in load_file(path).items() if "q_proj" not in name}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished road of one step a stage, and with all kinds of broken inputs."""
    folder, before = tmp_path_factory.mktemp("mistakes"), Path.cwd()
    write_inputs(folder)
    os.chdir(folder)
    for stage in ("tokenizer", "prepare", "pretrain", "sft", "reward"):
        assert main(command(stage, f"road/{stage}")) == 0, stage
    write_mistakes(folder)
    yield folder
    os.chdir(before)


def finished_files(folder):
    return {path: path.read_bytes() for path in sorted((folder / "road").rglob("*")) if path.is_file()}


@pytest.fixture
def fails(home, capfd):
    """Runs a command that must fail with one line, which it returns; all that was finished stays byte for byte."""

    def run(arguments):
        before = finished_files(home)
        capfd.readouterr()
        assert main(arguments) == 2
        lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("scratch-gpt: error: ")
        assert finished_files(home) == before
        return lines[0]

    yield run
    shutil.rmtree(home / "new", ignore_errors=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_setting_recipe_or_output_folder_is_named(fails, home, stage):
    (home / "wrong.yaml").write_text("output_dir: new\nsead: 1\n", encoding="utf-8")
    assert "unknown setting 'sead'; did you mean 'seed'?" in fails([stage, "wrong.yaml"])
    (home / "wrong.yaml").write_text("output_dir: new\nseed: soon\n", encoding="utf-8")
    assert "recipe wrong.yaml: 'seed' is 'soon', expected an integer" in fails([stage, "wrong.yaml"])
    assert "latin.yaml: not UTF-8 at byte 15" in fails([stage, "latin.yaml"])
    assert "no such recipe: nowhere.yaml" in fails([stage, "nowhere.yaml"])
    assert "file: expected a folder to write to, found a file" in fails(command(stage, "file"))
    assert "file is a file, not a folder; choose another output_dir" in fails(command(stage, "file/below"))
    assert "no_model: not empty and not a run of this package" in fails(command(stage, "no_model"))


@pytest.mark.parametrize("stage", ["tokenizer", "prepare"])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("./nowhere", "no such file or folder: './nowhere'"),
        ("nowhere", "'nowhere' is no local file or folder"),
        ("empty", "empty: no file to read (it is empty)"),
        ("empty.txt", "empty.txt: holds no text"),
        ("blank", "blank: holds no text"),
        ("latin.txt", "latin.txt: not UTF-8 at byte 3"),
        ("columns.jsonl", "columns.jsonl, line 1: no column 'text'"),
    ],
)
def test_an_unusable_corpus_is_named(fails, stage, source, told):
    assert told in fails(command(stage, sources=source))


@pytest.mark.parametrize(("folder", "told"), [("empty", "no tokenizer here"), ("bad_tokenizer", "cannot be loaded")])
def test_prepare_names_the_folder_of_an_unusable_tokenizer(fails, folder, told):
    line = fails(command("prepare", tokenizer_dir=folder))
    assert f"error: {folder}: " in line
    assert told in line


def test_the_masked_objective_names_a_tokenizer_without_a_mask_token(fails):
    line = fails(command("pretrain", objective="masked"))
    assert "road/prepare: the masked objective needs a tokenizer with a mask token" in line


@pytest.mark.parametrize("folder", ["nowhere", "empty", "file", "road/sft"])
def test_pretrain_names_what_is_no_prepared_folder(fails, folder):
    assert f"{folder}: has no manifest.json" in fails(command("pretrain", dataset_dir=folder))


MODELS = [
    ("nowhere", "no such"),
    ("./nowhere", "no such"),
    ("file", "expected a model folder, found a file"),
    ("no_model", "no config.json"),
    ("cut", "its weights are damaged"),
    ("lacking", "lacks the weights"),
    ("no_weights", "cannot be loaded"),
    ("no_tokenizer", "has no fast tokenizer"),
    ("bad_tokenizer", "its tokenizer cannot be loaded"),
    ("bad_config", "not a valid JSON file"),
]


@pytest.mark.parametrize(
    ("folder", "told"),
    [*MODELS, ("other_tokenizer", "they do not belong together"), ("masked", "is a masked language model")],
)
@pytest.mark.parametrize("stage", [*TUNING, "evaluate", "chat"])
def test_an_unusable_model_is_named(fails, stage, folder, told):
    field = "models" if stage == "evaluate" else "model_name_or_path"
    line = fails(["chat", folder, "--prompt", "hi"] if stage == "chat" else command(stage, **{field: folder}))
    assert folder in line
    assert told in line


@pytest.mark.parametrize(("folder", "told"), [*MODELS, ("other_tokenizer", "they do not belong together")])
def test_classify_names_an_unusable_model(fails, folder, told):
    line = fails(command("classify", model_name_or_path=folder))
    assert folder in line
    assert told in line


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("nowhere.tsv", "no such file or folder: 'nowhere.tsv'"),
        ("empty", "'empty' is a folder with no data"),
        ("empty.jsonl", "empty.jsonl: no rows; found an empty file"),
        ("latin.jsonl", "latin.jsonl: not UTF-8 at byte 15"),
        ("columns.jsonl", "columns.jsonl: cannot tell which column is the label"),
        ("questions.jsonl", "questions.jsonl: cannot tell which column is the label"),
        ("file", "file: cannot read rows of '' files"),
    ],
)
def test_classify_names_unusable_data(fails, data, told):
    assert told in fails(command("classify", dataset=data))


@pytest.mark.parametrize(("folder", "told"), [*MODELS, ("road/sft", "label"), ("other_tokenizer", "tokenizer")])
def test_ppo_names_an_unusable_reward_model(fails, folder, told):
    line = fails(command("ppo", reward_model=folder))
    assert folder in line
    assert told in line or "label" in line


@pytest.mark.parametrize("folder", ["./nowhere", "file", "cut", "road/sft"])
def test_evaluate_names_an_unusable_reward_model_before_it_measures(fails, home, folder):
    assert folder in fails(command("evaluate", reward_model=folder))
    assert not (home / "new" / "curve.jsonl").exists()


@pytest.mark.parametrize("stage", [*TUNING, "evaluate"])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("nowhere.jsonl", "no such file or folder: 'nowhere.jsonl'"),
        ("empty", "empty: holds no tasks"),
        ("empty.jsonl", "empty.jsonl: no usable rows; found an empty file"),
        ("latin.jsonl", "latin.jsonl: not UTF-8 at byte 15"),
        ("columns.jsonl", "columns.jsonl, line 1: unknown format with the columns 'foo', 'bar'"),
        ("long.jsonl", " tokens"),
    ],
)
def test_unusable_data_is_named(fails, stage, data, told):
    data = "long_questions.jsonl" if data == "long.jsonl" and stage in OF_QUESTIONS else data
    line = fails(command(stage, **{"questions_source" if stage == "evaluate" else "dataset": data}))
    assert told in line
    assert ("'word word" if data == "long_questions.jsonl" and stage == "evaluate" else data) in line


def test_chat_names_the_length_of_a_message_that_does_not_fit(fails):
    assert "tokens, and 48 fit (the context is 64" in fails(["chat", "road/sft", "--prompt", LONG])


def test_a_mistake_in_a_finished_runs_recipe_costs_nothing(home, capfd):
    """A run with other settings sets the finished one aside; the right settings take it back, and redo nothing."""
    assert main(command("tokenizer", "again")) == 0
    made = (home / "again" / "metrics.json").read_bytes()
    assert main(command("tokenizer", "again", sources="blank")) == 2
    assert main(command("tokenizer", "again")) == 0
    assert (home / "again" / "metrics.json").read_bytes() == made
    assert not (home / "again.old").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_a_read_only_folder_is_named(fails, home):
    folder = home / "locked"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "locked/new: may not be written; choose another output_dir" in fails(command("tokenizer", "locked/new"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    if subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(disk, leave):
    """Take all but `leave` bytes of a disk."""
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - leave)))


@pytest.mark.parametrize(("stage", "leave"), [("tokenizer", 8192), ("prepare", 40_000), ("pretrain", 60_000)])
def test_a_full_disk_is_told_and_the_same_command_completes_when_there_is_space(fails, small_disk, stage, leave):
    arguments = command(stage, str(small_disk / stage))
    fill(small_disk, leave)
    line = fails(arguments)
    assert "the disk is full" in line
    assert str(small_disk / stage) in line
    (small_disk / "filler").unlink()
    assert main(arguments) == 0
    assert (small_disk / stage / "metrics.json").is_file()


TERMINATED = """
import os, signal, sys
from hf_scratch_gpt import cli

def dispatch(*_):
    try:
        os.kill(os.getpid(), signal.{name})
    except KeyboardInterrupt as error:
        if {wrapped}:  # as dataclasses do in an import
            raise RuntimeError("Error calling __set_name__") from error
        raise

cli._dispatch = dispatch
sys.exit(cli.main(["tokenizer"]))
"""


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_outside_of_training_is_status_75(name, wrapped):
    code = TERMINATED.format(name=name, wrapped=wrapped)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr == "scratch-gpt: interrupted; the same command continues it\n"
