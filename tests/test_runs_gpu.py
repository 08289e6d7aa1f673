"""Whole runs, and gradients of blocks, on a GPU."""

from pathlib import Path

import pytest
import torch
from block_kinds import BLOCKS, LOSSES, MAPS, TOKENS, assert_same, by_autograd, data, measured
from block_kinds import with_head as made
from interrupting import StopAfter
from small_training import CLASSES, SIDE, TEST, TRAIN, new_trainer, same, weights
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import greedy
from greedy.base.errors import Interrupted
from greedy.losses import Features, PredSim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
RING = {"augmentation": "hflip", "views": 2, "reuse": 1, "epochs": 4}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_gets_what_autograd_gives(block: str, loss: str) -> None:
    shape = TOKENS if block == "transformer" else MAPS
    x, y = (values.detach().to(DEVICE) for values in data(shape))
    module = made(BLOCKS[block](), shape).to(DEVICE)
    x.requires_grad_()
    expected = measured(by_autograd, module, LOSSES[loss], x, y)
    for micro_batch in (5, 100):
        assert_same(measured(greedy.exact.step, module, LOSSES[loss], x, y, micro_batch), expected)


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
    return nn.Sequential(first, BasicBlock(64, 64), last)


@pytest.mark.parametrize("budget", ["auto", "47MiB"])
def test_a_stopped_run_goes_on_to_the_same_weights(budget: str, tmp_path: Path) -> None:
    """With the budget, 33 MiB of which are for CUDA's libraries, the second stage has not enough
    memory for a step of a whole batch."""
    settings = RING | {"device": DEVICE, "deterministic": True, "batch_size": 128}
    settings |= {"precision": "float32", "memory_budget": budget}
    records = new_trainer(tmp_path / "whole", residual(), **settings).fit(TRAIN, TEST)
    assert (records[1].choices.memory_mode == "plain") == (budget == "auto")
    stopped = new_trainer(tmp_path / "run", residual(), **settings, reporter=StopAfter(20))
    with pytest.raises(Interrupted):
        stopped.fit(TRAIN, TEST)
    new_trainer(tmp_path / "run", residual(), **settings).fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        assert same(weights(tmp_path / "run", stage), weights(tmp_path / "whole", stage))


class Tutorial(nn.Module):
    """Asks for feature maps in the usual layout, as much code does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.full = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * SIDE * SIDE, 16)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().view(-1, 4 * SIDE * SIDE)
        return self.last(self.full(x).relu())


class Weighed(PredSim):
    """Looks at numbers of the device, which a graph cannot do."""

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        loss = super().__call__(features, y)
        return loss * 2 if float(loss.detach()) > 1 else loss


@pytest.mark.parametrize("own", [Tutorial, Weighed])
def test_code_of_users_is_trained(own: type, tmp_path: Path) -> None:
    given = {"loss": own()} if own is Weighed else {}
    model = own() if own is Tutorial else residual()
    records = new_trainer(tmp_path / "run", model, device=DEVICE, **RING, **given).fit(TRAIN, TEST)
    assert all(record.choices.memory_mode == "plain" for record in records)


def test_a_damaged_store_is_restored_to_the_same_bytes(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", residual(), device=DEVICE, deterministic=True, **RING)
    trainer.fit(TRAIN, TEST)
    shard = tmp_path / "run/stage1/activations.zarr/train/activations/c.1.0.0.0.0"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    repairs, left = trainer.repair([1])
    assert not left
    assert [repair.identical for repair in repairs] == [True]
