"""The training of all stages of a network at once, from the images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from greedy.base.devices import memory_limited, reset_peak_memory, set_determinism
from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.files import bytes_below
from greedy.base.ranks import ALONE, Ranks
from greedy.base.relay import Relay
from greedy.base.versions import versions
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
from greedy.steps.step import Learner
from greedy.steps.strategies import Strategy, together
from greedy.stores.source import Source
from greedy.training.checkpoint import Checkpoints, bytes_of_training
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
        own: the positions of the stages that this process trains.
        optimizer: makes the optimisers; ``None`` for the recipe's.
        own_rates: whether those begin at their own learning rates.
        ranks: the processes that train together.
        relay: those of them that each train some of the stages; one for each with a share of every
            batch.
    """

    run: RunDirectory
    network: CutNetwork
    source: Source
    data: StageRecord
    memory: Choice
    device: torch.device
    reporter: Reporter
    own: range
    optimizer: OptimizerFactory | None = None
    own_rates: bool = False
    ranks: Ranks = ALONE
    relay: Relay = field(default_factory=Relay)

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
        self.ranks.told(Task()._asdict())
        self._set_up(start.resolved)
        reset_peak_memory(self.device)
        with memory_limited(self.device, named_budget(self.recipe)):
            records = self._train(place, start, began)
        self.run.remove_network_dir()
        return records

    def _train(self, place: Path, start: StartRecord, began: float) -> list[StageRecord]:
        strategy = self._strategy(start.resolved)
        needed = sum(self.relay.gathered([bytes_of_training(strategy.learners)]))
        require_free_space(place, "the network", needed - bytes_below(place))
        with write_errors_explained(self.run.path, "the network", needed):
            checkpoints = self._checkpoints(strategy, place, start)
            histories = self._run_epochs(checkpoints)
            self.ranks.told()  # others have read the directory
            seconds = checkpoints.before + time.perf_counter() - began
            return self._write(checkpoints, histories, seconds)

    def follow(self) -> None:
        """Trains the stages with another process, which leads and has begun."""
        place = self.run.network_dir / "training"
        start = StartRecord.read(place)
        assert start is not None
        self._set_up(start.resolved)
        with memory_limited(self.device, named_budget(self.recipe)):
            strategy = self._strategy(start.resolved)
            self.relay.gathered([bytes_of_training(strategy.learners)])
            for _ in self._epochs(self._checkpoints(strategy, place, start)):
                pass
        self.ranks.told()

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
            writes=self.ranks.leads,
            relay=self.relay,
            first=self.own.start,
        )

    def _start(self, place: Path) -> StartRecord:
        """Returns the start of an unfinished training with the same inputs, else a new one."""
        start = StartRecord(
            stage=0,
            recipe_digest=self.data.recipe_digest,
            parent_lineage=self.data.lineage,
            source=0,
            layers=[kind for stage in self.network.stages for kind in stage.kinds],
            torch=versions()["torch"],
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
            if named_budget(self.recipe) is None:
                return begun
            # Another number of processes may train it now, for each of which the budget is.
            memory = begun.resolved.model_copy(update=self.memory.recorded())
            start = begun.model_copy(update={"resolved": memory})
        place.mkdir(parents=True, exist_ok=True)
        start.write(place)
        return start

    def _strategy(self, choices: Choices) -> Strategy:
        training = self.recipe.training
        load_initial(self.run, self.network.stages)
        learners = [self._learner(position, choices) for position in self.own]
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
                ranks=self.source.ranks,
            ),
            exact=training.exact,
            relay=self.relay,
        )

    def _learner(self, position: int, choices: Choices) -> Learner:
        """Returns a stage with its first weights, given its position among all stages."""
        strategy, is_last = self.recipe.training.strategy, position == len(self.network) - 1
        return new_learner(
            self.network.stages[position],
            self.network.shapes[position],
            self.network.losses(strategy)[position],
            len(self.data.class_names),
            self.recipe,
            choices,
            self.device,
            zero=is_last and strategy != "backprop",
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
            [self.network.shapes[position].input for position in self.own],
            checkpoints.schedule,
            self.recipe,
            self.reporter,
            checkpoints,
            choices.write_batch,
            ample_memory(self.recipe, choices),
            self.relay,
        )

    def _write(
        self,
        checkpoints: Checkpoints,
        histories: Sequence[Sequence[EpochReport]],
        seconds: float,
    ) -> list[StageRecord]:
        """Writes every stage as if it had been trained alone, but with the times and memory of the
        whole network."""
        records, choices = [self.data], checkpoints.start.resolved
        for position, reports in enumerate(histories):
            learner = self._trained(position, checkpoints)
            with new_stage(self.run.stage_dir(learner.stage.number)) as directory:
                save_weights(learner, directory)
                lines = "".join(map(history_line, reports))
                (directory / HISTORY).write_text(lines, encoding="utf-8")
                record = write_record(
                    directory,
                    learner,
                    self.network.shapes[position],
                    reports,
                    self.recipe,
                    choices,
                    records[-1],
                    source=0,
                    is_output=position == len(self.network) - 1,
                    seconds=seconds,
                )
            records.append(record)
            self.reporter.stage_finished(record)
        return records[1:]

    def _trained(self, position: int, checkpoints: Checkpoints) -> Learner:
        """Returns a trained stage, given its position. Those of other processes have their weights
        in the last checkpoint."""
        if position in self.own:
            learner = checkpoints.strategy.learners[position - self.own.start]
            learner.release()
            return learner
        learner = self._learner(position, checkpoints.start.resolved)
        checkpoints.load_weights(learner)
        return learner
