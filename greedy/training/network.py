"""The training of all stages of a network at once, from the images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from greedy.base.devices import memory_limited, reset_peak_memory, set_determinism
from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.files import bytes_below
from greedy.build.cut_network import CutNetwork
from greedy.memory.choice import Choice, named_budget
from greedy.memory.peaks import OptimizerFactory
from greedy.recipes import Recipe
from greedy.runs.checkpoint_record import StartRecord
from greedy.runs.choices import Choices
from greedy.runs.directory import RunDirectory, new_stage
from greedy.runs.events import EpochReport, Reporter
from greedy.runs.record import HISTORY, StageRecord
from greedy.runs.unfinished import find_training
from greedy.steps.strategies import Strategy, together
from greedy.stores.source import Source
from greedy.training.checkpoint import Checkpoints
from greedy.training.finetuning import load_initial
from greedy.training.finish import history_line, save_weights, write_record
from greedy.training.following import Task
from greedy.training.learners import new_learner, new_optimizer, new_schedule
from greedy.training.loop import Epochs
from greedy.training.resolve import ample_memory, resolve


@dataclass
class NetworkTraining:
    """The training of all stages of a run at once.

    Attributes:
        network: the network, with its first weights.
        source: gives the images.
        data: the record of stage 0.
        memory: how a step fits the memory budget.
        optimizer: makes the optimisers; ``None`` for the recipe's.
        own_rates: whether those begin at their own learning rates.
    """

    run: RunDirectory
    network: CutNetwork
    source: Source
    data: StageRecord
    memory: Choice
    device: torch.device
    reporter: Reporter
    optimizer: OptimizerFactory | None = None
    own_rates: bool = False

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.run.recipe

    def train(self) -> list[StageRecord]:
        """Trains all stages in the run's ``network`` directory, or resumes an unfinished training
        there, then puts each stage in its place. Returns the records of all stages."""
        began = time.perf_counter()
        place = self.run.network_dir / "training"
        start = self._start(place)
        self.source.ranks.told(Task()._asdict())
        self._set_up(start.resolved)
        reset_peak_memory(self.device)
        with memory_limited(self.device, named_budget(self.recipe)):
            records = self._train(place, start, began)
        self.run.remove_network_dir()
        return records

    def _train(self, place: Path, start: StartRecord, began: float) -> list[StageRecord]:
        strategy = self._strategy(start.resolved)
        parameters = (p for learner in strategy.learners for p in learner.parameters())
        needed = 7 * 4 * sum(p.numel() for p in parameters)
        require_free_space(place, "the network", needed - bytes_below(place))
        with write_errors_explained(self.run.path, "the network", needed):
            checkpoints = self._checkpoints(strategy, place, start)
            histories = self._run_epochs(checkpoints)
            self.source.ranks.told()  # others have read the directory
            seconds = checkpoints.before + time.perf_counter() - began
            return self._write(strategy, histories, checkpoints.start.resolved, seconds)

    def follow(self) -> None:
        """Trains the stages with another process, which leads and has begun."""
        place = self.run.network_dir / "training"
        start = StartRecord.read(place)
        assert start is not None
        self._set_up(start.resolved)
        with memory_limited(self.device, named_budget(self.recipe)):
            strategy = self._strategy(start.resolved)
            for _ in self._epochs(self._checkpoints(strategy, place, start)):
                pass
        self.source.ranks.told()

    def _set_up(self, choices: Choices) -> None:
        torch.set_num_threads(choices.threads)
        set_determinism(self.device, choices.deterministic)
        self.source = replace(self.source, in_memory=choices.shuffle == "rows")

    def _checkpoints(self, strategy: Strategy, place: Path, start: StartRecord) -> Checkpoints:
        return Checkpoints(
            place,
            strategy,
            new_schedule(self.recipe, 1),
            self.recipe.training.checkpoint_minutes,
            start,
            writes=self.source.ranks.leads,
        )

    def _start(self, place: Path) -> StartRecord:
        """Returns the start of an unfinished training with the same inputs, else a new one."""
        start = StartRecord(
            stage=0,
            recipe_digest=self.data.recipe_digest,
            parent_lineage=self.data.lineage,
            source=0,
            layers=[kind for stage in self.network.stages for kind in stage.kinds],
            resolved=resolve(
                self.recipe,
                self.source.stores["train"],
                "live",
                self.memory,
                self.device,
                fresh=self.data.data_choices.fresh,
                processes=self.source.ranks.on_this_machine,
            ),
        )
        if begun := find_training(self.run.network_dir, start, self.reporter):
            return begun
        place.mkdir(parents=True, exist_ok=True)
        start.write(place)
        return start

    def _strategy(self, choices: Choices) -> Strategy:
        training, count = self.recipe.training, len(self.network.stages)
        load_initial(self.run, self.network.stages)
        learners = [
            new_learner(
                stage,
                shape,
                loss,
                len(self.data.class_names),
                self.recipe,
                choices,
                self.device,
                zero=stage.number == count and training.strategy != "backprop",
            )
            for stage, shape, loss in zip(
                self.network.stages,
                self.network.shapes,
                self.network.losses(training.strategy),
                strict=True,
            )
        ]
        without_decay = {p for learner in learners for p in learner.undecayed()}
        return together(
            training.strategy,
            learners,
            training.accumulate,
            lambda parameters: new_optimizer(
                parameters,
                self.recipe,
                1,
                self.optimizer,
                without_decay,
                own_rates=self.own_rates,
            ),
            exact=training.exact,
        )

    def _run_epochs(self, checkpoints: Checkpoints) -> list[list[EpochReport]]:
        """Trains all epochs. Returns the reports of each stage."""
        training, choices = self.recipe.training, checkpoints.start.resolved
        epochs = training.epochs
        assert isinstance(epochs, int)
        self.reporter.network_started(training.strategy, epochs, choices)
        histories: list[list[EpochReport]] = [[] for _ in self.network.stages]
        paths = [self.run.training_history_path(stage.number) for stage in self.network.stages]
        for path in paths:
            path.unlink(missing_ok=True)
        for reports in self._epochs(checkpoints):
            for history, path, report in zip(histories, paths, reports, strict=True):
                history.append(report)
                with path.open("a", encoding="utf-8") as lines:
                    lines.write(history_line(report))
            self.reporter.network_epoch_finished(reports)
            self.reporter.epoch_finished(reports[-1])
        return histories

    def _epochs(self, checkpoints: Checkpoints) -> Epochs:
        choices = checkpoints.start.resolved
        return Epochs(
            checkpoints.strategy,
            self.source,
            [shape.input for shape in self.network.shapes],
            checkpoints.schedule,
            self.recipe,
            self.reporter,
            checkpoints,
            choices.write_batch,
            ample_memory(self.recipe, choices),
        )

    def _write(
        self,
        strategy: Strategy,
        histories: Sequence[Sequence[EpochReport]],
        choices: Choices,
        seconds: float,
    ) -> list[StageRecord]:
        """Writes every stage as if it had been trained alone, but with the times and memory of the
        whole network."""
        records = [self.data]
        for learner, shape, reports in zip(
            strategy.learners, self.network.shapes, histories, strict=True
        ):
            learner.release()
            with new_stage(self.run.stage_dir(learner.stage.number)) as directory:
                save_weights(learner, directory)
                lines = "".join(map(history_line, reports))
                (directory / HISTORY).write_text(lines, encoding="utf-8")
                record = write_record(
                    directory,
                    learner,
                    shape,
                    reports,
                    self.recipe,
                    choices,
                    records[-1],
                    source=0,
                    is_output=learner is strategy.learners[-1],
                    seconds=seconds,
                )
            records.append(record)
            self.reporter.stage_finished(record)
        return records[1:]
