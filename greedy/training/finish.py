"""The files of a trained stage: its weights, its history and its record."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from greedy.base.devices import device_name, peak_memory
from greedy.base.files import canonical_json, digest, file_digest
from greedy.base.tensorfile import file_parts
from greedy.base.versions import versions
from greedy.build.cut_network import OUTPUT
from greedy.cache.files import write_parts
from greedy.models import StageShapes
from greedy.recipes import Recipe
from greedy.runs.choices import Choices
from greedy.runs.events import EpochReport
from greedy.runs.record import ENCODER, HEADS, Metrics, Parent, StageRecord, StoreRecord
from greedy.steps.step import Learner


def save_weights(learner: Learner, directory: Path) -> None:
    """Writes the encoder and the local heads into a stage's directory, as safetensors."""
    for name, module in ((ENCODER, learner.stage), (HEADS, learner.heads)):
        write_parts(directory / name, file_parts(module.state_dict()))


def history_line(report: EpochReport) -> str:
    """Returns the line of ``history.jsonl`` for an epoch. One process is not named."""
    line = asdict(report)
    if report.processes == (1,):
        del line["processes"]
    return json.dumps(line) + "\n"


def write_record(
    directory: Path,
    learner: Learner,
    shapes: StageShapes,
    reports: Sequence[EpochReport],
    recipe: Recipe,
    choices: Choices,
    parent: StageRecord,
    *,
    source: int,
    is_output: bool,
    seconds: float,
    store: StoreRecord | None = None,
    written_before: int = 0,
) -> StageRecord:
    """Writes ``stage.json``, the last file of a stage's directory, and returns its contents.

    Args:
        reports: the reports of all epochs, in order.
        parent: the record of the stage before.
        source: the number of the stage from whose store this one was trained.
        is_output: whether it is the output layer.
        seconds: the time of training and of writing the store.
        store: the record of its store, if it has one.
        written_before: bytes of stores that were written for this stage earlier.
    """
    last = reports[-1]
    rows = sum(report.images_per_second * report.seconds for report in reports)
    return StageRecord(
        stage=learner.stage.number,
        name=OUTPUT if is_output else learner.stage.name,
        lineage=_lineage(directory, recipe, choices, parent, source),
        recipe_digest=parent.recipe_digest,
        layers=learner.stage.kinds,
        parent=Parent(stage=parent.stage, lineage=parent.lineage),
        source=source,
        row_shape=shapes.output,
        class_names=parent.class_names,
        network=parent.network,
        resolved=choices,
        metrics=Metrics(
            train_error_percent=last.train_error_percent,
            test_error_percent=last.test_error_percent,
            train_loss=last.loss,
        ),
        store=store,
        written_before=written_before,
        rows=parent.rows,
        seconds=seconds,
        images_per_second=rows / sum(report.seconds for report in reports),
        processes=list(dict.fromkeys(n for report in reports for n in report.processes)),
        peak_memory_bytes=peak_memory(learner.device),
        versions=versions(),
        device=device_name(learner.device),
    ).write(directory)


def _lineage(
    directory: Path, recipe: Recipe, choices: Choices, parent: StageRecord, source: int
) -> str:
    """Hashes everything that decides the stage's output."""
    return digest(
        canonical_json(
            {
                "weights": file_digest(directory / ENCODER),
                "parent": parent.lineage,
                "source": source,
                "seed": recipe.seed,
                "views": choices.views,
                "refresh_every": choices.reuse,  # under its former name
                "encoding": choices.encoding,
            }
        )
    )
