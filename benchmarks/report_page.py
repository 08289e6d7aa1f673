"""The size of the page of `greedy report` about a run of 10 stages and 400 epochs, and the time
that headless Chromium takes to draw it.

The run is made up: a small network is trained for one epoch, then histories of 400 epochs are
written. Drawing is timed from opening the page until every chart is drawn; the first time is not
counted.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from chromium import Browser

from greedy.data import load_dataset
from greedy.recipes import load
from greedy.report import write_report
from greedy.runs.directory import RunDirectory
from greedy.runs.events import EpochReport
from greedy.runs.record import HISTORY, Metrics, StageRecord
from greedy.trainer import GreedyTrainer
from greedy.training.finish import history_line

STAGES, EPOCHS = 10, 400
MOST_BYTES, MOST_SECONDS = 5e6, 2.0
SETTINGS = [
    "data.name=fashion-mnist-sample",
    f"model.hidden_layers={STAGES - 1}",
    "model.hidden_width=64",
    "store.views=1",
]


def made_up_run(path: Path) -> RunDirectory:
    """Writes and returns a run of 10 stages, each with a history of 400 epochs."""
    short, whole = (
        load("fashion-mnist/mlp-predsim", [*SETTINGS, f"training.epochs={epochs}"])
        for epochs in (1, EPOCHS)
    )
    trainer = GreedyTrainer.from_recipe(short, path, device="cpu")
    trainer.prepare(load_dataset(short.data.name))
    trainer.train()
    run = RunDirectory(path, whole)
    run.write_recipe()
    generator = np.random.default_rng(0)
    for number in range(STAGES + 1):
        record = StageRecord.read(run.stage_dir(number))
        changes: dict[str, Any] = {"recipe_digest": run.recipe_digest}
        if number:
            reports = _history(generator)
            lines = "".join(map(history_line, reports))
            (run.stage_dir(number) / HISTORY).write_text(lines, encoding="utf-8")
            last = reports[-1]
            changes["metrics"] = Metrics(
                train_error_percent=last.train_error_percent,
                test_error_percent=last.test_error_percent,
                train_loss=last.loss,
            )
        record.model_copy(update=changes).write(run.stage_dir(number))
    return run


def _history(generator: np.random.Generator) -> list[EpochReport]:
    """Returns the reports of epochs in which errors fall, with noise."""
    falling = 5 + 40 * np.exp(-np.arange(EPOCHS) / 60)
    train, test = (falling * generator.uniform(0.9, 1.1, EPOCHS) for _ in range(2))
    return [
        EpochReport(
            epoch=epoch,
            learning_rate=5e-4,
            loss=float(train[epoch - 1]) / 100,
            train_error_percent=float(train[epoch - 1]),
            holdout_loss=None,
            images_per_second=1e4,
            seconds=0.5,
            test_error_percent=float(test[epoch - 1]),
        )
        for epoch in range(1, EPOCHS + 1)
    ]


def draw(page: Path, times: int) -> list[int]:
    """Draws a page several times. Returns the milliseconds that each time but the first took."""
    with Browser() as browser:
        browser.size(1280, 900)
        return [browser.open_report(page) for _ in range(times + 1)][1:]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--times", default=5, show_default=True, help="How often to draw the page.")
def main(as_json: bool, times: int) -> None:
    """Print the page's size and drawing time, and their limits."""
    with tempfile.TemporaryDirectory() as directory:
        run = made_up_run(Path(directory) / "run")
        page = write_report([run], Path(directory) / "report.html", device="cpu")
        size, drawn = page.stat().st_size, draw(page, times)
    document = {
        "stages": STAGES,
        "epochs": EPOCHS,
        "page_bytes": size,
        "most_bytes": int(MOST_BYTES),
        "drawn_seconds": statistics.median(drawn) / 1000,
        "slowest_seconds": max(drawn) / 1000,
        "most_seconds": MOST_SECONDS,
        "met": size < MOST_BYTES and statistics.median(drawn) / 1000 < MOST_SECONDS,
    }
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo(
        f"{STAGES} stages, {EPOCHS} epochs: {size / 1e6:.2f} MB (under {MOST_BYTES / 1e6:g}), "
        f"drawn in {document['drawn_seconds']:.2f} s, at most {document['slowest_seconds']:.2f} "
        f"(under {MOST_SECONDS:g})"
    )


if __name__ == "__main__":
    main()
