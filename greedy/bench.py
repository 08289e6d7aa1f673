"""How fast a machine trains the stages of a recipe: real steps on random data.

Each stage trains from a temporary store as in a run, in the memory mode that the run would
choose, and then computes and writes the output of some rows. One stage is in memory at a time.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import torch
from torch import nn

from greedy.build import build_loss, build_network, checked_shapes
from greedy.cache import StoreWriter, fit_encoding
from greedy.calibration import Measured, Work
from greedy.devices import pick_device
from greedy.errors import UserError
from greedy.forecast import DataFacts, Machine, machine, named_data_facts
from greedy.losses import Output
from greedy.memory.choice import Choice, choose, fused_adam, stored_row_bytes
from greedy.memory.peaks import StepDemand
from greedy.models import Stage, StageShapes, cut, initialise, seeded
from greedy.random_data import random_source
from greedy.recipes import Recipe
from greedy.seeds import torch_generator
from greedy.source import Epoch, Source
from greedy.training.guard import Guard
from greedy.training.host_adam import HostAdam
from greedy.training.modes import Mode, StepMemory
from greedy.training.resolve import encoding, for_stage
from greedy.training.step import Learner, step

SIDES = (1024, 2048, 4096)  # of the matrix products that stand for the peak
PRODUCTS, PRODUCT_SECONDS = 5, 2.0  # at most of each


def peak_flops(device: torch.device) -> float:
    """Floating-point operations a second: the best, over ``SIDES``, of the median bfloat16 matrix
    product, on as many threads as torch uses."""
    best = 0.0
    for side in SIDES:
        a, b = (torch.randn((side, side), device=device).bfloat16() for _ in range(2))
        times: list[float] = []
        while len(times) <= PRODUCTS and sum(times) < PRODUCT_SECONDS:
            started = time.perf_counter()
            torch.matmul(a, b)
            _finish(device)
            times.append(time.perf_counter() - started)
        best = max(best, 2 * side**3 / statistics.median(times[1:] or times))  # the first warms up
    return best


@dataclass(frozen=True)
class StageSpeed:
    """What was measured of a stage. ``wait_share`` is, of a step's time, the share between asking
    for a batch and having it; decoding and augmenting it are part of the step."""

    stage: int
    name: str
    measured: Measured
    wait_share: float


@dataclass(frozen=True)
class Bench:
    """The stages of a recipe, to be measured one after the other. Make one with ``of``."""

    recipe: Recipe
    data: DataFacts
    device: torch.device
    machine: Machine
    stages: Sequence[Stage]
    shapes: Sequence[StageShapes]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        device: str = "auto",
        model: nn.Sequential | None = None,
        allow_function: bool = False,
    ) -> Self:
        """The data set need not be there, see :func:`greedy.forecast.named_data_facts`. ``model``
        only where the recipe's network is ``python``. Raises ``UserError`` for what could not be
        trained as asked."""
        if recipe.training.strategy != "greedy":
            raise UserError(
                f"stages are measured one at a time and training.strategy is "
                f"{recipe.training.strategy}: add --set training.strategy=greedy"
            )
        place, data = pick_device(device), named_data_facts(recipe, allow_function)
        stages = cut(model or build_network(recipe.model, data.shape, data.classes))
        shapes = checked_shapes(recipe, stages, data.shape, data.classes)
        return cls(recipe, data, place, machine(recipe, place.type), stages, shapes)

    def name(self, number: int) -> str:
        """Of a stage, as in a plan."""
        return "output" if number == len(self.stages) else self.stages[number - 1].name

    def measure(self, number: int, seconds: float) -> StageSpeed:
        """Trains stage ``number`` for about so many seconds, in two steps at least, and then
        computes and writes its output for up to half as long.

        Raises ``UserError`` where its step does not fit the memory budget, ``TrainingError`` where
        the disk has no room for its temporary store.
        """
        demand = self._demand(number)
        choice, flops = self._choice(demand), demand.flops()
        learner = self._learner(demand, choice)
        with TemporaryDirectory(prefix="greedy-bench-") as place:
            source = random_source(
                Path(place) / "source",
                self.recipe,
                number,
                demand.shapes,
                self.data.classes,
                self.data.rows["train"],
                demand.precision,
                self.device,
            )
            waited, computed = self._time_steps(learner, source, demand, seconds)
            rows = int(seconds / 2 / (waited + computed))
            frozen = self._time_frozen(learner, source, rows, choice.write_batch, Path(place))
        memory = learner.memory  # smaller than chosen where that did not fit after all
        choice = replace(choice, mode=memory.mode, micro_batch=memory.micro_batch)
        what = (demand.stage, demand.shapes, demand.precision, choice)
        measured = Measured(
            work=Work.of(*what, flops, demand.batch_size),
            rows_per_second=1 / (waited + computed),
            frozen_rows_per_second=1 / frozen,
        )
        return StageSpeed(number, self.name(number), measured, waited / (waited + computed))

    def _demand(self, number: int) -> StepDemand:
        loss, shapes = build_loss(self.recipe.loss), self.shapes[number - 1]
        return StepDemand(
            deepcopy(self.stages[number - 1]),
            shapes,
            Output(loss.output_scale) if number == len(self.stages) else loss,
            self.data.classes,
            self.recipe.training.batch_size,
            self.machine.precision,
            fused_adam if self.machine.optimizer_state == "device" else None,
            self.machine.device,
            stored_row_bytes(number, shapes, self.recipe),
        )

    def _choice(self, demand: StepDemand) -> Choice:
        return choose(
            demand.stage,
            demand.shapes,
            demand.loss,
            demand.num_classes,
            demand.batch_size,
            demand.precision,
            demand.stored_row_bytes,
            self.machine.memory_budget_bytes,
            self.machine.optimizer_state,
            demand.device_type,
        )

    def _learner(self, demand: StepDemand, choice: Choice) -> Learner:
        number, seed = demand.stage.number, self.recipe.seed
        initialise(demand.stage, seed, is_output=number == len(self.stages))
        with seeded(seed, number, "heads"):
            heads = demand.loss.heads(demand.shapes.hidden, demand.num_classes)
        learner = Learner(
            demand.stage.to(self.device),
            heads.to(self.device),
            demand.loss,
            demand.num_classes,
            demand.precision,
            memory=StepMemory(Mode(choice.mode), choice.micro_batch),
        )
        rate = for_stage(self.recipe.training.learning_rate, number)
        learner.optimizer = (
            torch.optim.Adam(learner.parameters(), lr=rate, fused=True)
            if self.machine.optimizer_state == "device"
            else HostAdam(learner.parameters(), lr=rate)
        )
        return learner

    def _time_steps(
        self, learner: Learner, source: Source, demand: StepDemand, seconds: float
    ) -> tuple[float, float]:
        """Seconds a row, waiting for it and computing it. The first batch of an epoch warms up: the
        store is opened and read ahead then."""
        learner.train()
        rows, waited, computed = 0, 0.0, 0.0
        guard, deadline = Guard(), time.perf_counter() + seconds
        for epoch in itertools.count():
            asked = time.perf_counter()
            for position, batch in enumerate(self._epoch(source, learner.stage.number, epoch)):
                had = time.perf_counter()
                mask = self._mask(learner, demand, len(batch.labels), epoch, position)
                step(learner, replace(batch, mask=mask), guard, position)
                _finish(self.device)
                done = time.perf_counter()
                if position:
                    rows += len(batch.labels)
                    waited += had - asked
                    computed += done - had
                    if done > deadline:
                        return waited / rows, computed / rows
                asked = done
        raise AssertionError("epochs never end")

    def _epoch(self, source: Source, number: int, epoch: int) -> Epoch:
        training, data = self.recipe.training, self.recipe.data
        return source.epoch(number, epoch, training.batch_size, data.classes_per_batch)

    def _mask(
        self, learner: Learner, demand: StepDemand, rows: int, epoch: int, position: int
    ) -> torch.Tensor | None:
        stage = learner.stage
        if stage.dropout is None:
            return None
        generator = torch_generator(self.recipe.seed, "dropout", stage.number, epoch, position)
        mask = stage.dropout.mask(rows, demand.shapes.input, generator)
        return mask.to(self.device, non_blocking=True)

    def _time_frozen(
        self, learner: Learner, source: Source, rows: int, batch: int, place: Path
    ) -> float:
        """Seconds a row: read, computed by the frozen stage, encoded and written. The first batch
        warms up and gives the encoding its ranges."""
        learner.release()
        learner.eval()
        frozen = replace(source, replayed=[learner.stage])
        rows = min(max(rows, batch), source.stores["train"].rows)
        first, _ = next(frozen.view("train", 0, batch, stop=min(batch, rows)))
        form = fit_encoding(encoding(self.recipe), first.cpu().numpy())
        started = time.perf_counter()
        with StoreWriter(
            place / "frozen",
            rows=rows,
            views=1,
            encoding=form,
            compressor=self.recipe.store.compressor,
            labels=np.zeros(rows, np.int64),
            index=np.arange(rows),
        ) as writer:
            for outputs, _ in frozen.view("train", 0, batch, stop=rows):
                writer.append(outputs.cpu().numpy())
            taken = time.perf_counter() - started  # closing a store does not grow with its rows
        return taken / rows


def _finish(device: torch.device) -> None:
    """Waits for what a device still computes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
