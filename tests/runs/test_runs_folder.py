"""A run's folder: one writer, resumed after a kill, redone when settings or inputs change, never lost."""

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.runs import StageArguments, StageRun, read_json, read_metrics
from hf_scratch_gpt.runs.identity import fingerprint


@dataclasses.dataclass
class ToyArguments(StageArguments):
    """Settings of a stage that trains nothing."""

    input_fields: ClassVar[tuple[str, ...]] = ("model", "sources")
    model: str = dataclasses.field(default="", metadata={"help": "Folder of the model."})
    sources: list[str] = dataclasses.field(default_factory=list, metadata={"help": "Files."})
    steps: int = dataclasses.field(default=3, metadata={"help": "Steps."})
    logging_steps: int = dataclasses.field(default=1, metadata={"help": "Steps between lines of the curve."})


def make(folder, **values):
    return ToyArguments(output_dir=str(folder), **values)


def finish(arguments, stage="toy", **metrics):
    with StageRun(arguments, stage) as run:
        if not run.finished:
            (run.folder / "weights").write_text("w")
            run.finish(metrics)
        return run


def leave(arguments, steps=2):
    """An interrupted try: a curve, a checkpoint, no metrics."""
    with StageRun(arguments, "toy") as run:
        for step in range(1, steps + 1):
            run.log(step, loss=1.0 / step)
        run.checkpoints.mkdir(exist_ok=True)
        (run.checkpoints / "checkpoint-1").mkdir(exist_ok=True)
    return run


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_runs_folder import make, StageRun
with StageRun(make(sys.argv[1]), "toy") as run:
    run.log(1, loss=1.0)
    print("inside", flush=True)
    time.sleep(600)
"""
ENDLESS_STAGE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_runs_folder import finish, leave, make
number = 0
while True:
    number += 1
    leave(make(sys.argv[1], steps=number))
    finish(make(sys.argv[1], steps=number))
    leave(make(sys.argv[1], steps=number, seed=1))
"""


def start(script, folder):
    here = os.path.dirname(os.path.abspath(__file__))
    return subprocess.Popen([sys.executable, "-c", script, str(folder), here], stdout=subprocess.PIPE, text=True)


def test_a_finished_run_tells_what_it_was_and_keeps_no_working_files(tmp_path):
    upstream = finish(make(tmp_path / "base"))
    leave(make(tmp_path / "tuned", model=str(tmp_path / "base")))
    run = finish(make(tmp_path / "tuned", model=str(tmp_path / "base")), loss=0.5)
    metrics = read_metrics(run.folder)
    assert metrics["stage"] == "toy"
    assert metrics["metrics"] == {"loss": 0.5}
    assert metrics["inputs"]["model"]["run_id"] == read_metrics(upstream.folder)["run_id"]
    assert {"run_id", "fingerprint", "started_at", "finished_at", "seconds", "environment"} <= metrics.keys()
    assert metrics["peak_rss_bytes"] > 1_000_000
    assert sorted(os.listdir(run.folder)) == ["curve.jsonl", "metrics.json", "recipe.yaml", "weights"]


def test_the_same_settings_are_not_done_twice(tmp_path):
    first = finish(make(tmp_path / "run"), loss=0.5)
    before = (first.folder / "metrics.json").read_bytes()
    again = finish(make(tmp_path / "run", logging_steps=7))
    assert again.finished
    assert (first.folder / "metrics.json").read_bytes() == before


def test_an_interrupted_run_is_resumed_with_its_identity_time_and_curve(tmp_path):
    first = leave(make(tmp_path / "run"))
    state = read_json(first.folder / ".state.json")
    time.sleep(0.05)
    with StageRun(make(tmp_path / "run"), "toy") as run:
        assert run.resumed
        assert not run.finished
        assert run.seconds >= state["seconds"]
        assert [row["step"] for row in run.read_curve()] == [1, 2]
        run.truncate_curve(1)
        run.log(2, loss=0.1)
        assert [row["loss"] for row in run.read_curve()] == [1.0, 0.1]
        run.finish({})
    assert read_metrics(run.folder)["run_id"] == state["run_id"]
    assert not run.checkpoints.exists()


def test_a_finished_run_of_other_settings_is_set_aside(tmp_path, caplog):
    finish(make(tmp_path / "run"), loss=0.5)
    run = finish(make(tmp_path / "run", steps=4), loss=0.25)
    assert not run.finished
    assert read_metrics(tmp_path / "run")["metrics"] == {"loss": 0.25}
    assert read_metrics(tmp_path / "run.old")["metrics"] == {"loss": 0.5}
    assert "kept as" in caplog.text


def test_a_folder_in_the_way_of_setting_aside_is_not_lost(tmp_path):
    finish(make(tmp_path / "run"), loss=0.5)
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"run\.old: in the way"):
        finish(make(tmp_path / "run", steps=4))
    assert (tmp_path / "run.old" / "thesis.txt").exists()
    assert read_metrics(tmp_path / "run")["metrics"] == {"loss": 0.5}


def test_unfinished_work_of_other_settings_is_removed_with_a_warning(tmp_path, caplog):
    leave(make(tmp_path / "run"))
    with StageRun(make(tmp_path / "run", steps=4), "toy") as run:
        assert not run.resumed
        assert run.read_curve() == []
        assert not run.checkpoints.exists()
    assert "removing unfinished work" in caplog.text
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("changes", [{"steps": 4}, {"seed": 1}, {"model": "other"}, {"sources": ["a"]}])
def test_the_fingerprint_changes_with_settings_and_inputs(tmp_path, changes):
    assert fingerprint(make(tmp_path), "toy") != fingerprint(make(tmp_path, **changes), "toy")


def test_the_fingerprint_ignores_the_output_folder_and_what_changes_no_result(tmp_path):
    base = fingerprint(make(tmp_path / "a"), "toy")
    assert fingerprint(make(tmp_path / "b", logging_steps=9, report_to="tensorboard"), "toy") == base
    assert fingerprint(make(tmp_path / "a"), "other stage") != base


def test_the_fingerprint_follows_the_content_of_files_but_not_where_they_lie(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "text.txt").write_text("abc")
        os.utime(tmp_path / name / "deep" / "text.txt", (1, 1))
    first = fingerprint(make(tmp_path, sources=[str(tmp_path / "one")]), "toy")
    assert fingerprint(make(tmp_path, sources=[str(tmp_path / "two")]), "toy") == first
    (tmp_path / "one" / "deep" / "text.txt").write_text("abcd")
    assert fingerprint(make(tmp_path, sources=[str(tmp_path / "one")]), "toy") != first


def test_rerunning_upstream_invalidates_downstream_and_moving_it_does_not(tmp_path):
    finish(make(tmp_path / "base"))
    finish(make(tmp_path / "tuned", model=str(tmp_path / "base")))
    assert finish(make(tmp_path / "tuned", model=str(tmp_path / "base"))).finished
    os.rename(tmp_path / "base", tmp_path / "moved")
    assert finish(make(tmp_path / "tuned", model=str(tmp_path / "moved"))).finished
    finish(make(tmp_path / "moved", steps=4))
    assert not finish(make(tmp_path / "tuned", model=str(tmp_path / "moved"))).finished


def test_an_input_that_changes_during_the_run_is_recorded_as_it_was_at_the_start(tmp_path):
    first = finish(make(tmp_path / "base"))
    before = read_metrics(first.folder)["run_id"]
    arguments = make(tmp_path / "tuned", model=str(tmp_path / "base"))
    with StageRun(arguments, "toy") as run:
        finish(make(tmp_path / "base", steps=4))
        run.finish({})
    assert read_metrics(run.folder)["inputs"]["model"]["run_id"] == before
    assert not finish(arguments).finished


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"fingerprint": 1, "run_id": 2}'])
def test_a_damaged_state_starts_anew_with_a_warning(tmp_path, caplog, content):
    run = leave(make(tmp_path / "run"))
    (run.folder / ".state.json").write_bytes(content)
    with StageRun(make(tmp_path / "run"), "toy") as run:
        assert not run.resumed
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    ("content", "told"), [(b"{", "not valid JSON"), (b"{}", "no 'run_id'"), (b"\xff", "not UTF-8")]
)
def test_damaged_metrics_are_named(tmp_path, content, told):
    run = finish(make(tmp_path / "run"))
    (run.folder / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        finish(make(tmp_path / "run"))
    assert "metrics.json" in str(caught.value)


def test_reading_the_metrics_of_what_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        read_metrics(tmp_path)


def test_a_folder_of_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".draft.tmp").write_text("mine too")
    with pytest.raises(ValueError, match="not empty and not a run of this package"):
        finish(make(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".draft.tmp", "notes.txt"]


def test_a_file_in_place_of_the_folder_or_its_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder to write to, found a file"):
        finish(make(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        finish(make(tmp_path / "file" / "run"))


def test_the_working_folder_itself_can_be_a_run(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert not finish(make(".")).finished
    assert finish(make(".")).finished


def test_folders_with_any_name_are_written(tmp_path):
    for name in ("модель 日本 [1]*?", "%s", "a" * 200):
        leave(make(tmp_path / name))
        leave(make(tmp_path / name, steps=9))
        assert finish(make(tmp_path / name, steps=9)).resumed


def test_an_error_in_a_run_frees_its_folder_for_the_same_process(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        finish(make(tmp_path))
    os.unlink(tmp_path / "notes.txt")
    with pytest.raises(KeyError), StageRun(make(tmp_path), "toy"):
        raise KeyError
    assert finish(make(tmp_path)).resumed


def test_two_runs_in_different_folders_go_on_at_once(tmp_path):
    with StageRun(make(tmp_path / "a"), "toy") as a, StageRun(make(tmp_path / "b"), "toy") as b:
        a.finish({})
        b.finish({})
    assert read_metrics(tmp_path / "a")["run_id"] != read_metrics(tmp_path / "b")["run_id"]


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    process = start(HOLDER, tmp_path / "run")
    assert process.stdout.readline().strip() == "inside"
    with pytest.raises(ValueError, match="another process is writing this run"):
        finish(make(tmp_path / "run"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finish(make(tmp_path / "run")).resumed


def test_after_a_kill_at_any_moment_the_same_command_goes_on(tmp_path):
    for trial in range(10):
        process = start(ENDLESS_STAGE, tmp_path / "run")
        deadline = time.monotonic() + 120
        while not (tmp_path / "run").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.003 * trial * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finish(make(tmp_path / "run", steps=1000 + trial))
        assert finish(make(tmp_path / "run", steps=1000 + trial)).finished
        assert not list(tmp_path.rglob(".*.tmp"))


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(min_value=0, max_value=200))
def test_a_curve_cut_anywhere_loses_only_the_line_that_was_cut(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut") / "run"
    leave(make(folder), steps=3)
    content = (folder / "curve.jsonl").read_bytes()
    (folder / "curve.jsonl").write_bytes(content[: min(cut, len(content))])
    with StageRun(make(folder), "toy") as run:
        whole = content[:cut].count(b"\n")
        assert [row["step"] for row in run.read_curve()][:whole] == list(range(1, whole + 1))
        run.log(99, loss=0.0)
        rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 99


def test_a_diverged_loss_is_null_in_the_curve_and_refused_in_the_metrics(tmp_path):
    with StageRun(make(tmp_path / "run"), "toy") as run:
        run.log(1, loss=float("nan"), grad_norm=float("inf"), note="diverged")
        assert "NaN" not in (run.folder / "curve.jsonl").read_text()
        assert run.read_curve()[0] | {"seconds": 0} == {
            "step": 1,
            "seconds": 0,
            "loss": None,
            "grad_norm": None,
            "note": "diverged",
        }
        with pytest.raises(ValueError, match=r"'metrics\.loss' is nan"):
            run.finish({"loss": float("nan")})


def test_why_a_run_stopped_is_in_its_folder_and_at_last_in_its_metrics(tmp_path):
    for step, reason in ((3, "SIGTERM"), (5, "SIGUSR1")):
        with StageRun(make(tmp_path / "run"), "toy") as run:
            assert "stop_reason" not in read_json(run.folder / ".state.json")
            run.note_stop(reason, step)
        state = read_json(tmp_path / "run" / ".state.json")
        assert (state["stop_reason"], state["stop_step"]) == (reason, step)
    run = finish(make(tmp_path / "run"))
    assert read_metrics(run.folder)["stops"] == [
        {"stop_reason": "SIGTERM", "stop_step": 3},
        {"stop_reason": "SIGUSR1", "stop_step": 5},
    ]
    assert "stop_reason" not in read_metrics(run.folder)


def test_a_full_disk_costs_a_line_of_the_curve_or_the_run(tmp_path, monkeypatch, caplog):
    with StageRun(make(tmp_path / "run"), "toy") as run:
        run.log(1, loss=1.0)
        curve = (run.folder / "curve.jsonl").read_bytes()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The kernel lets half a line through and then refuses; of a full disk it would say ENOSPC.
        monkeypatch.setattr("hf_scratch_gpt.runs.folder.is_full_disk", lambda error: error.errno == errno.EFBIG)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(curve) + 10, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                run.log(2, loss=0.5)
            assert (run.folder / "curve.jsonl").read_bytes() == curve
            run.outlasts_full_disk = True
            run.log(2, loss=0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "the disk is full, so step 2 is not in curve.jsonl" in caplog.text
        run.log(3, loss=0.25)
        assert [row["step"] for row in run.read_curve()] == [1, 3]


def test_the_recorded_recipe_says_how_to_make_the_run_again(tmp_path):
    run = finish(make(tmp_path / "run", steps=7, sources=["é"]))
    import yaml

    text = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"output_dir": str(tmp_path / "run"), "steps": 7, "sources": ["é"]}
    assert text.startswith("# scratch-gpt toy recipe.yaml")
