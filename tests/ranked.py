"""Runs functions of test modules in several processes that train together."""

import faulthandler
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from command_line import said

from greedy.base.ranks import Ranks

HANGS = 600  # seconds after which a process shows where it hangs, and ends


def together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls ``work(ranks, *arguments)`` in ``size`` processes. Raises an error of any of them."""
    # Forked from a server that has imported what all of them need, which takes seconds each time.
    multiprocessing.set_forkserver_preload([work.__module__, "greedy.trainer", "pytest"])
    with tempfile.TemporaryDirectory() as directory:
        meeting = Path(directory) / "meeting"
        given = size, str(meeting), work, arguments
        mp.start_processes(_one, given, nprocs=size, start_method="forkserver")


def command_together(size: int, *arguments: object) -> None:
    """Runs a command that succeeds in ``size`` processes, as torchrun does at a higher price."""
    together(size, _command, arguments)


def _command(ranks: Ranks, arguments: tuple[object, ...]) -> None:
    said(*arguments)


def _one(
    rank: int, size: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(HANGS, exit=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{meeting}", limit, rank=rank, world_size=size)
    work(Ranks.joined(), *arguments)
    if dist.is_initialized():  # commands have left it
        dist.destroy_process_group()
