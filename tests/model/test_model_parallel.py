"""Two gloo processes, one model: tensor-parallel, sharded and pipelined, it computes what one process computes.

This file runs as a script too: it forks the two processes from one that has no threads of pytest's.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

INPUT = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
PLANS = {"tensor": {"tp_size": 2}, "sharded": {"fsdp_size": 2}, "pipeline": {"pp_size": 2}}
KINDS = ["modern", "untied", "gpt2", "gpt1", "sliding"]


def measure(model, plan: str) -> list:
    """Logits, greedy tokens, and (a pipeline is for inference only) the norm of the gradient."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        logits = model(INPUT).logits
        tokens = model.generate(INPUT, max_new_tokens=4, do_sample=False, pad_token_id=0)
    square = 0.0
    if plan != "pipeline":
        model(INPUT, labels=INPUT, use_cache=False).loss.backward()
        for parameter in model.parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            square += gradient.double().square().sum().item()
    return [logits.double().square().sum().item(), logits[-1, -1].tolist(), tokens.tolist(), square**0.5]


def on_rank(rank: int, port: int, folder: str) -> None:
    """Load every kind of model in every way and write what it computes, and which layers this process has."""
    from transformers.distributed import DistributedConfig

    from hf_scratch_gpt.model import ScratchGPTForCausalLM

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    told = {}
    for kind in KINDS:
        for plan, sizes in PLANS.items():
            path, config = f"{folder}/{kind}", DistributedConfig(**sizes)
            model = ScratchGPTForCausalLM.from_pretrained(path, distributed_config=config).eval()
            local = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
            told[f"{kind} {plan}"] = [local, *measure(model, plan)]
    Path(folder, f"told-{rank}.json").write_text(json.dumps(told))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(folder: str) -> int:
    """Both processes; 0 if both ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=on_rank, args=(rank, port, folder)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(abs(worker.exitcode) for worker in workers)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What one process computed, and what each of the two did, by kind and plan."""
    from model_tiny import make_model

    folder = tmp_path_factory.mktemp("parallel")
    alone = {}
    for kind in KINDS:
        model = make_model("modern", tie_word_embeddings=False) if kind == "untied" else make_model(kind)
        model.save_pretrained(folder / kind)
        for plan in PLANS:
            model.zero_grad()
            alone[f"{kind} {plan}"] = [model.num_parameters(), *measure(model, plan)]
    command = [sys.executable, __file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env={**os.environ})
    assert result.returncode == 0, result.stderr[-3000:]
    return [alone, *(json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1))]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(told, kind, plan):
    size, square, last, tokens, norm = told[0][f"{kind} {plan}"]
    for rank in (1, 2):
        local, its_square, its_last, its_tokens, its_norm = told[rank][f"{kind} {plan}"]
        assert local < 0.75 * size, "this process holds nearly the whole model"
        assert its_square == pytest.approx(square, rel=1e-5)
        torch.testing.assert_close(torch.tensor(its_last), torch.tensor(last), atol=1e-5, rtol=1e-5)
        assert its_tokens == tokens
        assert its_norm == pytest.approx(norm, rel=1e-4)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1]))
