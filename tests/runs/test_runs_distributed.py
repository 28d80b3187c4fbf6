"""Two processes of one launch: what rank 0 finds all know, its error leaves none waiting, and a signal stops all.

The processes are set up as `accelerate launch` sets them up (gloo on the CPU). They are forked from one fresh process,
which runs this file as a script: libraries are imported once, and no thread of pytest's process is forked.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from test_runs_folder import leave, make

from hf_scratch_gpt.runs import Interrupted, StageRun, read_metrics


def launch(report, work, *arguments):
    """Run `work(rank, *arguments)` in two processes and write what each returns to `report`, a list by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=on_rank, args=(rank, port, results, work, arguments)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    told = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    report.write_text(json.dumps([told[0], told[1]]))


def on_rank(rank, port, results, work, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    try:
        told = work(rank, *arguments)
    except Exception as error:
        told = [type(error).__name__, str(error)]
    results.put((rank, told))


def open_run(rank, folder):
    with StageRun(make(folder), "toy") as run:
        told = [run.finished, run.resumed, run._state.get("run_id"), Accelerator().num_processes]
        if not run.finished:
            run.log(3, loss=0.5)
            run.finish({"loss": 0.5})
    return told


def train_until_signalled(rank, folder, step):
    from test_runs_training import At, run_training

    def terminate_this_rank():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        weights, _, resumed = run_training(folder, *([At(step, terminate_this_rank)] if step else []))
    except Interrupted as error:
        return ["interrupted", str(error)]
    return ["done", resumed, weights["inner.weight"].tolist()]


def main(folder):
    """All launches, one after the other."""
    import test_runs_training  # noqa: F401  before the fork, so that each process need not import it

    leave(make(folder / "run"))
    launch(folder / "first.json", open_run, folder / "run")
    launch(folder / "second.json", open_run, folder / "run")
    (folder / "file").write_text("in the way")
    launch(folder / "failed.json", open_run, folder / "file")
    launch(folder / "signalled.json", train_until_signalled, folder / "trained", 6)
    launch(folder / "resumed.json", train_until_signalled, folder / "trained", 0)
    launch(folder / "whole.json", train_until_signalled, folder / "whole", 0)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which `main` ran."""
    folder = tmp_path_factory.mktemp("launched")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder


def read_report(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_all_ranks_agree_on_what_the_folder_holds(launched):
    first, second = read_report(launched, "first")
    assert first == second
    assert (first[:2], first[3]) == ([False, True], 2)
    assert read_metrics(launched / "run")["run_id"] == first[2]
    assert [told[0] for told in read_report(launched, "second")] == [True, True]


def test_only_the_main_process_writes(launched):
    assert [json.loads(line)["step"] for line in (launched / "run" / "curve.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_an_error_of_the_main_process_stops_the_others(launched):
    first, second = read_report(launched, "failed")
    assert first[0] == "ValueError"
    assert "found a file" in first[1]
    assert second == ["MainProcessFailed", first[1]]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(launched):
    first, second = read_report(launched, "signalled")
    assert first == second
    assert "stopped by SIGTERM at step 6" in first[1]


def test_the_stopped_run_resumes_to_the_weights_of_one_that_was_not(launched):
    resumed, whole = read_report(launched, "resumed"), read_report(launched, "whole")
    assert [told[:2] for told in resumed] == [["done", True]] * 2
    assert resumed[0][2] == resumed[1][2] == whole[0][2] == whole[1][2]


def test_processes_that_do_not_know_of_each_other_are_told_how_to_launch(tmp_path):
    script = (
        "import sys; from hf_scratch_gpt.runs import *\n"
        "try: StageRun(StageArguments(output_dir=sys.argv[1]), 'toy').__enter__()\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert "launched as 2 processes, but they do not know of each other" in done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
