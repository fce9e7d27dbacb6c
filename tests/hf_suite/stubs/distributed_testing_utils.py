"""Stands for a file that transformers' source distribution lacks: starts the ranks of a test on CPUs (gloo)."""

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


RANK_DEADLINE_S = int(os.environ.get("HF_SUITE_RANK_DEADLINE", "240"))


def _start_rank_processes(fn, args=(), nprocs=2):
    """mp.spawn with a deadline: a rank that raises before a barrier leaves the others waiting for ever."""
    ctx = mp.spawn(fn, args=args, nprocs=nprocs, join=False)
    end = time.monotonic() + RANK_DEADLINE_S
    try:
        while not ctx.join(timeout=2):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"ranks still waiting after {RANK_DEADLINE_S} s: the usual cause is a family that does not "
                    "register itself with the Auto classes on import, so that rank 0 fails before a barrier"
                )
    finally:
        for p in ctx.processes:
            if p.is_alive():
                p.kill()


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _rank_main(rank, func, world_size, port, args, kwargs):
    os.environ.update(
        WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    _set_rank_device(rank)
    dist.init_process_group(backend="gloo", rank=rank, world_size=world_size)
    func(rank, *args, **kwargs)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # its work is done: now and then the threads of gloo abort a process that takes itself down in order


def run_distributed(world_size):
    def deco(func):
        def wrapper(*args, **kwargs):
            _start_rank_processes(_rank_main, (func, world_size, _free_port(), args, kwargs), world_size)

        return wrapper

    return deco
