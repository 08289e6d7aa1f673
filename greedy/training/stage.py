"""One stage from its first weights to its finished directory."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from greedy.cache.files import write_whole
from greedy.devices import describe, peak_memory
from greedy.disk import COMPRESSED, UNCOMPRESSED
from greedy.files import bytes_below, canonical, digest, file_digest
from greedy.losses import LocalLoss
from greedy.manifest import ENCODER, HEADS, HISTORY, Metrics, Parent, StageRecord, StoreRecord
from greedy.memory.peaks import OptimizerFactory
from greedy.models import Stage, StageShapes, initialise, seeded
from greedy.recipes import Recipe
from greedy.reporting import EpochReport, Reporter
from greedy.runs import SPLITS
from greedy.source import Source
from greedy.sourcing import Sources
from greedy.space import require_room, until_full
from greedy.training.checkpoint import Checkpoints, Start
from greedy.training.freeze import fit, write_split
from greedy.training.host_adam import HostAdam
from greedy.training.loop import Epochs, measure
from greedy.training.modes import Mode, StepMemory
from greedy.training.resolve import for_stage
from greedy.training.schedule import Milestones, Patience, Schedule
from greedy.training.step import Learner
from greedy.versions import versions


@dataclass
class StageTraining:
    """All that training one stage takes. ``train`` makes the stage in a directory.

    ``written_before`` are bytes of the stores that this one replaces, for the record.
    """

    stage: Stage
    shapes: StageShapes
    loss: LocalLoss
    recipe: Recipe
    source: Source
    sources: Sources
    start: Start
    parent: StageRecord
    is_output: bool
    device: torch.device
    reporter: Reporter
    optimizer: OptimizerFactory | None = None
    written_before: int = 0

    @property
    def resolved(self) -> dict[str, Any]:
        """The choices made for it."""
        return self.start.resolved

    def train(self, directory: Path) -> StageRecord:
        """Trains, freezes and writes the stage into a directory that is empty, or holds what an
        interrupted training from the same start left."""
        started = time.perf_counter()
        self.start.write(directory)
        torch.set_num_threads(self.resolved["threads"])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        learner = self._learner()
        needed = self._room(learner)
        require_room(directory, f"stage {self.stage.number}", needed - bytes_below(directory))
        with until_full(directory, f"stage {self.stage.number}", needed):
            return self._train(learner, directory, started)

    def _train(self, learner: Learner, directory: Path, started: float) -> StageRecord:
        checkpoints = Checkpoints(
            directory,
            learner,
            self._schedule(),
            self.recipe.training.checkpoint_minutes,
            self.start,
        )
        reports = self._run_epochs(learner, checkpoints)
        learner.release()
        self._save(learner, directory)
        test = measure(learner, self.source.view("test", 0, self._batch))
        store = self._write_store(learner, directory)
        last = reports[-1]
        record = StageRecord(
            stage=self.stage.number,
            name="output" if self.is_output else self.stage.name,
            lineage=self._lineage(directory),
            recipe=self.parent.recipe,
            layers=self.stage.kinds,
            parent=Parent(stage=self.parent.stage, lineage=self.parent.lineage),
            source=self.source.number,
            row_shape=self.shapes.output,
            class_names=self.parent.class_names,
            network=self.parent.network,
            resolved=self.resolved,
            metrics=Metrics(
                train_error_percent=last.train_error_percent,
                test_error_percent=test.error_percent,
                train_loss=last.loss,
            ),
            store=store,
            written_before=self.written_before,
            rows=self.parent.rows,
            seconds=checkpoints.before + time.perf_counter() - started,
            peak_memory_bytes=peak_memory(self.device),
            versions=versions(),
            device=describe(self.device),
        )
        return record.write(directory)

    def _room(self, learner: Learner) -> int:
        """Bytes on disk, at most: weights, two checkpoints with an optimiser's two numbers a
        weight, and the store, or before it the views of the source drawn anew."""
        weights = sum(4 * p.numel() for p in learner.parameters())
        views, rows = self.resolved["views"], self.parent.rows
        store = refreshed = 0
        if not self.is_output and views != "live":
            plain = self.recipe.store.compressor == "none"
            size = (UNCOMPRESSED if plain else COMPRESSED)[self.resolved["encoding"]]
            values = math.prod(self.shapes.output) * (rows["train"] * views + rows["test"])
            store = math.ceil(size * values)
        if self.source.refresh is not None:
            refreshed = bytes_below(self.source.path / "train")
        return 7 * weights + max(store, refreshed)

    @property
    def _batch(self) -> int:
        return self.resolved["write_batch"]

    def _learner(self) -> Learner:
        number, seed = self.stage.number, self.recipe.seed
        num_classes = len(self.parent.class_names)
        initialise(self.stage, seed, is_output=self.is_output)
        with seeded(seed, number, "heads"):
            heads = self.loss.heads(self.shapes.hidden, num_classes)
        learner = Learner(
            self.stage.to(self.device),
            heads.to(self.device),
            self.loss,
            num_classes,
            self.resolved["precision"],
            memory=StepMemory(Mode(self.resolved["memory_mode"]), self.resolved["micro_batch"]),
        )
        learner.optimizer = self._make_optimizer(learner.parameters())
        return learner

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer(parameters)
        rate = for_stage(self.recipe.training.learning_rate, self.stage.number)
        if self.recipe.memory.optimizer_state == "host":
            return HostAdam(parameters, lr=rate)
        return torch.optim.Adam(parameters, lr=rate, fused=True)

    def _schedule(self) -> Schedule:
        training, number = self.recipe.training, self.stage.number
        rate = for_stage(training.learning_rate, number)
        if training.patience:
            return Patience(rate, training.lr_decay, training.patience)
        milestones = training.milestones or []
        if milestones and isinstance(milestones[0], list):
            milestones = milestones[number - 1]
        return Milestones(rate, training.lr_decay, milestones)

    def _run_epochs(self, learner: Learner, checkpoints: Checkpoints) -> list[EpochReport]:
        training = self.recipe.training
        epochs = for_stage(training.epochs, self.stage.number)
        name = "output" if self.is_output else self.stage.name
        self.reporter.stage_started(self.stage.number, name, epochs, self.resolved)
        reports = []
        lines = checkpoints.training / HISTORY
        lines.unlink(missing_ok=True)
        with lines.open("x", encoding="utf-8") as history:
            for report in Epochs(
                learner,
                self.source,
                self.shapes.input,
                checkpoints.schedule,
                epochs,
                training.batch_size,
                self.recipe.data.classes_per_batch,
                self.recipe.seed,
                self.reporter,
                checkpoints,
            ):
                history.write(json.dumps(asdict(report)) + "\n")
                history.flush()
                self.reporter.epoch_finished(report)
                reports.append(report)
        return reports

    def _save(self, learner: Learner, directory: Path) -> None:
        for name, module in ((ENCODER, learner.stage), (HEADS, learner.heads)):
            tensors = {k: v.contiguous().cpu() for k, v in module.state_dict().items()}
            write_whole(directory / name, safetensors.torch.save(tensors))

    def _write_store(self, learner: Learner, directory: Path) -> StoreRecord | None:
        views = self.resolved["views"]
        if self.is_output or views == "live":
            return None
        learner.eval()
        source = self.sources.for_writing(learner.stage, views)
        source.precision = self.resolved["precision"]
        number, seed = learner.stage.number, self.recipe.seed
        fitted = fit(
            self.resolved["encoding"], source, self.shapes.output, self._batch, seed, number
        )
        compressor = self.recipe.store.compressor
        written = {
            split: write_split(
                directory / "activations.zarr" / split,
                source,
                split,
                views=views if split == "train" else 1,
                generation=0,
                encoding=fitted,
                compressor=compressor,
                batch=self._batch,
                reporter=self.reporter,
                stage=number,
            )
            for split in SPLITS
        }
        return StoreRecord.of(written, self.resolved["encoding"], compressor, views, source.number)

    def _lineage(self, directory: Path) -> str:
        """Names everything the result follows from."""
        return digest(
            canonical(
                {
                    "weights": file_digest(directory / ENCODER),
                    "parent": self.parent.lineage,
                    "source": self.source.number,
                    "seed": self.recipe.seed,
                    "views": self.resolved["views"],
                    "refresh_every": self.recipe.store.refresh_every,
                    "encoding": self.resolved["encoding"],
                }
            )
        )
