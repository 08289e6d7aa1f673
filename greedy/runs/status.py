"""The figures of a run: its stages, its disk use, and the trainings that were set aside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from greedy.base.files import bytes_below
from greedy.base.text import ranges
from greedy.runs.checkpoint_record import describe_progress
from greedy.runs.directory import SET_ASIDE, RunDirectory
from greedy.runs.record import UNKNOWN_VIEW, StageRecord
from greedy.runs.state import RunState, StageState


@dataclass(frozen=True)
class StoreStatus:
    """The views of a stage's store.

    Attributes:
        views: how many it has, or had before it was deleted.
        reuse: epochs after which the oldest is replaced by a new one, 0 for never.
        view_numbers: those that it holds now, ascending; ``None`` if it was deleted. A view is
            missing while it is exchanged.
        bytes_written: into all stores of its stage, also for views that were replaced.
    """

    views: int
    reuse: int
    view_numbers: list[int] | None
    bytes_written: int

    @property
    def held(self) -> str:
        """The numbers of the views that it holds, in words."""
        if self.view_numbers is None:
            return "-"
        return ranges(self.view_numbers) or "?"


def store_status(record: StageRecord, has_store: bool) -> StoreStatus | None:
    """Returns the views of a finished stage's store, ``None`` if it never had one."""
    if (store := record.store) is None:
        return None
    numbers = sorted(number for number in store.view_numbers if number != UNKNOWN_VIEW)
    return StoreStatus(
        views=store.views,
        reuse=record.choices.reuse if record.stage else 0,
        view_numbers=numbers if has_store else None,
        bytes_written=record.bytes_written,
    )


@dataclass(frozen=True)
class StageStatus:
    """The state and figures of one stage: errors in percent, sizes in bytes, time in seconds.

    A figure is ``None`` if the stage is not finished, has no local classifier, or has no store;
    ``store`` also tells of a store that was deleted.
    ``step_memory_bytes`` were counted for a step, ``peak_memory_bytes`` measured (on a CPU of the
    whole process). If all stages train at once, these two and the time are the network's.
    ``processes`` are the numbers of processes that trained it together: several if it was resumed
    with another number.
    """

    stage: int
    name: str
    state: StageState
    train_error_percent: float | None = None
    test_error_percent: float | None = None
    store_bytes: int | None = None
    bytes_per_value: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    step_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    store: StoreStatus | None = None
    processes: Sequence[int] | None = None

    @property
    def trained_by(self) -> str:
        """The number of processes that trained it, such as ``3, then 1``; ``-`` if unknown."""
        return ", then ".join(map(str, self.processes or ())) or "-"


@dataclass(frozen=True)
class DiskUse:
    """The bytes of a run's stores, stage 0's included: those on disk now, and all that were ever
    written."""

    bytes_on_disk: int
    bytes_written: int


def disk_use(state: RunState) -> DiskUse:
    """Returns the bytes of a run's stores, on disk and written."""
    data = state.record(0)
    stages = range(len(data.network) + 1) if data else range(0)
    records = [record for n in stages if (record := state.record(n))]
    stores = [r.store.bytes for r in records if r.store and state.has_store(r.stage)]
    return DiskUse(sum(stores), sum(record.bytes_written for record in records))


def status(state: RunState) -> list[StageStatus]:
    """Returns the status of all stages of a run from 1 on; empty before stage 0 is written."""
    data = state.record(0)
    names = data.network if data else []
    return [_stage(state, number, name) for number, name in enumerate(names, start=1)]


def _stage(state: RunState, number: int, name: str) -> StageStatus:
    record = state.record(number)
    if record is None:
        return StageStatus(number, name, state.stage_state(number))
    store = record.store if state.has_store(number) else None
    return StageStatus(
        number,
        name,
        state.stage_state(number),
        train_error_percent=record.metrics.train_error_percent,
        test_error_percent=record.metrics.test_error_percent,
        store_bytes=store.bytes if store else None,
        bytes_per_value=store.bytes / store.values if store else None,
        seconds=record.seconds,
        images_per_second=record.images_per_second,
        step_memory_bytes=record.choices.planned_peak_bytes,
        peak_memory_bytes=record.peak_memory_bytes,
        store=store_status(record, store is not None),
        processes=record.processes,
    )


@dataclass(frozen=True)
class SetAside:
    """An interrupted training that cannot resume and is kept.

    Attributes:
        path: its directory, next to that of the stage or network.
        progress: how far it got, such as ``epoch 4``; ``None`` if that cannot be read.
        bytes: on disk.
    """

    path: Path
    progress: str | None
    bytes: int


def trainings_set_aside(run: RunDirectory) -> list[SetAside]:
    """Returns all trainings of a run that were set aside, sorted by path."""
    paths = [path for path in sorted(run.path.glob(f"*{SET_ASIDE}*")) if path.is_dir()]
    return [SetAside(path, describe_progress(path), bytes_below(path)) for path in paths]
