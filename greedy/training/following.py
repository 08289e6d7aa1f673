"""What the leader of several processes tells the others to train."""

import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from greedy.base.errors import UserError
from greedy.base.ranks import Ranks
from greedy.recipes import Recipe
from greedy.runs.checkpoint_record import StartRecord
from greedy.runs.views import Views

MEETING = ".meeting"  # a file in the run directory by which processes know that they share it
Parallel = Literal["data", "stages"]


class Task(NamedTuple):
    """The training of a stage that the leader has begun, as ``StagePlanner.stage`` takes it; stage
    0 stands for the whole network."""

    stage: int = 0
    source: int = 0
    views: Views = "live"
    reuse: int = 0
    directory: str = ""

    @classmethod
    def of(cls, start: StartRecord, training: Path) -> "Task":
        """Returns the task of a training in a directory."""
        choices = start.resolved
        directory = str(training.parent)
        return cls(start.stage, start.source, choices.views, choices.reuse, directory)


def require_same_directory(run: Path, ranks: Ranks) -> None:
    """Waits for the leader, and raises ``UserError`` if a process does not see its run."""
    if ranks.size == 1:
        return
    seen = run / MEETING
    if ranks.leads:
        with suppress(OSError):  # such as a finished run that is read-only
            seen.write_text(secrets.token_hex(8), encoding="utf-8")
    written = ranks.told(_text(seen))
    absent = [place for place in ranks.all_told(_place(seen, written, ranks)) if place]
    if ranks.leads:
        with suppress(OSError):
            seen.unlink(missing_ok=True)
    if absent:
        raise UserError(
            f"{absent[0]} does not see the run of the process that leads: give as --run a "
            f"directory that all machines share"
        )


def _place(seen: Path, written: str | None, ranks: Ranks) -> str:
    """Returns where this process is, in words, if it does not see what the leader has written."""
    if _text(seen) == written:
        return ""
    return f"process {ranks.rank} on {socket.gethostname()}, where it is {seen.parent.absolute()},"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def require_parallel(recipe: Recipe, ranks: Ranks, parallel: str) -> None:
    """Raises ``UserError`` if processes cannot train a recipe together as ``parallel`` says."""
    if parallel not in get_args(Parallel):
        raise UserError(f"{parallel!r} is no way to train in parallel: use data or stages")
    if ranks.size > 1 and recipe.data.mixup != "none":
        raise UserError(
            "mixup mixes rows that several processes have: train in one process, or set "
            "data.mixup to none"
        )
    if parallel == "data":
        return
    if recipe.training.strategy != "joint":
        raise UserError(
            f"stages train in parallel only by the strategy joint, and this run's is "
            f"{recipe.training.strategy}: leave out --parallel stages"
        )
    if ranks.size == 1:
        raise UserError(
            "stages train in parallel in several processes, and this is one: start them with "
            "torchrun --nproc-per-node N, or leave out --parallel stages"
        )
