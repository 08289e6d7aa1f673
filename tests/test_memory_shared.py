"""Counts of memory that equal stages share."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from greedy.losses import PredSim
from greedy.memory.choice import fused_adam
from greedy.memory.counts import Counts
from greedy.memory.peaks import FrozenStages, StepDemand
from greedy.models import Stage, StageShapes, cut, resnet, shapes
from greedy.runs.choices import StepMemory

SIDE, CLASSES, ROWS = 8, 4, 3  # rows that frozen stages compute at a time


def stages() -> list[Stage]:
    """Returns 9 stages in three groups of equal ones."""
    with torch.device("meta"):
        return cut(resnet(num_classes=CLASSES, depth=20))[:-1]


def demand(
    network: list[Stage], sizes: list[StageShapes], number: int, precision: str, *, streamed: bool
) -> StepDemand:
    """Returns the demand of a stage behind the frozen ones before it."""
    frozen = FrozenStages(tuple(network[: number - 1]), sizes[0].input, ROWS, streamed)
    what = (PredSim(), CLASSES, 8, precision, fused_adam, "cpu", 3 * SIDE**2)
    stage, shape = network[number - 1], sizes[number - 1]
    return StepDemand(stage, shape, *what, replay=frozen if number > 1 else None)


def counted(each: StepDemand) -> list[int]:
    writing = [each.writing_peak(rows) for rows in (1, ROWS, 2 * ROWS + 1)]
    return [*writing, each.peak(StepMemory()), each.parameter_bytes()]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_equal_stages_share_is_what_each_takes(precision: str, streamed: bool) -> None:
    network, counts = stages(), Counts()
    sizes = shapes(network, (3, SIDE, SIDE))
    alone = stages()
    for number, stage in enumerate(alone):
        stage.layer.note = number  # so that no stage is like another one
    for number in (1, 2, 3, 4, 5, 7, 9):
        shared = demand(network, sizes, number, precision, streamed=streamed)
        own = demand(alone, sizes, number, precision, streamed=streamed)
        assert counted(replace(shared, counts=counts)) == counted(own)
    assert len(counts.passes) < 7 * len(network)


def test_a_stage_that_was_counted_is_not_computed_again() -> None:
    calls = []

    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x * 2

    layers = [nn.Sequential(nn.Linear(6, 6), Seen()) for _ in range(8)]
    network, counts = cut(nn.Sequential(*layers, nn.Linear(6, CLASSES)))[:-1], Counts()
    sizes = shapes(network, (6,))
    calls.clear()
    peaks = [
        replace(
            demand(network, sizes, number, "float32", streamed=False), counts=counts
        ).writing_peak(2)
        for number in range(1, 9)
    ]
    assert len(calls) == 3  # one stage with its heads and without, and one that is frozen
    assert len({after - before for before, after in pairwise(peaks[2:])}) == 1


def test_stages_of_other_settings_do_not_share_counts() -> None:
    class Wide(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, self.times).sum(1, keepdim=True) + x

    layers = [nn.Sequential(nn.Linear(6, 6), Wide(times)) for times in (1, 50)]
    network, counts = cut(nn.Sequential(*layers, nn.Linear(6, CLASSES)))[:-1], Counts()
    sizes = shapes(network, (6,))
    first, second = (
        StepDemand(stage, shape, PredSim(), CLASSES, 8, "float32", None, "cpu", 24, counts=counts)
        for stage, shape in zip(network, sizes, strict=True)
    )
    assert first.writing_peak(8) < second.writing_peak(8)
