"""Stands in for the helpers that start the processes of the tensor-parallel and FSDP mixins: gloo, on the CPU only."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    """Run `function(rank, *args)` in `nprocs` processes; an error in one is raised here."""
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="spawn")


def _with_process_group(rank: int, world_size: int, port: int, function, args: tuple) -> None:
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    _set_rank_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """Make of `function(rank, *args)` a function of `args` that runs it in `world_size` processes of one group."""

    def wrap(function):
        def start(*args):
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            _start_rank_processes(_with_process_group, (world_size, port, function, args), world_size)

        return start

    return wrap
