"""The micro-batched step gives the gradients of the whole batch."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from greedy.losses import Pred, PredSim, Sim
from greedy.models import Stage, cut, shapes
from greedy.source import Batch
from greedy.training.modes import Mode, StepMemory
from greedy.training.step import Learner, gradients

ROWS, CLASSES = 12, 4
LOSSES = {"pred": Pred(pool_target=32), "sim": Sim(), "predsim": PredSim(0.9, pool_target=32)}
INPUTS = {"conv": (5, 7, 6), "strided": (5, 7, 6), "linear": (9,), "flattened": (3, 2, 2)}
MICRO_MODES = [mode for mode in Mode if mode is not Mode.PLAIN]


def make_stage(kind: str) -> Stage:
    """The second stage of a small network, so that its input has dropout."""
    layers = {
        "conv": [nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.01)],
        "strided": [nn.Conv2d(5, 6, 5, stride=2, padding=2), nn.BatchNorm2d(6), nn.ReLU(True)],
        "linear": [nn.Linear(9, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.01)],
        "flattened": [nn.Linear(12, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU()],
    }[kind]
    first = nn.Linear(9, 9) if kind == "linear" else nn.Conv2d(5, 5, 1)
    entry = [nn.Dropout(0.5)] if kind == "linear" else [nn.Dropout2d(0.5)]
    entry += [nn.Flatten()] if kind == "flattened" else []
    return cut(nn.Sequential(first, *entry, *layers, nn.Flatten(), nn.Linear(8, CLASSES)))[1]


def make_learner(
    kind: str, loss, dtype: torch.dtype = torch.float64, precision: str = "float32"
) -> Learner:
    torch.manual_seed(0)
    stage = make_stage(kind)
    hidden = shapes([stage], INPUTS[kind])[0].hidden
    learner = Learner(stage, loss.heads(hidden, CLASSES), loss, CLASSES, precision)
    for module in (learner.stage, learner.heads):
        module.to(dtype)
        for parameter in module.parameters():  # heads and batch norm begin at 0 and 1
            nn.init.normal_(parameter, std=0.3)
    learner.train()
    return learner


def make_batch(kind: str, learner: Learner, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(1)
    dtype = next(learner.stage.parameters()).dtype
    x = torch.randn((rows, *INPUTS[kind]), generator=generator).to(dtype)
    assert learner.stage.dropout is not None
    mask = learner.stage.dropout.mask(rows, INPUTS[kind], generator).to(dtype)
    return Batch(torch.randint(CLASSES, (rows,), generator=generator), x.__getitem__, mask)


def measured(learner: Learner, batch: Batch, memory: StepMemory) -> dict[str, torch.Tensor]:
    """Loss, gradients and what the batch leaves behind, of a copy."""
    learner = deepcopy(learner)
    learner.memory = memory
    loss, logits = gradients(learner, batch)
    found = {"loss": loss} | ({} if logits is None else {"logits": logits})
    for name, module in (("stage", learner.stage), ("heads", learner.heads)):
        found |= {f"{name}.{k}.grad": p.grad for k, p in module.named_parameters()}
        found |= {f"{name}.{k}": b for k, b in module.named_buffers()}
    return found


@pytest.mark.parametrize("mode", MICRO_MODES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_mode_gives_what_autograd_gives(kind: str, loss: str, mode: Mode) -> None:
    learner = make_learner(kind, LOSSES[loss])
    batch = make_batch(kind, learner)
    expected = measured(learner, batch, StepMemory(Mode.PLAIN))
    for micro_batch in (1, 4, 5, 100):
        assert_same(measured(learner, batch, StepMemory(mode, micro_batch)), expected)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        worst = float((found[name] - value).abs().max())
        assert worst <= 1e-10 * max(1.0, float(value.abs().max())), name
