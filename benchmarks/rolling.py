"""The time of an epoch whose source is a ring, compared with one whose views are frozen.

A run over random images of CIFAR-10's shape makes the frozen stages of VGG8B at half width and
their stores; each trains for one step. Then stages 2, 4 and 6 train from the store before them,
all in one process: an epoch with frozen views, one in which a view is drawn, and so on in turn.

- `ratio`: the median time of an epoch with a ring over that of one with frozen views. One in
  `--reuse` epochs begins with the exchange of a view, so that share of an exchange is added.
- `share_of_forward_pass`: the median time of computing the frozen stages for the rows that are
  drawn in an epoch, and nothing else, over that of an epoch with frozen views.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, RunState
from greedy.cache import BatchLoader
from greedy.data import dataset_from_torch
from greedy.recipes import Recipe, load
from greedy.runs.events import Reporter
from greedy.steps.strategies import Greedy
from greedy.stores.source import EpochBatches, Source
from greedy.training.learners import new_learner, new_optimizer
from greedy.training.loop import Epochs
from greedy.training.planning import StagePlanner
from greedy.training.schedule import Milestones

CLASSES = 10
EPOCHS = 100  # of the recipe, so that there is always a view to draw
TEST_ROWS = 16


def random_images(rows: int) -> TensorDataset:
    """Returns random images of CIFAR-10's shape with labels."""
    random = np.random.default_rng(rows)
    pixels = random.integers(0, 256, (rows, 3, 32, 32), np.uint8)
    labels = random.integers(0, CLASSES, rows)
    return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels))


@contextmanager
def one_step() -> Iterator[None]:
    """Makes every training inside end after the first epoch, of which it trains the last step."""
    whole_epoch, all_epochs = Source.epoch_batches, Epochs.__iter__

    def last_batch(source: Source, *which: Any, **settings: Any) -> EpochBatches:
        loader = whole_epoch(source, *which, **settings).loader
        assert isinstance(loader, BatchLoader)
        return whole_epoch(source, *which, **settings | {"start_batch": len(loader) - 1})

    def first_epoch(epochs: Epochs) -> Iterator[Any]:
        yield next(all_epochs(epochs))

    with (
        patch.object(Source, "epoch_batches", last_batch),
        patch.object(Epochs, "__iter__", first_epoch),
    ):
        yield


def prepare(recipe: Recipe, rows: int, last: int, directory: Path) -> StagePlanner:
    """Makes a run whose stages up to ``last`` were each trained for a step, and returns what plans
    the next."""
    trainer = GreedyTrainer.from_recipe(recipe, directory, device="cpu")
    trainer.prepare(dataset_from_torch(random_images(rows), random_images(TEST_ROWS)))
    with one_step():
        for number in range(1, last + 1):
            trainer.train_stage(number)
    return StagePlanner(trainer.run, None, trainer.loss, trainer.device, Reporter())


def measure(planner: StagePlanner, number: int, reuse: int, pairs: int) -> dict[str, Any]:
    """Measures stage ``number`` and returns its entry in the document to print."""
    recipe, state = planner.recipe, RunState.read(planner.run)
    directory = planner.run.stage_dir(number) / "training"
    stage = planner.stage(state, number, number - 1, 1, reuse, directory)
    with_ring, frozen = stage.source, replace(stage.source, ring=None)
    ring = with_ring.ring
    assert ring is not None
    images = ring.source
    what = (stage.stage, stage.shapes, stage.loss, CLASSES, recipe, stage.choices)
    learner = new_learner(*what, planner.device, zero=False)
    learner.optimizer = new_optimizer(learner.parameters(), recipe, number, None)
    rows = with_ring.stores["train"].rows
    batch, due = state.complete_record(number - 1).choices.write_batch, rows // reuse
    drawn = min(-(-due // batch) * batch, rows)  # in whole batches; a later epoch draws less

    def train(source: Source) -> None:
        once = recipe.model_copy(
            update={"training": recipe.training.model_copy(update={"epochs": 1})}
        )
        schedule, shape = Milestones(5e-4, 0.25, []), stage.shapes.input
        list(Epochs(Greedy(learner), source, [shape], schedule, once, Reporter(), None, 128, True))

    def compute() -> None:
        for part in images.view_batches("train", 1, batch, stop=drawn):
            part.inputs()

    with one_step():
        train(frozen)
    times = [
        [seconds(train, with_ring), seconds(train, frozen), seconds(compute)] for _ in range(pairs)
    ]
    ring.draw(reuse - 1, rows, rows)
    exchange = seconds(with_ring.advance_views, reuse)
    with_ring.end_drawing(finished=True)
    rolling, still, forward = (statistics.median(column) for column in zip(*times, strict=True))
    drawing = (rolling - still) * due / drawn + exchange / reuse
    return {
        "stage": number,
        "ratio": round(1 + drawing / still, 4),
        "share_of_forward_pass": round(forward * due / drawn / still, 4),
    }


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Measures the time of a call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--stages", default="2,4,6", show_default=True, help="Numbers of the stages.")
@click.option("--reuse", default=5, show_default=True, help="Epochs between two exchanges.")
@click.option("--rows", default=1280, show_default=True, help="Training images.")
@click.option("--pairs", default=2, show_default=True, help="Interleaved pairs of epochs.")
def main(as_json: bool, stages: str, reuse: int, rows: int, pairs: int) -> None:
    """Print the time of an epoch with a ring over that of one with frozen views."""
    numbers = [int(number) for number in stages.split(",")]
    recipe = load(
        "cifar10/vgg8b-predsim",
        [
            "model.feature_multiplier=0.5",
            f"training.epochs={EPOCHS}",
            "store.views=1",
            f"store.reuse={reuse}",
            "store.ram_budget='1B'",
        ],
    )
    with tempfile.TemporaryDirectory() as directory:
        planner = prepare(recipe, rows, max(numbers) - 1, Path(directory))
        found = [measure(planner, number, reuse, pairs) for number in numbers]
    if as_json:
        click.echo(json.dumps({"stages": found}))
        return
    for entry in found:
        click.echo(
            f"stage {entry['stage']}: {entry['ratio']:.3f} times an epoch with frozen views; the "
            f"forward pass takes {entry['share_of_forward_pass']:.1%} of one"
        )


if __name__ == "__main__":
    main()
