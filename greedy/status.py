"""The stages of a run at a glance."""

from dataclasses import dataclass

from greedy.runs import RunDirectory, State


@dataclass(frozen=True)
class StageStatus:
    """One stage. Errors in percent, sizes in bytes, time in seconds; ``None`` where there is
    nothing to tell: a stage that is not finished, a loss without a local classifier, a store
    that is not there."""

    stage: int
    name: str
    state: State
    train_error_percent: float | None = None
    test_error_percent: float | None = None
    store_bytes: int | None = None
    bytes_per_value: float | None = None
    seconds: float | None = None


def status(run: RunDirectory) -> list[StageStatus]:
    """The trained stages of a run, from 1 on; none while stage 0 is not written."""
    data = run.record(0)
    names = data.network if data else []
    return [_stage(run, number, name) for number, name in enumerate(names, start=1)]


def _stage(run: RunDirectory, number: int, name: str) -> StageStatus:
    record, state = run.record(number), run.state(number)
    if record is None:
        return StageStatus(number, name, state)
    store = record.store if run.store(number).is_dir() else None
    return StageStatus(
        number,
        name,
        state,
        train_error_percent=record.metrics.train_error_percent,
        test_error_percent=record.metrics.test_error_percent,
        store_bytes=store.bytes if store else None,
        bytes_per_value=store.bytes / store.values if store else None,
        seconds=record.seconds,
    )
