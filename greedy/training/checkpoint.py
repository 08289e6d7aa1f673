"""Checkpoints: a stage's training is kept so that it goes on after anything that ends a process.

In the stage's ``training/checkpoint``, next to the documents of
``greedy.runs.checkpoint_record``: the tensors, whose digest ``progress.json`` names; it is renamed
into place once they are on disk.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from greedy.base.files import digest_of_parts, file_digest, read_tensors, with_digest
from greedy.base.tensorfile import file_parts
from greedy.cache.files import write_parts, write_whole
from greedy.runs.checkpoint_record import (
    PROGRESS_FILE,
    CheckpointRecord,
    Progress,
    StartRecord,
    damaged_checkpoint,
)
from greedy.runs.choices import StepMemory
from greedy.runs.exchange import CHECKPOINT
from greedy.steps.strategies import Strategy
from greedy.training.packing import pack, unpack
from greedy.training.schedule import FIRST, Patience, Schedule, set_first_rates


class Sums(NamedTuple):
    """A stage's running sums over an epoch, on the device."""

    loss: Tensor | float
    wrong: Tensor | None


@dataclass
class Checkpoints:
    """Keeps and finds the progress of what trains in its directory ``training``, at most every
    ``minutes`` within an epoch.

    Attributes:
        before: seconds that earlier processes trained.
        last: what was kept last, in words.
    """

    training: Path
    strategy: Strategy
    schedule: Schedule
    minutes: float
    start: StartRecord
    before: float = 0.0
    last: str = ""
    _saved: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether the last one is old enough for the next."""
        return time.monotonic() - self._saved >= 60 * self.minutes

    def reduced(self, memory: StepMemory) -> None:
        """Notes that steps take less memory from here on, since one ran out of it."""
        self._decided(**memory.recorded(), memory_reduced=True)

    def not_compiled(self) -> None:
        """Notes that steps are not compiled from here on."""
        self._decided(compile=False)

    def _decided(self, **choices: Any) -> None:
        resolved = self.start.resolved.model_copy(update=choices)
        self.start = self.start.model_copy(update={"resolved": resolved})
        self.start.write(self.training)

    def save(self, progress: Progress, sums: Sequence[Sums] = ()) -> None:
        """Keeps everything; what was kept before goes when this is on disk."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self._modules().items()
            for key, value in module.state_dict().items()
        }
        for index, each in enumerate(sums):
            for name, value in each._asdict().items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.sums.{name}"] = value
        optimizers = [
            pack(optimizer.state_dict(), f"optimizer.{index}", tensors)
            for index, optimizer in enumerate(self.strategy.optimizers)
        ]
        schedule = self.schedule
        state = {k: getattr(schedule, k) for k in _PATIENCE if isinstance(schedule, Patience)}
        name = digest_of_parts(file_parts(tensors))
        document = CheckpointRecord(
            progress=progress, schedule=state, optimizers=optimizers, tensors=name
        )
        directory = self.training / CHECKPOINT
        kept = directory / f"{name}.safetensors"
        write_parts(kept, file_parts(tensors))
        write_whole(directory / PROGRESS_FILE, with_digest(document.model_dump(mode="json")))
        for old in directory.glob("*.safetensors"):
            if old != kept:
                old.unlink()
        self._saved, self.last = time.monotonic(), str(progress)

    def load(self) -> tuple[Progress, list[Sums]] | None:
        """Gives strategy and schedule the state that was kept last; ``None`` where none was.
        Raises ``UserError`` naming a file that is damaged."""
        document = CheckpointRecord.read(self.training)
        if document is None:
            return None
        path = self.training / CHECKPOINT / f"{document.tensors}.safetensors"
        if not path.is_file() or file_digest(path) != document.tensors:
            raise damaged_checkpoint(path, self.training, "it is not the file that was written")
        try:
            tensors = read_tensors(path)
            self._restore(document, tensors)
        except Exception as error:  # whatever torch makes of a stranger's numbers
            raise damaged_checkpoint(
                path, self.training, "it fits another stage or optimiser"
            ) from error
        progress = document.progress
        self.last, self.before = str(progress), progress.before + progress.seconds
        return progress, self._sums(tensors)

    def _modules(self) -> dict[str, nn.Module]:
        """All whose state is kept, by the names under which it is."""
        return {
            f"{index}.{name}": module
            for index, learner in enumerate(self.strategy.learners)
            for name, module in (
                ("stage", learner.stage),
                ("heads", learner.heads),
                ("scale", learner.scale),
            )
            if module is not None
        }

    def _restore(self, document: CheckpointRecord, tensors: dict[str, Tensor]) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(_below(f"{name}.", tensors))
        for optimizer, packed in zip(self.strategy.optimizers, document.optimizers, strict=True):
            kept = unpack(packed, tensors)
            _require_same_settings(optimizer, kept["param_groups"])
            optimizer.load_state_dict(kept)
            _lay_out_like_weights(optimizer)
            # CheckpointRecord before groups had rates of their own, it began at the schedule's.
            set_first_rates([optimizer], self.schedule.rate)
            _require_same_shapes(optimizer)
        if isinstance(self.schedule, Patience):
            for name in _PATIENCE:
                setattr(self.schedule, name, document.schedule[name])

    def _sums(self, tensors: dict[str, Tensor]) -> list[Sums]:
        """The sums of an epoch that was kept unfinished; else none."""
        found = []
        for index, learner in enumerate(self.strategy.learners):
            kept = {k: v.to(learner.device) for k, v in _below(f"{index}.sums.", tensors).items()}
            if "loss" in kept:
                found.append(Sums(kept["loss"], kept.get("wrong")))
        return found


RATES = (int, float, Tensor, type(None))  # a group may have none
_PATIENCE = ("best", "waited", "dropped")


def _require_same_settings(optimizer: torch.optim.Optimizer, kept: list[dict[str, Any]]) -> None:
    """An optimiser's settings are not the checkpoint's to change: Adam's are those it was made
    with, but for the rates, which go on as they are; those of others may be numbers that move."""
    free = {"params", "lr", FIRST}
    for group, other in zip(optimizer.param_groups, kept, strict=True):
        known = group.keys() | {FIRST} == other.keys() | {FIRST}
        if not known or not all(isinstance(other.get(name), RATES) for name in ("lr", FIRST)):
            raise ValueError("other settings of the optimiser")
        for name in group.keys() - free:
            mine, theirs = group[name], other[name]
            moves = type(mine) is type(theirs) in (int, float)
            fixed = isinstance(optimizer, torch.optim.Adam) or not moves
            if fixed and not (isinstance(mine, Tensor) or mine == theirs):
                raise ValueError("other settings of the optimiser")


def _lay_out_like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded moments the layout of their weights, which is channels-last on CUDA: files have
    none, and a fused optimiser refuses other layouts."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_like = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_like and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _require_same_shapes(optimizer: torch.optim.Optimizer) -> None:
    """A fused Adam believes what it finds; others look. It has nothing of a parameter that never
    had a gradient."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state, scalar = optimizer.state.get(parameter), torch.Size()
        if not state:
            continue
        expected = {"step": scalar, "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if any(name not in state or state[name].shape != expected[name] for name in expected):
            raise ValueError("moments of other parameters")


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
