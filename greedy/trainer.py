"""Training a network stage by stage."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.utils.data import Dataset as TorchDataset

from greedy.base.commands import command
from greedy.base.devices import pick_device
from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.errors import UserError
from greedy.base.heap import release_free_memory
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss, build_network
from greedy.build.python_recipe import python_recipe, require_optimizer
from greedy.cache import Damage
from greedy.data import Dataset, dataset_from_torch, draws_at_random, first_pass
from greedy.losses import LocalLoss, PredSim, require_local_loss
from greedy.recipes import Recipe
from greedy.runs.directory import SPLITS, RunDirectory, new_stage
from greedy.runs.disk_budget import plan_disk, previous_record
from greedy.runs.events import Reporter
from greedy.runs.network import assemble
from greedy.runs.outside import recover_outside
from greedy.runs.record import StageRecord
from greedy.runs.retraining import Retraining
from greedy.runs.unfinished import interrupted_source, stores_needed
from greedy.runs.views import Views
from greedy.stores.changes import is_stage0_current, require_unchanged_folder
from greedy.stores.repair import Repair, StoreRepairer
from greedy.stores.stage0 import drop_unreadable_files, stored_encoding, write_stage0
from greedy.training.planning import StagePlanner
from greedy.training.stage import OptimizerFactory


class GreedyTrainer:
    """Trains a network one stage at a time, each from the store of the one before.

    Args:
        model: an ``nn.Sequential``, flat (it is cut before each convolution or linear layer)
            or staged (a Sequential of Sequentials, each of them a stage), see
            ``greedy.models.cut``. Its weights are the first weights; it is not changed.
        run_dir: the run directory; training resumes where it stopped.
        loss: the local loss of every stage but the output layer.
        optimizer: from parameters to an optimiser; by default Adam at ``learning_rate``. Each
            of its groups begins at its own rate, or at ``learning_rate`` where that is given, and
            the schedule scales it.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        reporter: is told of progress.
        settings: fields of a recipe's ``data``, ``training`` and ``store`` sections by their
            names, ``seed``, ``stage_layers``, ``memory_budget`` and ``optimizer_state``; for
            instance ``epochs=20, views=4``.

    Raises:
        UserError: for anything that cannot be trained as asked.
    """

    def __init__(
        self,
        model: nn.Sequential,
        *,
        run_dir: str | Path,
        loss: LocalLoss | None = None,
        optimizer: OptimizerFactory | None = None,
        device: str = "auto",
        reporter: Reporter | None = None,
        **settings: Any,
    ) -> None:
        loss = PredSim() if loss is None else loss
        require_local_loss(loss)
        require_optimizer(settings, optimizer)
        recipe, own_rates = python_recipe(settings, loss), "learning_rate" not in settings
        self._set_up(recipe, run_dir, device, reporter, model, loss, optimizer, own_rates)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        run_dir: str | Path,
        *,
        device: str = "auto",
        reporter: Reporter | None = None,
        model: nn.Sequential | None = None,
    ) -> Self:
        """The trainer of a recipe. ``model`` only where the recipe's network is ``python``."""
        trainer = cls.__new__(cls)
        trainer._set_up(recipe, run_dir, device, reporter, model, build_loss(recipe.loss))
        return trainer

    def _set_up(
        self,
        recipe: Recipe,
        run_dir: str | Path,
        device: str,
        reporter: Reporter | None,
        model: nn.Sequential | None,
        loss: LocalLoss,
        optimizer: OptimizerFactory | None = None,
        own_rates: bool = False,
    ) -> None:
        self.device = pick_device(device)
        self.run = RunDirectory.create(Path(run_dir), recipe)
        self.recipe = recipe
        self.loss = loss
        self._model = model
        self._planner = StagePlanner(
            self.run, model, loss, self.device, reporter or Reporter(), optimizer, own_rates
        )

    @property
    def reporter(self) -> Reporter:
        """What is told of progress; may be replaced between trainings."""
        return self._planner.reporter

    @reporter.setter
    def reporter(self, reporter: Reporter) -> None:
        self._planner.reporter = reporter

    def fit(
        self, train_set: TorchDataset, test_set: TorchDataset, *, ignore_changes: bool = False
    ) -> list[StageRecord]:
        """Trains every stage on two map-style data sets, see ``greedy.data.dataset_from_torch``,
        which ``prepare`` compares with those that are stored. Returns the records of all
        stages."""
        data = dataset_from_torch(train_set, test_set, background=self.recipe.data.background)
        self.prepare(data, ignore_changes=ignore_changes)
        return self.train()

    def prepare(
        self, dataset: Dataset, *, again: bool = False, ignore_changes: bool = False
    ) -> StageRecord:
        """Writes stage 0; where it is there, only makes sure that it is of these data: of others it
        is written ``again`` if asked to, or kept with ``ignore_changes``. What cannot be trained
        is refused before anything is written, or once the labels are read."""
        self._planner.images = dataset.train
        if is_stage0_current(self.run, dataset, again=again, ignore=ignore_changes):
            return self.run.complete_record(0)
        drawn = draws_at_random(dataset)
        fresh = drawn and self.recipe.data.transforms == "fresh"
        shape, classes = dataset.train.shape, len(dataset.class_names or "")
        model = self._model or build_network(self.recipe.model, shape, classes or 2)
        network = CutNetwork.of(self.recipe, model, shape, classes, self.loss)
        names = [network.name(number) for number in range(1, len(network) + 1)]
        rows = {split: len(getattr(dataset, split)) for split in SPLITS}
        needed = sum(rows.values()) * math.prod(shape) * dataset.train.dtype.itemsize
        require_free_space(self.run.path, "stage 0", needed)
        memory = self._planner.plan_memory(network, stored_encoding(dataset.train).name)
        disk = plan_disk(self.run, network.shapes, rows, needed, self.device.type, fresh=fresh)
        memory.require(range(1, len(network) + 1), disk)
        dataset = drop_unreadable_files(self.recipe, dataset, self.reporter)
        self.run.make_directory()
        with self.run.write_lock():
            if is_stage0_current(self.run, dataset, again=again, ignore=ignore_changes):
                return self.run.complete_record(0)
            output = network.shapes[-1].output if self._model else None
            if drawn:
                dataset = first_pass(dataset, self.recipe.seed)
            with write_errors_explained(self.run.path, "stage 0", needed):
                return write_stage0(self.run, dataset, names, output, drawn=drawn, fresh=fresh)

    def needs_data(self, retrain_from: int | None = None) -> bool:
        """Whether ``train`` needs the data set, by ``prepare``: to write stage 0, or to train on
        images that are drawn again in every pass."""
        if self.run.state(0) != "complete":
            return True
        fresh = self.run.complete_record(0).data_choices.fresh
        return fresh and (retrain_from is not None or not self.run.is_finished)

    def train(self, retrain_from: int | None = None) -> list[StageRecord]:
        """Trains every stage that is not complete; from ``retrain_from`` on, also those that
        are, each once, even if that is cut short and asked for again. Before the first of them it
        is settled which stores the disk has room for; a store that has to go goes once the next
        one is written. What was cut short goes on. Returns the records of all stages."""
        nothing_to_do = retrain_from is None and self.run.is_finished
        if nothing_to_do and not os.access(self.run.path, os.W_OK):
            return self._train(None)
        with self.run.write_lock():
            return self._train(retrain_from)

    def _train(self, retrain_from: int | None) -> list[StageRecord]:
        count = len(self.run.complete_record(0).network)
        if retrain_from is not None:
            self.run.require_stage(retrain_from)
        if self.recipe.training.strategy != "greedy":
            return self._train_network(count, retrain_from)
        retraining = Retraining.plan(self.run.path, retrain_from, self.run.is_stale)
        first = retraining.left if retraining else count + 1
        numbers = range(1, count + 1)
        todo = [n for n in numbers if n >= first or self.run.record(n) is None]
        if not todo:
            self._announce(todo)
            return [self._skip(number) for number in numbers]
        self._planner.require_images()
        plan = self._planner.disk(first)
        self._planner.memory().require(
            todo, plan
        )  # what cannot be trained is refused before anything is
        self._announce(todo)
        self.reporter.disk_planned(plan)
        if retraining:
            retraining.write(self.run.path)
        records = []
        for number in numbers:
            if number == first:
                self.run.drop_stores(*plan.dropped_first)
            if number in todo:
                path, views = self.run.stage_dir(number), plan.views(number)
                record = self._train_stage(number, None, path, views, plan.reuse(number))
            else:
                record = self._skip(number)
            records.append(record)
            due = {n for done in range(1, number + 1) for n in plan.dropped_after(done)}
            self.run.drop_stores(*due.difference(stores_needed(self.run)))
            if retraining and number >= first:
                retraining.mark_done(number, self.run.path, last=number == count)
        return records

    def _train_network(self, count: int, retrain_from: int | None) -> list[StageRecord]:
        """All stages at once."""
        strategy = self.recipe.training.strategy
        if retrain_from not in (None, 1):
            raise UserError(
                f"training by {strategy} trains all stages at once: give --retrain without a stage"
            )
        numbers = range(1, count + 1)
        if self.run.is_finished and retrain_from is None:
            self._announce(())
            return [self._skip(number) for number in numbers]
        self._planner.require_images()
        training = self._planner.whole_network()
        self._announce(numbers)
        return training.train()

    def _announce(self, numbers: Iterable[int]) -> None:
        self.reporter.run_started(self._planner.outline(numbers))

    def _skip(self, number: int) -> StageRecord:
        record = self.run.complete_record(number)
        self.reporter.stage_skipped(record)
        return record

    def train_stage(
        self,
        number: int,
        *,
        source: int | None = None,
        again: bool = False,
        to: Path | None = None,
        ignore_changes: bool = False,
    ) -> StageRecord:
        """Trains one stage from the store of stage ``source``, by default the one before it,
        into ``to``, by default its place in the run. A complete stage is only trained
        ``again`` if asked to, and stays until the new one is whole. No store is deleted, and
        the stage gets the views it had, or else those that ``train`` would give it. Where the
        run's image folder has changed, that is refused without ``ignore_changes``."""
        if not ignore_changes:
            require_unchanged_folder(self.run)
        with self.run.write_lock():
            return self._train_alone(number, source, again, to)

    def _train_alone(
        self, number: int, source: int | None, again: bool, to: Path | None
    ) -> StageRecord:
        self.run.require_stage(number)
        if (strategy := self.recipe.training.strategy) != "greedy":
            raise UserError(
                f"this run trains all stages at once, by {strategy}: use "
                f"{command('train', '--run', self.run.path)}"
            )
        if to is not None and to.resolve() == self.run.stage_dir(number).resolve():
            to = None
        source = number - 1 if source is None else source
        if not 0 <= source < number:
            raise UserError(f"stage {number} cannot train from stage {source}: give an earlier one")
        if not again and to is None and self.run.record(number) is not None:
            self._announce(())
            return self._skip(number)
        parent = self.run.complete_record(number - 1)
        if to is not None and (record := recover_outside(to, parent)):
            self._announce(())
            self.reporter.stage_finished(record)
            return record
        before = previous_record(self.run, number)
        if before:
            views, reuse = before.choices.views, before.choices.reuse
        else:
            plan = self._planner.disk()
            views, reuse = plan.views(number), plan.reuse(number)
        self._announce([number])
        return self._train_stage(number, source, to or self.run.stage_dir(number), views, reuse)

    def _train_stage(
        self, number: int, source: int | None, directory: Path, views: Views, reuse: int
    ) -> StageRecord:
        source = interrupted_source(self.run, number, directory) if source is None else source
        training = self._planner.stage(number, source, views, reuse, directory)
        before = previous_record(self.run, number)
        if before and directory == self.run.stage_dir(number):
            training.written_before = before.bytes_written
        full = write_errors_explained(self.run.path, f"stage {number}")
        with full, new_stage(directory, resume=True) as place:
            record = training.train(place)
        del training  # its weights, and the store where that was held in memory
        release_free_memory(self.device)
        self.reporter.stage_finished(record)
        return record

    def repair(
        self, numbers: Iterable[int], *, dropped: bool = False
    ) -> tuple[list[Repair], list[Damage]]:
        """Computes again what is damaged in the stores of stages, and stores that were dropped if
        asked to; returns what was done and what is damaged still. See ``greedy.stores.repair``."""
        with self.run.write_lock():
            network = self._planner.network()
            repairer = StoreRepairer(
                self.run, network.stages, self.device, self.reporter, self._planner.images
            )
            found = [repairer.repair(number, dropped=dropped) for number in numbers]
        return [r for done, _ in found for r in done], [d for _, left in found for d in left]

    def assemble(self, until_stage: int | None = None) -> nn.Sequential:
        """The trained network, see ``greedy.runs.network.assemble``."""
        return assemble(self.run, self.loss, self._model, until_stage=until_stage)
