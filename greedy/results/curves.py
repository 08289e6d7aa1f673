"""The errors of runs over their epochs, as their histories have them."""

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

Percent = Annotated[float, Field(ge=0, le=100)]
Point = tuple[int, float]  # an epoch, counted from 1, and an error in percent


class _Line(BaseModel):
    """What a curve takes from a line of ``history.jsonl``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    epoch: Annotated[int, Field(ge=1, le=2**31)]
    train_error_percent: Percent | None
    test_error_percent: Percent | None = None


@dataclass(frozen=True)
class Curve:
    """The errors of one stage after each epoch in which they were measured.

    ``name`` says of what, ``train`` is the error of the epoch's batches as they were trained on,
    ``published`` the paper's test error in percent where this is what it can be compared with.
    """

    name: str
    stage: int
    train: list[Point]
    test: list[Point]
    published: float | None = None


def stage_curves(run: RunDirectory) -> list[Curve]:
    """Curves, one for each stage of a run that has a local classifier, also for one that is being
    trained; stale stages have none. Raises ``UserError`` where there is no curve at all."""
    if found := curves_so_far(run):
        return found
    raise UserError(
        f"no stage of {run.path} has errors to draw yet: go on with "
        f"{command('train', '--run', run.path)}, its output layer will have them"
    )


def curves_so_far(run: RunDirectory) -> list[Curve]:
    """Returns what ``stage_curves`` returns, none where there is none yet."""
    return run.read_consistently(lambda: _curves(run))


def _curves(run: RunDirectory) -> list[Curve]:
    data = run.record(0)
    network = data.network if data else []
    found = []
    for number, name in enumerate(network, start=1):
        lines = _history(run, number)
        train = [
            (x.epoch, x.train_error_percent) for x in lines if x.train_error_percent is not None
        ]
        test = [(x.epoch, x.test_error_percent) for x in lines if x.test_error_percent is not None]
        if train or test:
            paper = run.recipe.paper if number == len(network) else None
            published = paper.test_error_percent if paper else None
            found.append(Curve(f"stage {number}, {name}", number, train, test, published))
    return found


def run_curves(runs: Sequence[RunDirectory]) -> list[Curve]:
    """The ``network_curve`` of each run. Raises ``UserError`` for a run without any."""
    return [
        network_curve(stage_curves(run), name, len(run.complete_record(0).network))
        for run, name in zip(runs, run_names(runs), strict=True)
    ]


def network_curve(found: Sequence[Curve], name: str, stages: int) -> Curve:
    """The curve of a run's output layer, whose errors are the network's, under the run's
    name. Of a run that has not come to it the last, and the name then says which."""
    last = found[-1]
    stage = "" if last.stage == stages else f" (stage {last.stage} of {stages})"
    return replace(last, name=name + stage)


def run_names(runs: Sequence[RunDirectory]) -> list[str]:
    """The names of the runs' directories, or where these do not tell them apart their paths."""
    names = [run.path.resolve().name for run in runs]
    told_apart = len(set(names)) == len(names)
    return [legible(name) for name in (names if told_apart else (str(run.path) for run in runs))]


def _history(run: RunDirectory, number: int) -> list[_Line]:
    match run.state(number):
        case "complete":
            return _read(run.complete_record(number).check_file(run.stage_dir(number), HISTORY))
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
