"""Training a network stage by stage."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self, Unpack

from torch import nn
from torch.utils.data import Dataset as TorchDataset

from greedy.base.commands import command
from greedy.base.devices import pick_device, pick_refresh_device, usual_modes
from greedy.base.disk_space import write_errors_explained
from greedy.base.errors import UserError
from greedy.base.heap import release_free_memory
from greedy.base.ranks import Ranks
from greedy.build.python_recipe import recipe_and_loss
from greedy.build.settings import TrainerSettings
from greedy.cache import Damage
from greedy.data import Dataset, dataset_from_torch
from greedy.losses import LocalLoss
from greedy.recipes import Recipe
from greedy.runs.directory import RunDirectory, new_stage
from greedy.runs.disk_budget import previous_record
from greedy.runs.events import Reporter
from greedy.runs.network import assemble
from greedy.runs.outside import recover_outside
from greedy.runs.record import StageRecord
from greedy.runs.retraining import Retraining
from greedy.runs.state import RunState
from greedy.runs.unfinished import interrupted_source, stores_needed
from greedy.runs.views import Views
from greedy.stores.changes import require_unchanged_folder
from greedy.stores.repair import Repair, StoreRepairer
from greedy.training.following import Parallel, Task, require_parallel, require_same_directory
from greedy.training.images import needs_images, write_images
from greedy.training.planning import StagePlanner
from greedy.training.stage import OptimizerFactory


class GreedyTrainer:
    """Trains a network one stage at a time, each from the store of the one before.

    Args:
        model: an ``nn.Sequential``, flat (it is cut before each convolution or linear layer)
            or staged (a Sequential of Sequentials, each of them a stage), see
            ``greedy.models.cut``; or another module, see ``greedy.models.sequential``. Its weights
            are the first weights; it is not changed.
        run_dir: the run directory; training resumes where it stopped.
        loss: the local loss of every stage but the output layer.
        optimizer: ``adam``, ``adamw`` or ``sgd``, at ``learning_rate``; or your own, from
            parameters to an optimiser. Each of its groups begins at its own rate, or at
            ``learning_rate`` where that is given, and the schedule scales it.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        refresh_device: draws new views of a store beside the training from it: ``cpu``, ``mps``,
            ``cuda`` or a GPU's number, as ``cuda:1``; ``None`` for ``device``, between steps.
        reporter: gets the events of a training, for instance to show its progress.
        parallel: what several processes divide: ``data``, the rows of a batch, or ``stages``.
        settings: fields of a recipe's ``data``, ``training`` and ``store`` sections by their
            names, ``seed``, ``stage_layers``, ``stages``, ``label_smoothing``, ``class_weights``,
            ``memory_budget``, ``micro_batch`` and ``optimizer_state``, such as ``epochs=20``.
        recipe: in place of ``loss``, ``optimizer`` and ``settings``, see ``from_recipe``.

    Raises:
        UserError: for anything that cannot be trained as asked.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        run_dir: str | Path,
        loss: LocalLoss | None = None,
        optimizer: OptimizerFactory | str | None = None,
        device: str = "auto",
        refresh_device: str | None = None,
        reporter: Reporter | None = None,
        parallel: Parallel = "data",
        recipe: Recipe | None = None,
        **settings: Unpack[TrainerSettings],
    ) -> None:
        self.recipe, self.loss = recipe_and_loss(recipe, loss, optimizer, settings)
        self.device = pick_device(device)
        beside = pick_refresh_device(refresh_device, self.device)
        self.run = RunDirectory.create(Path(run_dir), self.recipe)
        self.ranks = Ranks.joined()
        self._planner = StagePlanner(
            self.run,
            model,
            self.loss,
            self.device,
            reporter or Reporter(),
            None if isinstance(optimizer, str) else optimizer,
            own_rates="learning_rate" not in settings,
            ranks=self.ranks,
            refresh_device=beside,
            parallel=parallel,
        )
        require_parallel(self.recipe, self.ranks, parallel)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        run_dir: str | Path,
        *,
        device: str = "auto",
        refresh_device: str | None = None,
        reporter: Reporter | None = None,
        model: nn.Module | None = None,
        parallel: Parallel = "data",
    ) -> Self:
        """Returns the trainer of a recipe. ``model`` is given only if the recipe's network is
        ``python`` or what a function returns; other arguments are those of the class."""
        return cls(
            model,
            run_dir=run_dir,
            device=device,
            refresh_device=refresh_device,
            reporter=reporter,
            parallel=parallel,
            recipe=recipe,
        )

    @property
    def reporter(self) -> Reporter:
        """The reporter, which gets the events of a training; may be replaced between trainings."""
        return self._planner.reporter

    @reporter.setter
    def reporter(self, reporter: Reporter) -> None:
        self._planner.reporter = reporter

    def fit(
        self, train_set: TorchDataset, test_set: TorchDataset, *, ignore_changes: bool = False
    ) -> list[StageRecord]:
        """Writes stage 0 and trains every stage, as ``prepare`` and ``train`` do.

        Args:
            train_set: a map-style data set, see ``greedy.data.dataset_from_torch``.
            test_set: another one.
            ignore_changes: whether to use the stored images although the data sets have changed.

        Returns:
            The records of all stages.
        """
        data = dataset_from_torch(train_set, test_set, background=self.recipe.data.background)
        self.prepare(data, ignore_changes=ignore_changes)
        return self.train()

    @usual_modes()
    def prepare(
        self, dataset: Dataset, *, again: bool = False, ignore_changes: bool = False
    ) -> StageRecord:
        """Writes stage 0, or checks that the one that is there has these data.

        Args:
            dataset: the data.
            again: whether to write stage 0 again if the data have changed.
            ignore_changes: whether to keep stage 0 if the data have changed.

        Returns:
            The record of stage 0.

        Raises:
            UserError: the data have changed, or network or data cannot be trained on, which is
                checked before anything is written and once the labels are read.
        """
        self._planner.images = dataset.train
        if self.ranks.leads:
            write_images(self._planner, dataset, again=again, ignore=ignore_changes)
        require_same_directory(self.run.path, self.ranks)
        return RunState.read(self.run).complete_record(0)

    def needs_data(self, retrain_from: int | None = None) -> bool:
        """Whether ``train`` needs the data set, by ``prepare``: to write stage 0, or to train on
        images that are drawn again in every pass."""
        needed = self.ranks.leads and needs_images(self.run, again=retrain_from is not None)
        return bool(self.ranks.told(needed))

    @usual_modes()
    def train(self, retrain_from: int | None = None) -> list[StageRecord]:
        """Trains every stage that is not complete, or resumes its training.

        Before that it is decided which stores the disk has room for; a store without room is
        deleted once the next one is written.

        Args:
            retrain_from: also train complete stages again, from this one on. If that is interrupted
                and asked for again, only those stages are trained that are left.

        Returns:
            The records of all stages.
        """
        if not self._leads():
            state = RunState.read(self.run)
            numbers = range(1, len(state.complete_record(0).network) + 1)
            return [state.complete_record(number) for number in numbers]
        records = self._lead(retrain_from)
        self.ranks.told()
        return records

    def _leads(self) -> bool:
        """Returns whether this process leads; one that does not trains until that has finished."""
        require_same_directory(self.run.path, self.ranks)
        while not self.ranks.leads and (task := self.ranks.told()):
            self._planner.follow(Task(**task))
        return self.ranks.leads

    def _lead(self, retrain_from: int | None) -> list[StageRecord]:
        if retrain_from is None and not os.access(self.run.path, os.W_OK):
            state = RunState.read(self.run)
            if state.is_finished:
                return self._train(state, None)
        with self.run.write_lock():
            return self._train(RunState.read(self.run), retrain_from)

    def _train(self, state: RunState, retrain_from: int | None) -> list[StageRecord]:
        count = len(state.complete_record(0).network)
        if retrain_from is not None:
            state.require_stage(retrain_from)
        if self.recipe.training.strategy != "greedy":
            return self._train_network(state, retrain_from)
        retraining = Retraining.plan(self.run.path, retrain_from, state.is_stale, state.seconds)
        first = retraining.left if retraining else count + 1
        numbers = range(1, count + 1)
        todo = [n for n in numbers if n >= first or state.record(n) is None]
        if not todo and not retraining:
            self._announce(state, todo)
            return [self._skip(state, number) for number in numbers]
        self._planner.require_images(state)
        plan = self._planner.disk(state, first)
        # What cannot be trained is refused before anything is.
        self._planner.memory(state).require(todo, plan)
        self._announce(state, todo)
        self.reporter.disk_planned(plan)
        self._planner.note_drawing(plan.reuse(plan.source(number)) > 0 for number in todo)
        if retraining:
            retraining.write(self.run.path)
        for number in numbers:
            if number == first:
                self.run.drop_stores(*plan.dropped_first)
                state = state.read_again(*plan.dropped_first)
            if number in todo:
                path, views = self.run.stage_dir(number), plan.views(number)
                self._train_stage(state, number, None, path, views, plan.reuse(number))
            else:
                self._skip(state, number)
            due = {n for done in range(1, number + 1) for n in plan.dropped_after(done)}
            due -= stores_needed(self.run)
            self.run.drop_stores(*due)
            state = state.read_again(number, *due)
            if retraining and first <= number < count:
                retraining.mark_done(number, self.run.path, state.seconds(number + 1))
        if retraining:
            retraining.end(self.run.path)
        state = RunState.read(self.run)  # a later stage has replaced views of a store
        return [state.complete_record(number) for number in numbers]

    def _train_network(self, state: RunState, retrain_from: int | None) -> list[StageRecord]:
        """Trains all stages at once."""
        strategy = self.recipe.training.strategy
        if retrain_from not in (None, 1):
            raise UserError(
                f"training by {strategy} trains all stages at once: give --retrain without a stage"
            )
        numbers = range(1, len(state.complete_record(0).network) + 1)
        if state.is_finished and retrain_from is None:
            self._announce(state, ())
            return [self._skip(state, number) for number in numbers]
        self._planner.require_images(state)
        training = self._planner.whole_network(state)
        self._announce(state, numbers)
        self._planner.note_drawing(())
        return training.train()

    def _announce(self, state: RunState, numbers: Iterable[int]) -> None:
        self.reporter.run_started(self._planner.outline(state, numbers))

    def _skip(self, state: RunState, number: int) -> StageRecord:
        record = state.complete_record(number)
        self.reporter.stage_skipped(record)
        return record

    @usual_modes()
    def train_stage(
        self,
        number: int,
        *,
        source: int | None = None,
        again: bool = False,
        to: Path | None = None,
        ignore_changes: bool = False,
    ) -> StageRecord:
        """Trains one stage. No store is deleted, and the stage gets as many views as it had, or as
        ``train`` would give it.

        Args:
            number: the number of the stage.
            source: the stage from whose store it is trained, by default the one before it.
            again: whether to train a complete stage again; it stays until the new one is complete.
            to: the directory of the stage, by default its place in the run.
            ignore_changes: whether to use the stored images although their folder has changed.

        Returns:
            The record of the stage.

        Raises:
            UserError: the stage cannot be trained as asked, or the folder of the images has
                changed.
        """
        if not self._leads():
            return StageRecord.read(to or self.run.stage_dir(number))
        if not ignore_changes:
            require_unchanged_folder(self.run)
        with self.run.write_lock():
            record = self._train_alone(RunState.read(self.run), number, source, again, to)
        self.ranks.told()
        return record

    def _train_alone(
        self, state: RunState, number: int, source: int | None, again: bool, to: Path | None
    ) -> StageRecord:
        state.require_stage(number)
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
        if not again and to is None and state.record(number) is not None:
            self._announce(state, ())
            return self._skip(state, number)
        parent = state.complete_record(number - 1)
        if to is not None and (record := recover_outside(to, parent)):
            self._announce(state, ())
            self.reporter.stage_finished(record)
            return record
        if before := previous_record(state, number):
            views, reuse = before.choices.views, before.choices.reuse
        else:
            plan = self._planner.disk(state)
            views, reuse = plan.views(number), plan.reuse(number)
        self._announce(state, [number])
        directory = to or self.run.stage_dir(number)
        self._planner.note_drawing([self._planner.replaces_views(state, source)])
        return self._train_stage(state, number, source, directory, views, reuse)

    def _train_stage(
        self,
        state: RunState,
        number: int,
        source: int | None,
        directory: Path,
        views: Views,
        reuse: int,
    ) -> StageRecord:
        source = interrupted_source(state, number, directory) if source is None else source
        training = self._planner.stage(state, number, source, views, reuse, directory)
        if (before := previous_record(state, number)) and directory == self.run.stage_dir(number):
            training.written_before = before.bytes_written
        full = write_errors_explained(self.run.path, f"stage {number}")
        with full, new_stage(directory, resume=True) as place:
            record = training.train(place)
        del training  # its weights, and the store where that was held in memory
        release_free_memory(self.device)
        self.reporter.stage_finished(record)
        return record

    @usual_modes()
    def repair(
        self, numbers: Iterable[int], *, dropped: bool = False
    ) -> tuple[list[Repair], list[Damage]]:
        """Computes damaged parts of stores again, see ``greedy.stores.repair``.

        Args:
            numbers: the numbers of the stages.
            dropped: whether to write stores again that were dropped.

        Returns:
            The repairs, and the damage that is left.
        """
        with self.run.write_lock():
            state = RunState.read(self.run)
            network = self._planner.network(state)
            place = self.device, self.reporter, self._planner.images
            repairer = StoreRepairer(state, network.stages, *place)
            results = [repairer.repair(number, dropped=dropped) for number in numbers]
        repairs = [repair for stage_repairs, _ in results for repair in stage_repairs]
        return repairs, [damage for _, remaining in results for damage in remaining]

    def assemble(self, until_stage: int | None = None) -> nn.Sequential:
        """Returns the trained network, see ``greedy.runs.network.assemble``."""
        return assemble(self.run, self.loss, self._planner.model, until_stage=until_stage)
