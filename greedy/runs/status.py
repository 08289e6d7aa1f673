"""The stages of a run at a glance."""

from dataclasses import dataclass
from pathlib import Path

from greedy.base.files import bytes_below
from greedy.runs.begun import progress_of
from greedy.runs.directory import SET_ASIDE, RunDirectory, State


@dataclass(frozen=True)
class StageStatus:
    """One stage. Errors in percent, sizes in bytes, time in seconds; ``None`` where there is
    nothing to tell: a stage that is not finished, a loss without a local classifier, a store
    that is not there. ``step_memory_bytes`` are those counted for a step, ``peak_memory_bytes``
    those measured (on a CPU of the whole process); where all stages train at once, both and the
    time are the network's."""

    stage: int
    name: str
    state: State
    train_error_percent: float | None = None
    test_error_percent: float | None = None
    store_bytes: int | None = None
    bytes_per_value: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    step_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class DiskUse:
    """Bytes of a run's stores, that of the images included: those on disk, and all that were
    written since the run began."""

    bytes_on_disk: int
    bytes_written: int


def disk_use(run: RunDirectory) -> DiskUse:
    """What a run's stores take, and took to write."""

    def read() -> DiskUse:
        data = run.record(0)
        stages = range(len(data.network) + 1) if data else range(0)
        records = [record for n in stages if (record := run.record(n))]
        stores = [r.store.bytes for r in records if r.store and run.store(r.stage).is_dir()]
        return DiskUse(sum(stores), sum(record.bytes_written for record in records))

    return run.undisturbed(read)


def status(run: RunDirectory) -> list[StageStatus]:
    """The trained stages of a run, from 1 on; none while stage 0 is not written."""
    data = run.record(0)
    names = data.network if data else []
    numbered = list(enumerate(names, start=1))
    return run.undisturbed(lambda: [_stage(run, number, name) for number, name in numbered])


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
        images_per_second=record.images_per_second,
        step_memory_bytes=record.choices.planned_peak_bytes,
        peak_memory_bytes=record.peak_memory_bytes,
    )


@dataclass(frozen=True)
class SetAside:
    """A training that could not go on where it was, and is kept.

    Attributes:
        path: its directory, beside that of the stage or network.
        progress: how far it is, such as ``epoch 4``; ``None`` if that cannot be read.
        bytes: what it takes on disk.
    """

    path: Path
    progress: str | None
    bytes: int


def trainings_set_aside(run: RunDirectory) -> list[SetAside]:
    """Returns all trainings of a run that were set aside, by their names."""
    places = [path for path in sorted(run.path.glob(f"*{SET_ASIDE}*")) if path.is_dir()]
    return [SetAside(path, progress_of(path), bytes_below(path)) for path in places]
