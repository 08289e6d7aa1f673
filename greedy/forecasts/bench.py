"""Measurement of a machine's speed in training the stages of a recipe: real steps on random data.

Each stage trains from a temporary store as in a run, in the memory mode that the run would
choose, and then computes the output of some rows and writes some. One stage is in memory at a time.
"""

import itertools
import math
import statistics
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from greedy.base.devices import pick_device
from greedy.base.disk_space import write_errors_explained
from greedy.base.errors import UserError
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss, build_network
from greedy.cache import StoreWriter, fit_encoding
from greedy.forecasts.forecast import DataFacts, named_data_facts
from greedy.forecasts.machine import machine
from greedy.forecasts.random_data import random_source
from greedy.memory.choice import Choice
from greedy.memory.plan import MemoryPlan, StageStores
from greedy.models import StageShapes
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding
from greedy.steps.guard import Guard
from greedy.steps.step import Learner
from greedy.steps.strategies import Greedy
from greedy.stores.channels_last import laid_out, takes_channels_last
from greedy.stores.source import EpochBatches, Replayed, Source
from greedy.training.calibration import Measured, Work
from greedy.training.learners import new_learner, new_optimizer
from greedy.training.resolve import compiles, resolve

SIDES = (1024, 2048, 4096)  # of the matrices whose products give the peak
PRODUCTS, PRODUCT_SECONDS = 5, 2.0  # at most, for each side
WRITTEN = 2**27, 2**20  # bytes and rows at most, to measure how fast an output is written


def peak_flops(device: torch.device) -> float:
    """Measures floating-point operations a second: the best, over ``SIDES``, of the median bfloat16
    matrix product, on as many threads as torch uses."""
    best = 0.0
    for side in SIDES:
        if best and 2 * side**3 / best > PRODUCT_SECONDS:
            break  # a processor that has to emulate bfloat16 takes minutes
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
    """The measured speed of a stage.

    Attributes:
        measured: its speed, for the calibration.
        wait_share: the share of a step's time that is spent waiting for its batch, from 0 to 1.
            Decoding and augmenting the batch are part of the step.
    """

    stage: int
    name: str
    measured: Measured
    wait_share: float


@dataclass(frozen=True)
class Bench:
    """Measures the stages of a recipe, one after the other. Make one with ``of``."""

    recipe: Recipe
    data: DataFacts
    device: torch.device
    memory: MemoryPlan

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        device: str = "auto",
        model: nn.Module | None = None,
        allow_function: bool = False,
        data: DataFacts | None = None,
    ) -> Self:
        """Prepares to measure the stages of a recipe. Its data set need not be on this machine if
        it is known by name.

        Args:
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            model: the network, only if the recipe's is ``python`` or what a function returns.
            allow_function: whether a data set ``module:function`` may be called.
            data: the facts about its data set; ``None`` to find them.

        Raises:
            UserError: the recipe cannot be trained as asked, or the data set is not known.
        """
        if recipe.training.strategy != "greedy":
            raise UserError(
                f"stages are measured one at a time and training.strategy is "
                f"{recipe.training.strategy}: add --set training.strategy=greedy"
            )
        place, data = pick_device(device), data or named_data_facts(recipe, allow_function)
        network = model or build_network(recipe.model, data.shape, data.classes, recipe.seed)
        loss = build_loss(recipe.loss)
        computer = machine(recipe, place.type)
        memory = MemoryPlan(
            recipe,
            CutNetwork.of(recipe, network, data.shape, data.classes, loss),
            computer.precision,
            computer.memory_budget_bytes,
            computer.device,
        )
        return cls(recipe, data, place, memory)

    def measure(self, number: int, seconds: float) -> StageSpeed:
        """Trains stage ``number`` for about ``seconds``, at least two steps, then computes its
        output for up to half as long, and writes some of it.

        Raises:
            UserError: its step does not fit the memory budget.
            TrainingError: the disk has no room for its temporary store.
        """
        network, choice = self.memory.network, self.memory.stage(number, StageStores(number - 1))
        shapes = network.shapes[number - 1]
        with TemporaryDirectory(prefix="greedy-bench-") as place:
            source = random_source(
                Path(place) / "source",
                self.recipe,
                number,
                shapes,
                self.data.classes,
                self.data.rows["train"],
                self.device,
            )
            learner = self._learner(number, choice, source)
            waited, computed = self._time_steps(learner, source, shapes, seconds)
            rows = int(seconds / 2 / (waited + computed))
            output, frozen = self._time_frozen(learner, source, rows, choice.write_batch)
            is_stored = number < len(self.memory.network)
            written = self._write_rate(output, Path(place)) if is_stored else None
        memory = learner.memory  # smaller than chosen where that did not fit after all
        choice = replace(choice, mode=memory.mode, micro_batch=memory.micro_batch)
        flops, batch_size = self.memory.flops(number), self.recipe.training.batch_size
        precision = self.memory.precision
        measured = Measured(
            work=Work.of(learner.stage, shapes, precision, choice, flops, batch_size),
            rows_per_second=1 / (waited + computed),
            frozen_rows_per_second=1 / frozen,
            written_bytes_per_second=written,
        )
        return StageSpeed(number, network.name(number), measured, waited / (waited + computed))

    def _learner(self, number: int, choice: Choice, source: Source) -> Learner:
        shapes, rows = self.memory.network.shapes[number - 1], self.data.rows["train"]
        choices = resolve(
            self.recipe,
            source.stores["train"],
            1,
            choice,
            self.device,
            compiled=compiles(self.recipe, number, shapes.hidden, rows, choice, self.device),
            hidden=shapes.hidden,
        )
        learner = new_learner(
            deepcopy(self.memory.network.stages[number - 1]),
            shapes,
            self.memory.loss_of(number),
            self.data.classes,
            self.recipe,
            choices,
            self.device,
            zero=number == len(self.memory.network.stages),
        )
        learner.optimizer = new_optimizer(
            learner.parameters(), self.recipe, number, None, learner.undecayed()
        )
        learner.smaller = partial(self.memory.smaller, number, StageStores(number - 1))
        return learner

    def _time_steps(
        self, learner: Learner, source: Source, shapes: StageShapes, seconds: float
    ) -> tuple[float, float]:
        """Measures the seconds that a row takes: waiting for it, and computing it. The first batch
        of an epoch is not counted, since the store is opened and, in the first epoch, the step
        compiled for it."""
        learner.train()
        rows, waited, computed = 0, 0.0, 0.0
        clip = self.recipe.training.gradient_clip
        strategy, guard, deadline = Greedy(learner), Guard(clip), math.inf
        for epoch in itertools.count():
            asked = time.perf_counter()
            for position, batch in enumerate(self._epoch(source, learner.stage.number, epoch)):
                received = time.perf_counter()
                batch_rows = len(batch.labels)
                mask = learner.mask(self.recipe.seed, batch_rows, shapes.input, epoch, position)
                strategy.step(batch, [mask], guard, position)
                _finish(self.device)
                done = time.perf_counter()
                deadline = min(deadline, done + seconds)
                if position:
                    rows += batch_rows
                    waited += received - asked
                    computed += done - received
                    if done > deadline:
                        return waited / rows, computed / rows
                asked = done
        raise AssertionError("epochs never end")

    def _epoch(self, source: Source, number: int, epoch: int) -> EpochBatches:
        training, data = self.recipe.training, self.recipe.data
        return source.epoch_batches(number, epoch, training.batch_size, data.classes_per_batch)

    def _time_frozen(
        self, learner: Learner, source: Source, rows: int, batch: int
    ) -> tuple[NDArray[np.float32], float]:
        """Measures the seconds that a row takes to be read and computed by the frozen stage. The
        first batch, which is returned, is not counted."""
        learner.release()
        learner.eval()
        channels_last = takes_channels_last(learner.stage, source.device.type)
        stages = laid_out([learner.stage], [channels_last])
        replayed = Replayed(stages, batch, self.memory.precision)
        frozen = replace(source, replayed=replayed, in_memory=False)
        rows = min(max(rows, batch), source.stores["train"].rows)
        first = next(frozen.view_batches("train", 0, batch, stop=min(batch, rows)))
        output = first.inputs().cpu().numpy()
        started = time.perf_counter()
        for computed in frozen.view_batches("train", 0, batch, stop=rows):
            computed.inputs().cpu()
        return output, (time.perf_counter() - started) / rows

    def _write_rate(self, output: NDArray[np.float32], place: Path) -> float:
        """Measures the bytes a second that outputs of a stage, repeated, are written with."""
        fitted = fit_encoding(encoding(self.recipe), output)
        most_bytes, most_rows = WRITTEN
        rows = min(max(1, most_bytes // fitted.stored_row_bytes), most_rows)
        started = time.perf_counter()
        with (
            write_errors_explained(place, "a store to measure with", most_bytes),
            StoreWriter(
                place / "written",
                rows=rows,
                views=1,
                encoding=fitted,
                compressor=self.recipe.store.compressor,
                labels=np.zeros(rows, np.int64),
                index=np.arange(rows),
            ) as writer,
        ):
            for start in range(0, rows, len(output)):
                writer.append(output[: rows - start])
        return writer.summary.disk_bytes / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    """Waits until a device has computed everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
