"""The training of one stage, from its first weights to its finished directory."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from greedy.base.devices import memory_limited, reset_peak_memory, set_determinism
from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.files import bytes_below, read_tensors, read_with_digest, with_digest
from greedy.base.heap import release_free_memory
from greedy.build.cut_network import OUTPUT
from greedy.cache import Encoding, StoreError, location_of, require_writable
from greedy.cache.files import write_whole
from greedy.cache.layout import SHARD_STORED_BYTES
from greedy.losses import LocalLoss
from greedy.memory.choice import Choice, named_budget
from greedy.memory.peaks import OptimizerFactory
from greedy.models import Stage, StageShapes
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.checkpoint_record import StartRecord
from greedy.runs.choices import Choices
from greedy.runs.directory import SPLITS
from greedy.runs.disk_demand import COMPRESSED, UNCOMPRESSED
from greedy.runs.events import EpochReport, Reporter
from greedy.runs.exchange import CHECKPOINT
from greedy.runs.record import ENCODER, HISTORY, STORE, StageRecord, StoreRecord
from greedy.steps.step import Learner
from greedy.steps.strategies import Greedy
from greedy.stores.opening import SourceFinder
from greedy.stores.source import Source
from greedy.stores.writing import fit_output_encoding, place_store, write_split
from greedy.training.checkpoint import Checkpoints, bytes_of_training
from greedy.training.finish import history_line, save_weights, write_record
from greedy.training.following import Task
from greedy.training.learners import new_learner, new_optimizer, new_schedule
from greedy.training.loop import Epochs
from greedy.training.resolve import ample_memory

ENCODING_FILE = "encoding.json"  # beside the checkpoint, while the store is written
SHARDS_ON_DISK = 2 * SHARD_STORED_BYTES  # of a store in object storage: one written, one uploaded


@dataclass
class StageTraining:
    """The training of one stage.

    Attributes:
        stage: the stage, with its first weights.
        source: gives its inputs.
        sources: finds the store from which its own store is written.
        start: what decides the training, and its choices.
        parent: the record of the stage before.
        is_output: whether it is the output layer.
        smaller: chooses the memory of later steps when one has run out of memory; returns ``None``
            if nothing takes less.
        writes_streamed: whether its store is written through frozen stages that are in memory only
            while they compute.
        optimizer: makes the user's optimiser; ``None`` for the recipe's.
        own_rates: whether that begins at its own learning rates.
        written_before: bytes of stores that were written for this stage earlier, for the record.
    """

    stage: Stage
    shapes: StageShapes
    loss: LocalLoss
    recipe: Recipe
    source: Source
    sources: SourceFinder
    start: StartRecord
    parent: StageRecord
    is_output: bool
    device: torch.device
    reporter: Reporter
    smaller: Callable[[Learner], Choice | None]
    writes_streamed: bool = False
    optimizer: OptimizerFactory | None = None
    own_rates: bool = False
    written_before: int = 0

    @property
    def choices(self) -> Choices:
        """The choices with which it trains."""
        return self.start.resolved

    def train(self, directory: Path) -> StageRecord:
        """Trains and freezes the stage and writes it into a directory, which is empty or has an
        unfinished training with the same start, which is resumed. Returns the stage's record."""
        started = time.perf_counter()
        if self._has_store and (stores := self.recipe.store.stores):
            require_writable(stores)  # before it is trained for hours
        self.start.write(directory)
        self.source.ranks.told(Task.of(self.start, directory)._asdict())
        self._set_up()
        reset_peak_memory(self.device)
        with self._memory_limited():
            learner = self._learner()
            needed = self._bytes_needed(learner)
            written = bytes_below(directory)
            written += self.source.ring.drawn_bytes if self.source.ring else 0
            require_free_space(directory, f"stage {self.stage.number}", needed - written)
            with write_errors_explained(directory, f"stage {self.stage.number}", needed):
                return self._train(learner, directory, started)

    def follow(self, directory: Path) -> None:
        """Trains the stage with another process, which leads and has begun in the directory."""
        begun = StartRecord.read(directory)
        assert begun is not None
        self.start = begun
        self._set_up()
        with (
            self._memory_limited(),
            write_errors_explained(directory, f"stage {self.stage.number}"),
        ):
            learner = self._learner()
            for _ in self._epochs(self._checkpoints(learner, directory)):
                pass
            learner.release()
            release_free_memory(self.device)
            self.source.ranks.told()
            self._write_store(learner, directory)

    @contextmanager
    def _memory_limited(self) -> Iterator[None]:
        """Limits the memory of the devices that train and that draw views, each to the budget."""
        budget, drawing = named_budget(self.recipe), self._drawing_device
        with memory_limited(self.device, budget), memory_limited(drawing, budget):
            yield

    @property
    def _drawing_device(self) -> torch.device:
        return self.source.ring.source.device if self.source.ring else self.device

    def _set_up(self) -> None:
        torch.set_num_threads(self.choices.threads)
        for device in (self.device, self._drawing_device):
            set_determinism(device, self.choices.deterministic)

    def _checkpoints(self, learner: Learner, directory: Path) -> Checkpoints:
        return Checkpoints(
            directory,
            Greedy(learner),
            new_schedule(self.recipe, self.stage.number),
            self.recipe.training.checkpoint_minutes,
            self.start,
            writes=self.source.ranks.leads,
        )

    def _train(self, learner: Learner, directory: Path, started: float) -> StageRecord:
        checkpoints = self._checkpoints(learner, directory)
        reports = self._run_epochs(checkpoints)
        self.start = checkpoints.start  # has other choices if memory ran out
        learner.release()
        release_free_memory(self.device)
        save_weights(learner, directory)
        self.source.ranks.told()  # others, which have read the directory, may read the weights
        return write_record(
            directory,
            learner,
            self.shapes,
            reports,
            self.recipe,
            self.choices,
            self.parent,
            source=self.source.number,
            is_output=self.is_output,
            store=self._write_store(learner, directory),
            written_before=self.written_before,
            seconds=checkpoints.before + time.perf_counter() - started,
        )

    def _bytes_needed(self, learner: Learner) -> int:
        """Returns the bytes on disk that the stage takes at most: weights and checkpoints, and the
        store, or before it a new view of the source."""
        views, rows = self.choices.views, self.parent.rows
        store = 0
        if views != "live" and self._has_store:
            plain = self.recipe.store.compressor == "none"
            size = (UNCOMPRESSED if plain else COMPRESSED)[self.choices.encoding]
            values = math.prod(self.shapes.output) * (rows["train"] * views + rows["test"])
            store = math.ceil(size * values)
        if self.recipe.store.stores:
            store = min(store, SHARDS_ON_DISK)
        drawn = 0
        if self.source.ring:
            train = self.source.stores["train"]
            is_elsewhere = location_of(self.source.path / "train") is not None
            drawn = SHARDS_ON_DISK if is_elsewhere else train.disk_bytes // train.views
        return bytes_of_training([learner]) + max(store, drawn)

    @property
    def _has_store(self) -> bool:
        return not self.is_output and self.choices.views != "live"

    @property
    def _batch(self) -> int:
        return self.choices.write_batch

    def _learner(self) -> Learner:
        learner = new_learner(
            self.stage,
            self.shapes,
            self.loss,
            len(self.parent.class_names),
            self.recipe,
            self.choices,
            self.device,
            zero=self.is_output,
        )
        learner.optimizer = new_optimizer(
            learner.parameters(),
            self.recipe,
            self.stage.number,
            self.optimizer,
            learner.undecayed(),
            own_rates=self.own_rates,
            ranks=self.source.ranks,
        )
        learner.smaller = self.smaller
        return learner

    def _run_epochs(self, checkpoints: Checkpoints) -> list[EpochReport]:
        epochs = for_stage(self.recipe.training.epochs, self.stage.number)
        name = OUTPUT if self.is_output else self.stage.name
        self.reporter.stage_started(self.stage.number, name, epochs, self.choices)
        reports = []
        lines = checkpoints.training / HISTORY
        lines.unlink(missing_ok=True)
        with lines.open("x", encoding="utf-8") as history:
            for (report,) in self._epochs(checkpoints):
                history.write(history_line(report))
                history.flush()
                self.reporter.epoch_finished(report)
                reports.append(report)
        return reports

    def _epochs(self, checkpoints: Checkpoints) -> Epochs:
        return Epochs(
            checkpoints.strategy,
            self.source,
            [self.shapes.input],
            checkpoints.schedule,
            self.recipe,
            self.reporter,
            checkpoints,
            self.recipe.training.batch_size,
            ample_memory(self.recipe, self.choices),
        )

    def _write_store(self, learner: Learner, directory: Path) -> StoreRecord | None:
        views = self.choices.views
        if views == "live" or not self._has_store:
            return None
        learner.eval()
        if self.device.type == "cpu":
            # A repair computes with mapped weights, whose alignment can change the last digit.
            learner.stage.load_state_dict(read_tensors(directory / ENCODER), assign=True)
        source = self.sources.for_writing(
            learner.stage, views, self.choices, streamed=self.writes_streamed
        )
        fitted, compressor = self._begin_store(source, directory), self.recipe.store.compressor
        written = {
            split: write_split(
                directory / STORE / split,
                source,
                split,
                numbers=range(views if split == "train" else 1),
                encoding=fitted,
                compressor=compressor,
                batch=self._batch,
                reporter=self.reporter,
                stage=self.stage.number,
                ranks=self.source.ranks,
            )
            for split in SPLITS
        }
        return StoreRecord.from_summaries(
            written,
            self.choices.encoding,
            compressor,
            views,
            source.number,
            ring=self.choices.reuse > 0,
        )

    def _begin_store(self, source: Source, directory: Path) -> Encoding:
        """Decides where the store is and returns its encoding, both in the process that leads."""
        ranks, shape = self.source.ranks, self.shapes.output
        if not ranks.leads:
            return Encoding.from_json(ranks.told(), shape)
        number, seed = self.stage.number, self.recipe.seed
        place_store(directory / STORE, self.recipe.store.stores, number)
        path = directory / CHECKPOINT / ENCODING_FILE
        try:  # that of the shards which an interrupted writer has finished
            fitted = Encoding.from_json(read_with_digest(path), shape)
        except (OSError, ValueError, StoreError):
            fitted = fit_output_encoding(
                self.choices.encoding, source, shape, self._batch, seed, number
            )
            write_whole(path, with_digest(fitted.to_json()))
        ranks.told(fitted.to_json())
        return fitted
