"""Training in float16."""

import pytest
import torch
from torch import nn

from greedy.losses import PredSim
from greedy.models import cut
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.guard import Guard
from greedy.steps.scaling import FIRST, GROWTH_INTERVAL, LEAST, LossScale
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

CLASSES = 3


def make_learner(optimizer=torch.optim.Adam, **settings) -> Learner:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    stage = cut(nn.Sequential(*network, nn.Flatten(), nn.Linear(6 * 36, CLASSES)))[0]
    loss = PredSim(beta=0.5)
    scale = LossScale()
    learner = Learner(stage, loss.heads((6, 6, 6), CLASSES), loss, CLASSES, "float16", scale=scale)
    learner.optimizer = optimizer(learner.parameters(), lr=0.01, **settings)
    learner.train()
    return learner


def make_batch() -> Batch:
    x = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return Batch(torch.arange(12) % CLASSES, x.__getitem__)


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.parameters()]


def unchanged(learner: Learner, before: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, learner.parameters(), before))


OPTIMIZERS = [(torch.optim.Adam, {"fused": True}), (torch.optim.SGD, {})]


@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.KEEP_C, Mode.KEEP_NOTHING])
def test_a_gradient_that_overflows_leaves_the_step_out_and_halves_the_scale(
    optimizer, settings, mode: Mode
) -> None:
    learner, guard = make_learner(optimizer, **settings), Guard()
    learner.memory = StepMemory(mode, 4)
    before = weights(learner)
    learner.scale.factor.fill_(2.0**40)
    for position in range(30):
        step(learner, make_batch(), guard, position)
    assert not unchanged(learner, before)
    assert FIRST / 64 < learner.scale.factor < 2.0**30
    assert guard.step is None


def test_the_scale_doubles_after_many_steps_and_changes_no_gradient() -> None:
    learner, guard = make_learner(fused=True), Guard()
    learner.scale.steps.fill_(GROWTH_INTERVAL - 2)
    factors = []
    for position in range(3):
        step(learner, make_batch(), guard, position)
        factors.append(float(learner.scale.factor))
    assert factors == [FIRST, 2 * FIRST, 2 * FIRST]
    assert learner.scale.steps == 1
    largest = max(float(p.grad.abs().max()) for p in learner.parameters())
    assert 0 < largest < FIRST / 8  # what is left of a scaled gradient would be more


@pytest.mark.parametrize("cause", ["loss", "scale"])
def test_what_no_scale_helps_is_noted(cause: str) -> None:
    learner, guard = make_learner(fused=True), Guard()
    before = weights(learner)
    batch = make_batch()
    if cause == "loss":
        batch = Batch(batch.labels, lambda rows: torch.full((12, 3, 6, 6), float("inf"))[rows])
    else:
        learner.scale.factor.fill_(LEAST)
        learner.heads.prediction.classifier.bias.register_hook(lambda g: g * float("inf"))
    step(learner, batch, guard, 6)
    assert guard.step == 7
    assert unchanged(learner, before)


def test_float16_learns_as_float32_does() -> None:
    def losses(learner: Learner) -> torch.Tensor:
        return torch.stack([step(learner, make_batch(), Guard(), i)[0] for i in range(60)])

    wide = make_learner(fused=True)
    wide.precision, wide.scale = "float32", None
    expected, actual = losses(wide), losses(make_learner(fused=True))
    assert expected[-1] < expected[0] / 2
    assert actual[-1] < actual[0] / 2
    assert (actual[0] - expected[0]).abs() < 16 * torch.finfo(torch.float16).eps * expected[0]
