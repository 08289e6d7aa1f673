"""Curves of a run's errors over its epochs, read from the histories of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.files import read_limited
from greedy.base.text import legible
from greedy.runs.directory import RunDirectory
from greedy.runs.record import HISTORY
from greedy.runs.state import RunState

Percent = Annotated[float, Field(ge=0, le=100)]
Point = tuple[int, float]  # an epoch, counted from 1, and an error in percent


class _Line(BaseModel):
    """The fields of a line of ``history.jsonl`` that a curve needs."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    epoch: Annotated[int, Field(ge=1, le=2**31)]
    train_error_percent: Percent | None
    test_error_percent: Percent | None = None


@dataclass(frozen=True)
class Curve:
    """The errors of one stage after each epoch in which they were measured.

    Attributes:
        name: the name of the stage, or of the run.
        stage: the number of the stage.
        train: epochs and training errors, those of the epoch's batches during training.
        test: epochs and test errors.
        published: the paper's test error in percent, if it is of the same stage.
    """

    name: str
    stage: int
    train: list[Point]
    test: list[Point]
    published: float | None = None


def stage_curves(run: RunDirectory) -> list[Curve]:
    """Returns a curve for each stage of a run that has a local classifier, also for a stage in
    training; stale stages have none. Raises ``UserError`` where there is no curve at all."""
    if curves := curves_so_far(run):
        return curves
    raise UserError(
        f"no stage of {run.path} has errors to draw yet: resume it with "
        f"{command('train', '--run', run.path)}, its output layer will have them"
    )


def curves_so_far(run: RunDirectory) -> list[Curve]:
    """Returns the curves of ``stage_curves``, or an empty list where there are none yet."""
    return run.read_consistently(lambda: _curves(RunState.read(run)))


def _curves(state: RunState) -> list[Curve]:
    data, recipe = state.record(0), state.run.recipe
    network = data.network if data else []
    curves = []
    for number, name in enumerate(network, start=1):
        lines = _history(state, number)
        train = [
            (line.epoch, line.train_error_percent)
            for line in lines
            if line.train_error_percent is not None
        ]
        test = [
            (line.epoch, line.test_error_percent)
            for line in lines
            if line.test_error_percent is not None
        ]
        if train or test:
            paper = recipe.paper if number == len(network) else None
            published = paper.test_error_percent if paper else None
            curves.append(Curve(f"stage {number}, {name}", number, train, test, published))
    return curves


def run_curves(runs: Sequence[RunDirectory]) -> list[Curve]:
    """Returns the ``network_curve`` of each run. Raises ``UserError`` for a run without curves."""
    return [
        network_curve(stage_curves(run), name, len(RunState.read(run).complete_record(0).network))
        for run, name in zip(runs, run_names(runs), strict=True)
    ]


def network_curve(curves: Sequence[Curve], name: str, stages: int) -> Curve:
    """Returns the curve of a run's output layer, whose errors are the network's, under the run's
    ``name``; without it the last curve, with its stage in the name."""
    last = curves[-1]
    stage = "" if last.stage == stages else f" (stage {last.stage} of {stages})"
    return replace(last, name=name + stage)


def run_names(runs: Sequence[RunDirectory]) -> list[str]:
    """Returns the names of the runs' directories, or their paths if two names are the same."""
    names = [run.path.resolve().name for run in runs]
    unique = len(set(names)) == len(names)
    return [legible(name) for name in (names if unique else (str(run.path) for run in runs))]


def _history(state: RunState, number: int) -> list[_Line]:
    run = state.run
    match state.stage_state(number):
        case "complete":
            return _read(state.complete_record(number).check_file(run.stage_dir(number), HISTORY))
        case "training":
            path = run.training_history_path(number)
            return _read(path) if path.is_file() else []
    return []


def _read(path: Path) -> list[_Line]:
    try:
        return [_Line.model_validate_json(line) for line in read_limited(path).splitlines()]
    except (ValidationError, ValueError) as error:
        raise UserError(
            f"{path} is not a history of epochs: train the stage again with --retrain"
        ) from error
