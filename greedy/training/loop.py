"""The epochs of a training."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from traceback import clear_frames

import torch

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import Interrupted, TrainingError, first_line
from greedy.base.heap import freed_memory_kept
from greedy.base.interrupts import PostponedSignals
from greedy.base.precision import all_finite
from greedy.base.relay import Relay
from greedy.base.seeds import derive_seed, seed_torch
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.checkpoint_record import Progress
from greedy.runs.events import EpochReport, Reporter
from greedy.steps.guard import Guard, OptimizerFailed
from greedy.steps.measuring import Totals, measure
from greedy.steps.strategies import Outcome, Strategy
from greedy.stores.source import Batch, Source
from greedy.training.checkpoint import Checkpoints
from greedy.training.schedule import FIRST, Schedule, scale_rates, set_first_rates

SAVE = -1  # said by the process with the first stage; above 0 the signal that ends the training


@dataclass
class Epochs:
    """Trains stages epoch by epoch; iterating gives the reports of each epoch, one for each stage.

    Attributes:
        strategy: the stages and how they are trained.
        source: gives the batches.
        input_shapes: the shape of an input row of each stage.
        checkpoints: writes checkpoints and has the one to resume from; ``None`` for none.
        test_batch: test rows evaluated at a time.
        ample_memory: whether memory that is freed on a CPU stays with the process.
        relay: the processes of which each trains some of the stages.
    """

    strategy: Strategy
    source: Source
    input_shapes: Sequence[Shape]
    schedule: Schedule
    recipe: Recipe
    reporter: Reporter
    checkpoints: Checkpoints | None = None
    test_batch: int = 256
    ample_memory: bool = False
    relay: Relay = field(default_factory=Relay)

    @property
    def number(self) -> int:
        """The number of the first stage that trains, which names the streams of random numbers."""
        return self.strategy.number

    def __iter__(self) -> Iterator[list[EpochReport]]:
        finished = False
        try:
            with freed_memory_kept(self.source.device) if self.ample_memory else nullcontext():
                yield from self._epochs()
            finished = True
        finally:
            self.source.end_drawing(finished=finished)

    def _epochs(self) -> Iterator[list[EpochReport]]:
        began = time.perf_counter()
        set_first_rates(self.strategy.optimizers)
        loaded = self.checkpoints.load() if self.checkpoints else None
        progress, totals = loaded or (Progress(), [])
        before = progress.before + progress.seconds
        yield from progress.reports
        while not progress.finished:
            # Before signals wait: it may write for hours.
            self._draw(partial(self.source.advance_views, progress.epoch))
            with PostponedSignals() as stop:
                own = self._epoch(progress, totals, stop)
                epoch = progress.epoch + 1
                ends = self.schedule.observe(_sum(r.holdout_loss for r in self._of_all(own)))
                ends = ends or epoch == for_stage(self.recipe.training.epochs, self.number)
                every = self.recipe.training.test_every
                if ends or (every and epoch % every == 0):
                    own = self._with_test_errors(own)
                reports = self._of_all(own)
                progress = Progress(
                    epoch=epoch,
                    before=before + time.perf_counter() - began,
                    finished=ends,
                    reports=[*progress.reports, reports],
                )
                totals = []
                signals = self.relay.gathered([max(self._asked(stop), 0)])
                self._save(progress, [], next(filter(None, signals), 0))
            yield reports

    def _of_all(self, own: Sequence[EpochReport]) -> list[EpochReport]:
        """Returns the reports of all stages, given those of the stages of this process."""
        found = self.relay.gathered([asdict(report) for report in own])
        return [EpochReport(**each | {"processes": tuple(each["processes"])}) for each in found]

    def _epoch(
        self, progress: Progress, totals: Sequence[Totals], stop: PostponedSignals
    ) -> list[EpochReport]:
        began, waited_before = time.perf_counter(), self.source.waited
        started, epoch = began - progress.seconds, progress.epoch
        if progress.position == 0:  # within an epoch the checkpoint has the rates
            scale_rates(self.strategy.optimizers, self.schedule.factor_at(epoch))
        rate = self.relay.ranks.told(self._rate)
        processes = _followed(progress.processes, self.source.ranks.size)
        totals = totals or [Totals() for _ in self.strategy.learners]
        guard = Guard(self.recipe.training.gradient_clip)
        with closing(self._steps(progress, totals, guard)) as steps:  # ends processes that read
            for position in steps:
                if word := self.relay.passed_on(self._asked(stop)):
                    seconds = time.perf_counter() - started
                    here = {"position": position + 1, "rows": totals[0].rows, "seconds": seconds}
                    now = progress.model_copy(update=here | {"processes": processes})
                    self._require_finite(guard, epoch, rate)
                    self._require_alike(epoch)
                    self._save(now, totals, max(word, 0))
        self._require_finite(guard, epoch, rate)
        self._require_alike(epoch)
        seconds = time.perf_counter() - started
        waited = (self.source.waited - waited_before) / (time.perf_counter() - began)
        return [
            EpochReport(
                epoch=epoch + 1,
                learning_rate=rate,
                loss=total.mean_loss,
                train_error_percent=total.error_percent,
                holdout_loss=None if held_out is None else held_out.mean_loss,
                images_per_second=total.rows / seconds,
                seconds=seconds,
                waiting_percent=100 * waited,
                processes=tuple(processes),
            )
            for total, held_out in zip(totals, self._held_out(), strict=True)
        ]

    def _steps(self, progress: Progress, totals: Sequence[Totals], guard: Guard) -> Generator[int]:
        """Trains on the batches of an epoch that are left, and yields the position of each."""
        epoch, first = progress.epoch, progress.position
        limited = self.recipe.data.classes_per_batch
        batches = self.source.epoch_batches(
            self.number,
            epoch,
            self.recipe.training.batch_size,
            classes_per_batch=limited if self.schedule.drops(epoch) == 0 else 0,
            start_batch=first,
        )
        self.reporter.epoch_started(epoch + 1, batches.rows)
        for learner in self.strategy.learners:
            learner.train()
        if progress.rows:
            self.reporter.resumed(progress.rows)
        # Processes that train together draw for different rows.
        rank = [self.source.ranks.rank] if self.source.ranks.rank else []
        with closing(iter(batches)) as reading:
            for position, batch in enumerate(reading, start=first):
                # For layers and losses that draw from torch's own generators.
                step_seed = derive_seed(
                    self.recipe.seed, "step", self.number, epoch, position, *rank
                )
                seed_torch(step_seed, self.source.device)
                outcomes = self._step(batch, epoch, position, guard)
                for total, outcome in zip(totals, outcomes, strict=True):
                    total.add(*outcome, batch.labels)
                self._draw(partial(self.source.draw_views, epoch, totals[0].rows, batches.rows))
                self.reporter.batch_finished(len(batch.labels))
                yield position

    def _draw(self, draw: Callable[[], None]) -> None:
        """Draws views. If memory runs out, CUDA graphs give way, whose memory is reserved between
        steps too."""
        recorded = [learner for learner in self.strategy.learners if learner.has_graph]
        try:
            draw()
        except Exception as error:
            on_device = is_out_of_memory(error) and not isinstance(error, MemoryError)
            if not (recorded and on_device):
                raise
            clear_frames(error.__traceback__)  # they hold what was computed
        else:
            return
        for learner in recorded:
            learner.drop_graph()
        self.source.end_drawing(finished=False)  # whole shards of a view stay
        draw()

    @property
    def _rate(self) -> float:
        """The learning rate to report: that of the first group, if it has one."""
        group = self.strategy.optimizers[0].param_groups[0]
        return float(group["lr"]) if FIRST in group else self.schedule.rate

    def _asked(self, stop: PostponedSignals) -> int:
        """Returns the signal that one of the processes with shares of a batch got, ``SAVE`` if a
        checkpoint is due, else 0."""
        due = self.checkpoints is not None and self.checkpoints.due
        asked = self.source.ranks.largest(2 * (stop.requested or 0) + due)
        return asked // 2 or (SAVE if asked else 0)

    def _save(self, progress: Progress, totals: Sequence[Totals], signal: int) -> None:
        """Writes a checkpoint, and ends the training if a signal, not 0, has asked for that."""
        if self.checkpoints:
            self.checkpoints.save(progress, totals)
        if signal:
            raise Interrupted(
                signal,
                f"interrupted in {self.strategy.title} after {progress}: the same command "
                f"resumes there",
            )

    def _held_out(self) -> Sequence[Totals | None]:
        learners, rows = self.strategy.learners, self.source.stores["train"].rows
        if not self.source.held_out:
            return [None] * len(learners)
        first = rows - self.source.held_out
        return self._measured("train", self.recipe.training.batch_size, first, rows)

    def _measured(self, split: str, batch: int, start: int, stop: int) -> list[Totals]:
        """Measures the stages on rows of view 0, of which each process computes some batches."""
        ranks = self.source.ranks
        count = -(-(stop - start) // batch)
        first, last = (count * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        own = start + batch * first, min(start + batch * last, stop)
        batches: Iterable[Batch] = ()
        if own[0] < own[1]:
            batches = self.source.view_batches(split, 0, batch, start=own[0], stop=own[1])
        totals = measure(self.strategy.learners, batches, self.relay)
        return totals if ranks.size == 1 else [total.over(ranks) for total in totals]

    def _with_test_errors(self, reports: Sequence[EpochReport]) -> list[EpochReport]:
        totals = self._measured("test", self.test_batch, 0, self.source.stores["test"].rows)
        return [
            replace(report, test_error_percent=total.error_percent)
            for report, total in zip(reports, totals, strict=True)
        ]

    def _step(self, batch: Batch, epoch: int, position: int, guard: Guard) -> list[Outcome]:
        learners = self.strategy.learners
        planned = [learner.memory for learner in learners]
        compiled = [learner for learner in learners if learner.compiled_rows]
        masks = [
            batch.own(learner.mask(self.recipe.seed, len(batch.labels), shape, epoch, position))
            for learner, shape in zip(learners, self.input_shapes, strict=True)
        ]
        try:
            outcomes = self.strategy.step(batch, masks, guard, position)
        except OptimizerFailed as error:
            raise self._optimizer_failed(epoch, position, error.__cause__) from error
        for learner, memory in zip(learners, planned, strict=True):
            if learner.memory != memory:
                self.reporter.memory_reduced(learner.stage.number, learner.memory)
                if self.checkpoints:
                    self.checkpoints.reduced(learner.memory)
        for learner in compiled:
            if not learner.compiled_rows:
                self.reporter.compiling_failed(learner.stage.number, learner.compiling_failed)
                if self.checkpoints:
                    self.checkpoints.not_compiled()
        return outcomes

    def _require_finite(self, guard: Guard, epoch: int, rate: float) -> None:
        faults = self.relay.gathered([self._fault(guard, epoch, rate)])
        if fault := next(filter(None, faults), ""):
            raise TrainingError(fault)

    def _fault(self, guard: Guard, epoch: int, rate: float) -> str:
        """Returns what is not finite in the stages of this process; empty if nothing is."""
        parameters = (p for learner in self.strategy.learners for p in learner.parameters())
        title, also = self.strategy.title, ""
        if (number := guard.step) is not None:
            fault, where = f"the loss of {title} is", f"in epoch {epoch + 1}, step {number}"
            if not guard.in_loss:
                fault = f"the loss of {title} is finite and its gradient is"
                also = ", keep a loss of your own from square roots and logarithms of 0,"
        elif not all_finite(p for p in parameters if p.requires_grad):
            fault, where = f"what {title} has learned is", f"in epoch {epoch + 1}"
        else:
            return ""
        return (
            f"{fault} not finite {where}, at a learning rate of {rate:g} "
            f"({self._last_checkpoint}): lower training.learning_rate{also} and begin another run"
        )

    def _require_alike(self, epoch: int) -> None:
        """Raises ``TrainingError`` if processes that train together have learned other weights or
        running statistics."""
        ranks = self.source.ranks
        if ranks.size == 1:
            return
        own = blake2b(digest_size=7)  # fits an int64
        for learner in self.strategy.learners:
            for learned in (*learner.parameters(), *learner.buffers()):
                own.update(learned.detach().cpu().numpy().tobytes())
        digests = ranks.stack(torch.tensor([int.from_bytes(own.digest())]))
        if (digests != digests[0]).any():
            raise TrainingError(
                f"the processes that train {self.strategy.title} together have learned other "
                f"weights in epoch {epoch + 1} ({self._last_checkpoint}): give the same command "
                f"again, with processes on devices of one kind"
            )

    def _optimizer_failed(
        self, epoch: int, position: int, error: BaseException | None
    ) -> TrainingError:
        """Returns the error for an optimiser that failed. It may have changed some of the weights,
        so that only the checkpoint is whole."""
        assert error is not None
        way = "free memory on its device" if is_out_of_memory(error) else "mend it"
        return TrainingError(
            f"the optimiser of {self.strategy.title} failed in epoch {epoch + 1}, step "
            f"{position + 1} ({first_line(error)}; {self._last_checkpoint}): {way} and give the "
            f"same command again, which resumes from the last checkpoint"
        )

    @property
    def _last_checkpoint(self) -> str:
        last = self.checkpoints.last if self.checkpoints else ""
        return f"the last good checkpoint is after {last}" if last else "there is no checkpoint yet"


def _followed(numbers: list[int], last: int) -> list[int]:
    """Returns the numbers, and behind them the last one unless that is the same."""
    return numbers if numbers[-1:] == [last] else [*numbers, last]


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
