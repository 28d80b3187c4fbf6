"""Runs pretraining in groups of real processes over gloo, one after the other, with the imports paid once.

    python tests/pretraining/process_groups.py JOBS.json

A job is `{"processes": 2, "kind": "ddp", "arguments": {...}, "stop_at": 4, "copy_from": FOLDER}`. The environment of
each process is what `accelerate launch` sets (a test compares them); a launcher costs more than a run of a few steps.
`stop_at` ends a run by SIGTERM after so many steps; `copy_from` begins with a copy of another job's output folder;
`kill_at` ends it by SIGKILL in that step; `poison`, two numbers, makes random tokens of the batches from the first to
before the second.
Each process writes the windows that it was given to `<output_dir>.windows.<rank>.jsonl`, and a hash of the weights
that it ends with to `<output_dir>.weights.<rank>`.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

INTERRUPTED = 75


def environment_of(kind: str, processes: int, rank: int, port: int) -> dict[str, str]:
    """What `ACCELERATE_USE_CPU=true accelerate launch` gives to a process of such a launch."""
    if kind == "none":
        return {}
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return environment | ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if kind == "fsdp" else {})


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def watch_windows(path: Path, stop_at: int | None, kill_at: int | None) -> None:
    """Write down the windows of each step, and stop this process in the step before `stop_at` or in `kill_at`."""
    from hf_scratch_gpt.data import loader, streaming
    from hf_scratch_gpt.data.packed_windows import PackedWindows

    def note(step, windows):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "windows": windows["input_ids"].tolist()}) + "\n")
        if stop_at is not None and step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return windows

    read, read_packed = loader.batch_windows, PackedWindows.batch
    read_stream = streaming.StreamWindows.batch
    loader.batch_windows = lambda shards, context_length, batch_size, seed, step, *place: note(
        step, read(shards, context_length, batch_size, seed, step, *place)
    )
    PackedWindows.batch = lambda self, batch_size, seed, step, *place: note(
        step, read_packed(self, batch_size, seed, step, *place)
    )
    streaming.StreamWindows.batch = lambda self, step, *place: note(step, read_stream(self, step, *place))


def poison_batches(first: int, end: int, batch_size: int) -> None:
    """Make random tokens of this process's share of the batches `first` to `end` - 1."""
    import torch

    from hf_scratch_gpt.pretraining.pretrain import _Pretraining

    read = _Pretraining._read_batch

    def spoilt(self, number):
        batch = read(self, number)
        rows, length = batch["input_ids"].shape
        if first <= number < end:
            tokens = torch.randint(300, (batch_size, length), generator=torch.Generator().manual_seed(number))
            batch["input_ids"] = tokens.split(rows)[self.accelerator.process_index]
        return batch

    _Pretraining._read_batch = spoilt


def note_weights(path: Path) -> None:
    """Write a hash of the whole weights that this process ends with."""
    from hf_scratch_gpt.pretraining import sharding

    save = sharding.save_model

    def noted(model, *arguments):
        weights = sharding.whole_weights(model, keep=True) or model.state_dict()
        digest = hashlib.sha256()
        for tensor in weights.values():
            digest.update(tensor.numpy().tobytes())
        path.write_text(digest.hexdigest(), encoding="utf-8")
        save(model, *arguments)

    sharding.save_model = noted


def work(job: dict, rank: int, port: int) -> int:
    """One process of a job; returns its exit status."""
    from hf_scratch_gpt.pretraining.pretrain import Arguments, run
    from hf_scratch_gpt.runs import Interrupted

    os.environ.update(environment_of(job["kind"], job["processes"], rank, port))
    watch_windows(
        Path(f"{job['arguments']['output_dir']}.windows.{rank}.jsonl"), job.get("stop_at"), job.get("kill_at")
    )
    note_weights(Path(f"{job['arguments']['output_dir']}.weights.{rank}"))
    if "poison" in job:
        poison_batches(*job["poison"], job["arguments"]["batch_size"])
    try:
        run(Arguments(**job["arguments"]))
    except Interrupted:
        return INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_job(job: dict) -> None:
    """Run all processes of a job; raises `SystemExit` if one ends otherwise than it should."""
    if "copy_from" in job:
        shutil.copytree(job["copy_from"], job["arguments"]["output_dir"])
    port, children = free_port(), []
    for rank in range(job["processes"]):
        child = os.fork()
        if child == 0:
            status = work(job, rank, port)
            sys.stdout.flush()
            os._exit(status)
        children.append(child)
    expected = INTERRUPTED if "stop_at" in job else 0
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if "kill_at" in job:  # who is not killed loses the others
        if -signal.SIGKILL not in statuses or not all(statuses):
            raise SystemExit(f"{job['kind']} on {job['processes']}: {statuses}, expected a kill")
    elif set(statuses) != {expected}:
        raise SystemExit(f"{job['kind']} on {job['processes']}: {statuses}, expected {expected}")


def main() -> None:
    """Run the jobs of the file that the command line names."""
    import torch
    import torch.distributed.fsdp
    import torch.distributed.tensor
    from accelerate import Accelerator  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import hf_scratch_gpt.evaluation.text
    import hf_scratch_gpt.pretraining.loop
    import hf_scratch_gpt.pretraining.setup  # noqa: F401

    torch.set_num_threads(1)  # before any thread is started: the children are forks of this process
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_job(job)


if __name__ == "__main__":
    main()
