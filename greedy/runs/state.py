"""The state of a run: what its directory held when it was read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from greedy.base.commands import command
from greedy.base.errors import UserError, no_stage
from greedy.runs.directory import RunDirectory, stage_numbers
from greedy.runs.record import StageRecord
from greedy.runs.retraining import RETRAINING_FILE

StageState = Literal["complete", "training", "pending", "stale"]


@dataclass(frozen=True)
class _Stage:
    """What the directory of one stage held; ``error`` says why its record could not be read."""

    record: StageRecord | None
    error: Exception | None
    is_started: bool
    has_store: bool

    @classmethod
    def read(cls, run: RunDirectory, number: int) -> Self:
        record = error = None
        try:
            record = run.record(number)
        except (UserError, OSError) as fault:  # of interest only to those who ask for this record
            error = fault
        is_started = (run.stage_dir(number) / "training").is_dir()
        return cls(record, error, is_started, run.store_path(number).is_dir())


_ABSENT = _Stage(None, None, is_started=False, has_store=False)


@dataclass(frozen=True)
class RunState:
    """What a run's directory held when it was read, by ``read``: the records of its stages, and
    which of them are stale, in training, or have a store. It does not change when the directory
    does.

    Attributes:
        run: the run that was read.
    """

    run: RunDirectory
    _stages: Mapping[int, _Stage]
    _network_is_started: bool
    _has_retraining: bool

    @classmethod
    def read(cls, run: RunDirectory) -> "RunState":
        """Reads a run, which may not exist yet; of stages that are exchanged meanwhile all is of
        the old or all of the new ones."""

        def read() -> RunState:
            stages = {number: _Stage.read(run, number) for number in stage_numbers(run.path)}
            has_retraining = (run.path / RETRAINING_FILE).exists()
            return cls(run, stages, run.network_dir.is_dir(), has_retraining)

        return run.read_consistently(read)

    def read_again(self, *numbers: int) -> Self:
        """Returns the state after some stages were trained or their stores were deleted; only
        these stages are read."""
        changed = {number: _Stage.read(self.run, number) for number in numbers}
        return replace(self, _stages={**self._stages, **changed})

    def record(self, number: int) -> StageRecord | None:
        """Returns the record of a finished stage, ``None`` if it is not finished. Raises
        ``UserError`` if the record is damaged or is another stage's."""
        stage = self._stage(number)
        if stage.error is not None:
            raise stage.error
        return stage.record

    def seconds(self, number: int) -> float:
        """Returns the seconds that the last training of a stage took, 0 if no record of it can be
        read."""
        record = self._stage(number).record
        return record.seconds if record else 0.0

    def has_store(self, number: int) -> bool:
        """Returns whether the activation store of a stage exists."""
        return self._stage(number).has_store

    def stage_state(self, number: int) -> StageState:
        """Returns the state of a stage: stale if it was trained with other settings, or if a stage
        before it was trained again since."""
        record = self.record(number)
        if record is None:
            started = self._network_is_started or self._stage(number).is_started
            return "training" if number and started else "pending"
        digest = self.run.recipe_digest
        while record.recipe_digest == digest:
            if record.parent is None:
                return "complete"
            source = self.record(record.parent.stage)
            if source is None or source.lineage != record.parent.lineage:
                break
            record = source
        return "stale"

    def is_stale(self, number: int) -> bool:
        """Returns whether a stage is finished and stale."""
        return self.stage_state(number) == "stale"

    def complete_record(self, number: int) -> StageRecord:
        """Returns the record of a stage. Raises ``UserError`` if the stage is not finished or is
        stale."""
        record, path = self.record(number), self.run.path
        if self.is_stale(number):
            first = [number] if self.run.recipe.training.strategy == "greedy" else []
            raise UserError(
                f"stage {number} in {path} is stale (an earlier stage was trained again "
                f"after it, or it is of another run): train it again with "
                f"{command('train', '--run', path, '--retrain', *first)}"
            )
        if record is None:
            raise UserError(
                f"stage {number} in {path} is not finished: train it first, with "
                f"{command('train', '--run', path)}"
            )
        return record

    @property
    def is_finished(self) -> bool:
        """Whether every stage has a record and no retraining is unfinished."""
        data = self.record(0)
        if data is None or self._network_is_started or self._has_retraining:
            return False
        return all(self.record(n) is not None for n in range(1, len(data.network) + 1))

    def require_stage(self, number: int) -> None:
        """Raises ``UserError`` unless ``number`` is that of a stage that trains."""
        count = len(self.complete_record(0).network)
        if not 1 <= number <= count:
            raise no_stage(number, count)

    def _stage(self, number: int) -> _Stage:
        return self._stages.get(number, _ABSENT)
