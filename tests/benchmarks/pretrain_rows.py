"""One row of the pretraining benchmarks in a process of its own: `python pretrain_rows.py REQUEST.json RESULT.json`.

Started by pretrain.py and pretrain_gpu.py. A process each, because the peak of memory, the allocator's settings and
compiled code stay with a process.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pretrain_plain import train_plainly
from pretrain_request import Request


@contextmanager
def measured_peak(device: str, result: dict[str, Any]) -> Iterator[None]:
    """Measure this machine's bf16 products before and after, in this process, into `peak_flops`."""
    from hf_scratch_gpt.runs.hardware import peak_product_flops

    measure = inspect.unwrap(peak_product_flops)  # anew: it keeps what it found for the process
    before = measure(device, torch.bfloat16, 1.0)
    yield
    result["peak_flops"] = [before, measure(device, torch.bfloat16, 1.0)]


def _ours(request: Request) -> dict[str, Any]:
    from pretrain_ours import train_ours

    return train_ours(request)


def _trainer(kind: str) -> Callable[[Request], dict[str, Any]]:
    def run(request: Request) -> dict[str, Any]:
        from pretrain_trainer import train_with_trainer

        return train_with_trainer(request, kind)

    return run


ROWS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "ours": _ours,
    "nanogpt-fp32": lambda request: train_plainly(request, "nanogpt", bf16=False, compiled=False),
    "nanogpt-bf16": lambda request: train_plainly(request, "nanogpt", bf16=True, compiled=False),
    "nanogpt-bf16-compile": lambda request: train_plainly(request, "nanogpt", bf16=True, compiled=True),
    "gpt2-trainer": _trainer("gpt2"),
    "qwen3-trainer": _trainer("qwen3"),
    "qwen3-bf16-compile": lambda request: train_plainly(request, "qwen3", bf16=True, compiled=True),
    "nanochat": lambda request: train_plainly(request, "nanochat", bf16=True, compiled=True),
    "modern-adamw": lambda request: train_plainly(request, "modern", bf16=True, compiled=True),
    "modern-muon": lambda request: train_plainly(request, "modern", bf16=True, compiled=True, muon=True),
}


def main(request_file: str, result_file: str) -> None:
    """Measure the row and write its result."""
    request = Request(**json.loads(Path(request_file).read_text(encoding="utf-8")))
    result: dict[str, Any] = {}
    with measured_peak(request.device, result):
        result |= ROWS[request.row](request)
    result["threads"] = torch.get_num_threads()
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
