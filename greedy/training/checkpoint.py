"""Checkpoints, from which a stage's training resumes after anything that ended its process.

They are in the stage's ``training/checkpoint``: the documents of ``greedy.runs.checkpoint_record``
and a file of tensors. ``progress.json`` names that file by its digest, and is renamed into place
once the file is on disk.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import TrainingError
from greedy.base.files import digest_of_parts, read_tensors, with_digest
from greedy.base.relay import Relay
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
from greedy.steps.measuring import Totals
from greedy.steps.moments import ADAMS, SGDS
from greedy.steps.step import Learner
from greedy.steps.strategies import Strategy
from greedy.training.packing import pack, unpack
from greedy.training.schedule import FIRST, Patience, Schedule, set_first_rates


def bytes_of_training(learners: Iterable[Learner]) -> int:
    """Returns the bytes on disk that stages take at most, stores aside: weights, and two
    checkpoints of them with two moments a weight."""
    numbers = sum(p.numel() for learner in learners for p in learner.parameters())
    return (1 + 2 * 3) * 4 * numbers


@dataclass
class Checkpoints:
    """Writes and loads the checkpoints of one training.

    Attributes:
        training: the directory of the training.
        strategy: what trains: weights, local heads, optimisers.
        schedule: the schedule of its learning rate.
        minutes: the least time between two checkpoints within an epoch.
        start: what the training began with; updated when a choice changes.
        writes: whether this process writes them; others only load the last.
        relay: the processes of which each trains some of the stages; the first one's checkpoints
            have the state of all.
        first: the position of this process's first stage among all that train.
        before: seconds that earlier processes trained.
        last: the position of the last checkpoint, in words.
    """

    training: Path
    strategy: Strategy
    schedule: Schedule
    minutes: float
    start: StartRecord
    writes: bool = True
    relay: Relay = field(default_factory=Relay)
    first: int = 0
    before: float = 0.0
    last: str = ""
    _saved: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for the next."""
        return self.writes and time.monotonic() - self._saved >= 60 * self.minutes

    def reduced(self, memory: StepMemory) -> None:
        """Records that steps use ``memory`` from here on, since one ran out of memory."""
        self._record_choices(**memory.recorded(), memory_reduced=True)

    def not_compiled(self) -> None:
        """Records that steps are not compiled from here on."""
        self._record_choices(compile=False)

    def _record_choices(self, **choices: Any) -> None:
        if not self.writes:
            return
        resolved = self.start.resolved.model_copy(update=choices)
        self.start = self.start.model_copy(update={"resolved": resolved})
        self.start.write(self.training)

    def save(self, progress: Progress, totals: Sequence[Totals] = ()) -> None:
        """Writes a checkpoint, then deletes the one before it. All processes call this at the same
        position: each has some of the stages, or of the optimisers' state.

        Args:
            progress: the position in the training.
            totals: each stage's sums over the epoch so far, within an epoch.
        """
        states = [optimizer.state_dict() for optimizer in self.strategy.optimizers]
        if not (self.writes or self.relay.ranks.size > 1):
            return
        tensors, optimizers = self._state(states, totals)
        if not self.writes:
            write_parts(self._part(self.relay.ranks.rank), file_parts(tensors))
        optimizers = self.relay.gathered(optimizers)  # after which all parts are there
        if self.writes:
            for rank in range(1, self.relay.ranks.size):
                tensors |= read_tensors(self._part(rank))
            self._write(progress, tensors, optimizers)
        self.relay.ranks.told()  # a process that ends now would end the one that writes
        self._saved, self.last = time.monotonic(), str(progress)

    def _state(
        self, states: Sequence[dict[str, Any]], totals: Sequence[Totals]
    ) -> tuple[dict[str, Tensor], list[Any]]:
        """Returns the tensors of this process's stages, and the rest of its optimisers' states."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self._modules().items()
            for key, value in module.state_dict().items()
        }
        for index, total in enumerate(totals, start=self.first):
            for name, value in (("loss", total.loss), ("wrong", total.wrong)):
                if isinstance(value, Tensor):
                    tensors[f"{index}.sums.{name}"] = value
        optimizers = [
            pack(state, f"optimizer.{index}", tensors)
            for index, state in enumerate(states, start=self.first)
        ]
        return tensors, optimizers

    def _write(self, progress: Progress, tensors: dict[str, Tensor], optimizers: list[Any]) -> None:
        schedule = self.schedule
        state = {k: getattr(schedule, k) for k in _PATIENCE if isinstance(schedule, Patience)}
        name = digest_of_parts(file_parts(tensors))
        document = CheckpointRecord(
            progress=progress, schedule=state, optimizers=optimizers, tensors=name
        )
        directory = self.training / CHECKPOINT
        path = directory / f"{name}.safetensors"
        write_parts(path, file_parts(tensors))
        write_whole(directory / PROGRESS_FILE, with_digest(document.model_dump(mode="json")))
        for old in directory.glob("*.safetensors"):
            if old != path:
                old.unlink()

    def _part(self, rank: int) -> Path:
        """Returns the path of the tensors of another process's stages, until a checkpoint has
        them."""
        return self.training / CHECKPOINT / f"process{rank}.safetensors"

    def load_weights(self, learner: Learner) -> None:
        """Loads the weights that the last checkpoint has of a stage, which may be that of another
        process, and of its local heads."""
        document = CheckpointRecord.read(self.training)
        assert document is not None
        tensors = read_tensors(self.training / CHECKPOINT / f"{document.tensors}.safetensors")
        index = learner.stage.number - 1
        for name, module in (("stage", learner.stage), ("heads", learner.heads)):
            module.load_state_dict(_below(f"{index}.{name}.", tensors))

    def load(self) -> tuple[Progress, list[Totals]] | None:
        """Loads the last checkpoint into the strategy and the schedule.

        Returns:
            The position in the training, and each stage's sums if it lies within an epoch; ``None``
            if there is no checkpoint.

        Raises:
            UserError: a file is damaged, or of another stage or optimiser.
        """
        document = CheckpointRecord.read(self.training)
        if document is None:
            return None
        path = document.checked_tensors(self.training)
        try:
            tensors = read_tensors(path)
            self._restore(document, tensors)
        except Exception as error:  # torch raises many types for a file that does not fit
            if is_out_of_memory(error):
                raise TrainingError(
                    f"memory ran out while the checkpoint in {self.training} was loaded, which is "
                    f"whole: free some, or raise --memory-budget, and give the same command again"
                ) from error
            if isinstance(error, OSError):
                raise
            raise damaged_checkpoint(
                path, self.training, "it fits another stage or optimiser"
            ) from error
        progress = document.progress
        self.last, self.before = str(progress), progress.before + progress.seconds
        return progress, self._totals(tensors, progress.rows)

    def _modules(self) -> dict[str, nn.Module]:
        """Returns the modules whose state a checkpoint has, by their names in it."""
        return {
            f"{index}.{name}": module
            for index, learner in enumerate(self.strategy.learners, start=self.first)
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
        optimizers = self.strategy.optimizers
        saved = document.optimizers[self.first :]
        saved = saved[: len(optimizers)] if self.relay.ranks.size > 1 else saved
        for optimizer, packed in zip(optimizers, saved, strict=True):
            state = unpack(packed, tensors)
            _require_same_settings(optimizer, state["param_groups"])
            if type(optimizer) in (*ADAMS, *SGDS):  # others may have tensors that they copy into
                optimizer.state.clear()  # else there would be two of it for a moment
            optimizer.load_state_dict(state)
            _lay_out_like_weights(optimizer)
            # In checkpoints of older versions groups have no first rates: all had the schedule's.
            set_first_rates([optimizer], self.schedule.rate)
            _require_same_shapes(optimizer)
        if isinstance(self.schedule, Patience):
            for name in _PATIENCE:
                setattr(self.schedule, name, document.schedule[name])

    def _totals(self, tensors: dict[str, Tensor], rows: int) -> list[Totals]:
        """Returns each stage's sums, or an empty list if the checkpoint is of an epoch's end."""
        totals = []
        for index, learner in enumerate(self.strategy.learners, start=self.first):
            saved = _below(f"{index}.sums.", tensors)
            sums = {name: tensor.to(learner.device) for name, tensor in saved.items()}
            if "loss" in sums:
                totals.append(Totals(rows, sums["loss"], sums.get("wrong")))
        return totals


RATES = (int, float, Tensor, type(None))  # a group may have none
_PATIENCE = ("best", "waited", "dropped")


def _require_same_settings(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Raises ``ValueError`` if the saved parameter groups have other settings than the optimiser.

    Learning rates may differ, and numbers of optimisers other than Adam, which may change them as
    they train.
    """
    free = {"params", "lr", FIRST}
    for group, saved_group in zip(optimizer.param_groups, saved, strict=True):
        same_names = group.keys() | {FIRST} == saved_group.keys() | {FIRST}
        rates = (saved_group.get(name) for name in ("lr", FIRST))
        if not same_names or not all(isinstance(rate, RATES) for rate in rates):
            raise ValueError("other settings of the optimiser")
        for name in group.keys() - free:
            value, saved_value = group[name], saved_group[name]
            is_number = type(value) is type(saved_value) in (int, float)
            is_fixed = isinstance(optimizer, torch.optim.Adam) or not is_number
            if is_fixed and not (isinstance(value, Tensor) or value == saved_value):
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
    """Raises ``ValueError`` if the moments of an Adam or an SGD have other shapes than their
    parameters: fused ones would compute with them all the same. A parameter without a gradient has
    none."""
    is_adam, scalar = isinstance(optimizer, torch.optim.Adam), torch.Size()
    if not (is_adam or isinstance(optimizer, torch.optim.SGD)):
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state, shape = optimizer.state.get(parameter), parameter.shape
        of_adam = {"step": scalar, "exp_avg": shape, "exp_avg_sq": shape}
        expected = of_adam if is_adam else {"momentum_buffer": shape}
        saved = {name: getattr(value, "shape", shape) for name, value in (state or {}).items()}
        if saved and any(saved.get(name) != expected[name] for name in expected):
            raise ValueError("moments of other parameters")


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
