"""What a step takes on a GPU, against what was planned."""

import pytest
import torch

from greedy.base.devices import (
    memory_limited,
    peak_memory,
    preferred_layout,
    reset_peak_memory,
)
from greedy.losses import PredSim
from greedy.memory.choice import choose, fused_adam
from greedy.memory.peaks import StepDemand
from greedy.models import cut, initialise, shapes, vgg8b
from greedy.models.memory_format import placed
from greedy.runs.choices import StepMemory
from greedy.steps.guard import Guard
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

MIB = 2**20
DEVICE = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.4])
def test_what_is_reserved_is_what_was_planned(precision: str, share: float) -> None:
    """A stage whose activations are most of what it takes keeps to its plan, and does not fall far
    below it."""
    with torch.device("meta"):
        stages = cut(vgg8b(3, 32, 10, dropout=0.2))
    stage, shape, loss = stages[1], shapes(stages, (3, 32, 32))[1], PredSim()
    what = (stage, shape, loss, 10, 256, precision, fused_adam, "cuda", 128 * 32 * 32)
    budget = int(share * choose(StepDemand(*what), None).peak_bytes)
    choice = choose(StepDemand(*what), budget)
    memory = StepMemory(choice.mode, choice.micro_batch)

    reset_peak_memory(DEVICE)
    initialise(stage, seed=0, zero=False)
    heads = placed(loss.heads(shape.hidden, 10), DEVICE)
    stage = placed(stage, DEVICE)
    learner = Learner(stage, heads, loss, 10, precision, memory=memory)
    learner.optimizer = torch.optim.Adam(learner.parameters(), fused=True)
    learner.train()
    stored = torch.randint(256, (256, *shape.input), dtype=torch.uint8)
    mask = stage.dropout.mask(256, shape.input, torch.Generator()).to(DEVICE)
    labels = torch.arange(256, device=DEVICE) % 10
    batch = Batch(
        labels, lambda rows: preferred_layout(stored[rows].to(DEVICE)).float() / 255, mask
    )
    with memory_limited(DEVICE, budget):
        for position in range(3):
            step(learner, batch, Guard(), position)
    assert learner.memory == memory
    reserved = peak_memory(DEVICE)
    assert 0.75 * choice.peak_bytes - 48 * MIB <= reserved <= budget
