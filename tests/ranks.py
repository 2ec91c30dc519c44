"""Several processes that share a run, as torchrun starts them, forked from one that has imported torch already."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch


def server() -> ForkServerContext:
    """Where the processes are forked from."""
    context = multiprocessing.get_context("forkserver")
    heavy = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "safetensors.torch"]
    context.set_forkserver_preload([*heavy, "tokenizers", "fastchargpt.trainer"])
    return context


def _be(rank: int, world_size: int, port: int, out: Path, act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    found = act(*arguments)
    out.write_bytes(pickle.dumps(found))


def run_ranks(
    folder: Path, act: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout: float = 300.0
) -> list[Any]:
    """What `act(*arguments)` gives on each of the processes; None for one that ended without giving anything."""
    context = server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    outs = [folder / f"rank{rank}.pickle" for rank in range(world_size)]
    for out in outs:
        out.unlink(missing_ok=True)
    processes = [
        context.Process(target=_be, args=(rank, world_size, port, outs[rank], act, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
        if process.is_alive():
            process.kill()
    return [pickle.loads(out.read_bytes()) if out.exists() else None for out in outs]
