"""The time of a step in each memory mode, compared with the plain step of the same stage.

For stages of VGG11B(3x) on CIFAR-10 shapes: the modes that are chosen for a batch of 128 rows under
768 MiB and under 1.5 GiB in float32. Interleaved steps on fewer rows, in micro-batches of the
chosen size, are timed; a ratio is that of medians.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence

import click
import torch
from torch import nn

from greedy.losses import PredSim
from greedy.memory.choice import Choice, choose, fused_adam
from greedy.memory.peaks import StepDemand
from greedy.models import Stage, StageShapes, cut, shapes, vgg11b
from greedy.runs.choices import StepMemory
from greedy.steps.guard import Guard
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

CLASSES, BATCH = 10, 128
BUDGETS = {"768MiB": (768 * 2**20, 1.9), "1.5GiB": (1536 * 2**20, 1.35)}


def network(multiplier: float) -> list[tuple[Stage, StageShapes]]:
    """Returns the stages on the meta device, with their shapes."""
    with torch.device("meta"):
        stages = cut(vgg11b(3, 32, CLASSES, feature_multiplier=multiplier, dropout=0.2))
    return list(zip(stages, shapes(stages, (3, 32, 32)), strict=True))


def chosen(stage: Stage, shape: StageShapes, budget: int) -> Choice:
    """Returns the mode for a whole batch on a device with its own memory."""
    what = (stage, shape, PredSim(), CLASSES, BATCH, "float32", fused_adam, "meta")
    return choose(StepDemand(*what, math.prod(shape.input)), budget)


def learner(stage: Stage, shape: StageShapes) -> Learner:
    """Returns a stage with weights, ready to train."""
    loss = PredSim()
    stage = stage.to_empty(device="cpu")
    for module in stage.layer:
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()
    learner = Learner(stage, loss.heads(shape.hidden, CLASSES), loss, CLASSES, "float32")
    learner.optimizer = torch.optim.Adam(learner.parameters(), lr=5e-4, fused=True)
    learner.train()
    return learner


def seconds(
    learning: Learner, batch: Batch, memories: Sequence[StepMemory], repetitions: int
) -> list[float]:
    """Measures the median time of a step in each memory mode, in seconds."""
    times: list[list[float]] = [[] for _ in memories]
    for _ in range(repetitions + 1):  # the first warms up
        for memory, taken in zip(memories, times, strict=True):
            learning.memory = memory
            start = time.perf_counter()
            step(learning, batch, Guard(), 0)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--rows", default=16, show_default=True, help="Rows in the batch that is timed.")
@click.option("--repetitions", default=3, show_default=True)
@click.option("--multiplier", default=3.0, show_default=True, help="Factor on all channels.")
@click.option("--stages", default="2,4,6,7", show_default=True, help="Numbers of the stages.")
def main(as_json: bool, rows: int, repetitions: int, multiplier: float, stages: str) -> None:
    """Time the memory modes."""
    results = []
    all_stages = network(multiplier)
    for number in map(int, stages.split(",")):
        stage, shape = all_stages[number - 1]
        choices = {name: chosen(stage, shape, budget) for name, (budget, _) in BUDGETS.items()}
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((rows, *shape.input), generator=generator)
        batch = Batch(torch.randint(CLASSES, (rows,), generator=generator), x.__getitem__)
        memories = [StepMemory(c.mode, min(c.micro_batch, rows // 2)) for c in choices.values()]
        times = seconds(learner(stage, shape), batch, [StepMemory(), *memories], repetitions)
        for (name, choice), memory, taken in zip(choices.items(), memories, times[1:], strict=True):
            ratio = round(taken / times[0], 3)
            row = {"stage": number, "name": stage.name, "budget": name, "mode": choice.mode}
            row |= {"micro_batch": memory.micro_batch, "peak_memory_bytes": choice.peak_bytes}
            results.append(row | {"ratio_plain": ratio, "target": BUDGETS[name][1]})
            if not as_json:
                click.echo(f"{number} {stage.name} {name}: {memory.mode}, {ratio:.2f} times plain")
    if as_json:
        click.echo(json.dumps({"rows": results}))


if __name__ == "__main__":
    main()
