"""The epochs of one stage."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from greedy.errors import Interrupted, TrainingError
from greedy.interrupts import Postponed
from greedy.losses import Features
from greedy.models import Shape
from greedy.reporting import EpochReport, Reporter
from greedy.seeds import derive, torch_generator
from greedy.source import Batch, Source
from greedy.training.checkpoint import Checkpoints, Progress, Sums
from greedy.training.guard import Guard
from greedy.training.schedule import Schedule
from greedy.training.step import Learner, step


@dataclass
class Totals:
    """Sums over rows, kept on the device so that no step waits for them. In float32: MPS has no
    other."""

    rows: int = 0
    loss: Tensor | float = 0.0
    wrong: Tensor | None = None

    def add(self, loss: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Takes in a batch's mean loss and its logits."""
        self.rows += len(labels)
        self.loss = self.loss + loss.float() * len(labels)
        if logits is not None:
            wrong = (logits.argmax(dim=1) != labels).sum()
            self.wrong = wrong if self.wrong is None else self.wrong + wrong

    @property
    def mean_loss(self) -> float:
        """The mean over the rows."""
        return float(self.loss) / self.rows

    @property
    def error_percent(self) -> float | None:
        """The share of wrong predictions, or ``None`` without a local classifier."""
        return None if self.wrong is None else 100 * int(self.wrong) / self.rows


@dataclass
class Epochs:
    """Trains a stage epoch by epoch; iterate over it for the reports. ``input_shape`` is that of
    a row the source gives."""

    learner: Learner
    source: Source
    input_shape: Shape
    schedule: Schedule
    epochs: int
    batch_size: int
    classes_per_batch: int
    seed: int
    reporter: Reporter
    checkpoints: Checkpoints | None = None

    def __iter__(self) -> Iterator[EpochReport]:
        began = time.perf_counter()
        done = self.checkpoints.load() if self.checkpoints else None
        progress, sums = done or (Progress(), None)
        before = progress.before + progress.seconds
        yield from progress.reports
        while not progress.finished:
            self.source.at_epoch(progress.epoch)  # before signals wait: it may write for hours
            with Postponed() as stop:
                report = self._epoch(progress, sums, stop)
                over = self.schedule.observe(report.holdout_loss)
                progress = Progress(
                    epoch=report.epoch,
                    before=before + time.perf_counter() - began,
                    finished=over or report.epoch == self.epochs,
                    reports=[*progress.reports, report],
                )
                sums = None
                self._keep(progress, None, stop)
            yield report

    def _epoch(self, progress: Progress, sums: Sums | None, stop: Postponed) -> EpochReport:
        started = time.perf_counter() - progress.seconds
        epoch, first = progress.epoch, progress.position
        rate = self.schedule.rate_at(epoch)
        assert self.learner.optimizer is not None
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate
        limited = self.classes_per_batch if self.schedule.drops(epoch) == 0 else 0
        batches = self.source.epoch(
            self.learner.stage.number,
            epoch,
            self.batch_size,
            classes_per_batch=limited,
            start_batch=first,
        )
        self.reporter.epoch_started(epoch + 1, batches.rows)
        self.learner.train()
        totals = Totals(progress.rows, *sums) if sums else Totals()
        guard = Guard()
        if totals.rows:
            self.reporter.batch_finished(totals.rows)
        for position, batch in enumerate(batches, start=first):
            # For layers and losses that draw from torch's own generators.
            number = self.learner.stage.number
            torch.manual_seed(derive(self.seed, "step", number, epoch, position))
            masked = replace(batch, mask=self._mask(batch, epoch, position))
            loss, logits = self._step(masked, guard, position)
            totals.add(loss, logits, batch.labels)
            self.reporter.batch_finished(len(batch.labels))
            if stop.requested is not None or (self.checkpoints and self.checkpoints.due):
                seconds = time.perf_counter() - started
                here = {"position": position + 1, "rows": totals.rows, "seconds": seconds}
                self._require_finite(guard, epoch, rate)
                self._keep(progress.model_copy(update=here), totals, stop)
        self._require_finite(guard, epoch, rate)
        seconds = time.perf_counter() - started
        return EpochReport(
            epoch=epoch + 1,
            learning_rate=rate,
            loss=totals.mean_loss,
            train_error_percent=totals.error_percent,
            holdout_loss=self._holdout_loss(),
            images_per_second=totals.rows / seconds,
            seconds=seconds,
        )

    def _keep(self, progress: Progress, totals: Totals | None, stop: Postponed) -> None:
        """A checkpoint, and the end of the training where a signal has asked for it."""
        if self.checkpoints:
            sums = None if totals is None else Sums(totals.loss, totals.wrong)
            self.checkpoints.save(progress, sums)
        if stop.requested is not None:
            raise Interrupted(
                stop.requested,
                f"interrupted in stage {self.learner.stage.number} after {progress}: the same "
                f"command goes on from there",
            )

    def _holdout_loss(self) -> float | None:
        if not self.source.held_out:
            return None
        return measure(self.learner, self.source.held_out_rows(self.batch_size)).mean_loss

    def _step(self, batch: Batch, guard: Guard, position: int) -> tuple[Tensor, Tensor | None]:
        planned = self.learner.memory
        done = step(self.learner, batch, guard, position)
        if self.learner.memory != planned:
            self.reporter.memory_reduced(self.learner.stage.number, self.learner.memory)
            if self.checkpoints:
                self.checkpoints.reduced(self.learner.memory)
        return done

    def _mask(self, batch: Batch, epoch: int, position: int) -> Tensor | None:
        """Of dropout on the batch's input, named by (seed, stage, step)."""
        stage = self.learner.stage
        if stage.dropout is None:
            return None
        generator = torch_generator(self.seed, "dropout", stage.number, epoch, position)
        mask = stage.dropout.mask(len(batch.labels), self.input_shape, generator)
        return mask.to(self.learner.device, non_blocking=True)

    def _require_finite(self, guard: Guard, epoch: int, rate: float) -> None:
        if (number := guard.step) is None:
            return
        last = self.checkpoints.last if self.checkpoints else ""
        kept = f"the last good checkpoint is after {last}" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"the loss of stage {self.learner.stage.number} is not finite in epoch {epoch + 1}, "
            f"step {number}, at a learning rate of {rate:g} ({kept}): lower "
            f"training.learning_rate and begin another run"
        )


@torch.no_grad()
def measure(learner: Learner, batches: Iterator[tuple[Tensor, Tensor]]) -> Totals:
    """Loss and errors in evaluation mode: running statistics, no dropout."""
    learner.eval()
    totals = Totals()
    for x, labels in batches:
        parts = zip(*(learner.features(x[rows]) for rows in learner.slices(len(x))), strict=True)
        whole: Any = [None if part[0] is None else torch.cat(part) for part in parts]
        features = Features(*whole)
        loss = learner.loss(features, learner.targets(labels))
        totals.add(loss, learner.heads.logits(features), labels)
    return totals
