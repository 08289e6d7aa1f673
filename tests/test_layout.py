"""The layout of feature maps in frozen stages on a CPU."""

from pathlib import Path

import pytest
import timm
import torch
from small_training import TEST, TRAIN, convolutional, new_trainer, same, weights
from torch import nn
from torchvision.models.resnet import BasicBlock

from greedy.models import Stage, cut, memory_format, sequential, stages
from greedy.models.memory_format import placed
from greedy.runs.network import load_stage, stages_of
from greedy.runs.state import RunState
from greedy.stores.channels_last import ChannelsLast, laid_out, takes_channels_last
from greedy.stores.source import Replayed

RING = {"augmentation": "hflip", "views": 2, "reuse": 1, "epochs": 4}


class Viewed(nn.Module):
    """Asks for maps in the usual layout, as much code of users does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1)


def as_on_a_gpu(values: torch.Tensor) -> torch.Tensor:
    """Returns tensors in the layout that a GPU prefers."""
    fast = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    return values.contiguous(memory_format=fast)


def stage(*modules: nn.Module) -> Stage:
    return Stage(1, nn.Sequential(*modules), nn.Sequential()).eval().requires_grad_(False)


class Written(nn.Module):
    """A block whose own code asks for the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).view(x.size(0), -1)


class Own(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).view(len(x), -1)


def hooked() -> Stage:
    made = stage(nn.Conv2d(3, 4, 3), nn.ReLU())
    made.layer[1].register_forward_hook(lambda module, x, y: y)
    return made


@pytest.mark.parametrize(
    ("made", "device", "takes"),
    [
        (stage(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "cpu", True),
        (stage(BasicBlock(4, 4)), "cpu", True),
        (stage(timm.models.resnet.BasicBlock(4, 4)), "cpu", True),
        (stage(nn.Conv2d(3, 4, 3), nn.ReLU()), "cuda", False),
        (stage(nn.Flatten(), nn.Linear(48, 4), nn.ReLU()), "cpu", False),
        (stage(nn.Conv2d(3, 4, 3), Viewed()), "cpu", False),
        (hooked(), "cpu", False),
        (stage(torch.fx.symbolic_trace(Written())), "cpu", False),
        (stage(nn.utils.parametrizations.weight_norm(Own(3, 4, 3))), "cpu", False),
        (stage(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), "cpu", True),
    ],
    ids=[
        *("convolution", "block", "block of timm", "cuda", "linear", "view", "hook"),
        *("traced", "own-parametrised", "parametrised"),
    ],
)
def test_modules_that_take_any_layout_get_the_fast_one(
    made: Stage, device: str, takes: bool
) -> None:
    assert takes_channels_last(made, device) == takes


def test_the_layout_changes_rounding_alone() -> None:
    """The third of four stages needs the usual layout, which it gets."""
    torch.manual_seed(0)
    stages = [
        stage(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.MaxPool2d(2)),
        stage(BasicBlock(8, 8)),
        stage(nn.Conv2d(8, 4, 3, padding=1), Viewed(), nn.Unflatten(1, (4, 4, 4))),
        stage(nn.Conv2d(4, 4, 3), nn.Tanh()),
    ]
    takes = [takes_channels_last(each, "cpu") for each in stages]
    assert takes == [True, True, False, True]
    chain = laid_out(stages, takes)
    assert [type(each) for each in chain] == [ChannelsLast, Stage, ChannelsLast]
    images = torch.randn(10, 3, 8, 8)
    usual = Replayed(stages, 4, "float32").outputs(images)
    fast = Replayed(chain, 4, "float32").outputs(images)
    assert fast.is_contiguous() and fast.dtype == torch.float32
    torch.testing.assert_close(fast, usual, atol=1e-5, rtol=1e-5)


def test_a_run_keeps_to_the_layout_that_it_has_recorded(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", convolutional(), **RING).fit(TRAIN, TEST)
    trainer = new_trainer(tmp_path / "run", convolutional(), **RING)
    recorded = [trainer.run.record(number).choices.channels_last for number in (1, 2, 3)]
    assert recorded == [True, False, False]
    before = weights(tmp_path / "run", 2)
    shard = tmp_path / "run/stage1/activations.zarr/train/activations/c.1.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    repairs, left = trainer.repair([1])
    assert not left and [repair.identical for repair in repairs] == [True]
    trainer.train_stage(2, again=True)
    assert same(weights(tmp_path / "run", 2), before)


def test_code_that_asks_for_the_usual_layout_trains_in_a_ring(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Viewed()),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    trainer = new_trainer(tmp_path / "run", network, **RING)
    trainer.fit(TRAIN, TEST)
    assert not trainer.run.record(1).choices.channels_last
    assert len(cut(network)) == 3


def test_frozen_weights_have_the_layout_that_their_device_prefers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )
    trainer = new_trainer(tmp_path / "run", model, epochs=1)
    trainer.fit(TRAIN, TEST)
    state = RunState.read(trainer.run)
    second = stages_of(state, model)[1]

    monkeypatch.setattr(memory_format, "preferred_layout", as_on_a_gpu)
    load_stage(state, second, torch.device("cpu"))
    weight = second.layer[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert same(second.state_dict(), weights(tmp_path / "run", 2))


def test_stages_that_look_at_the_layout_get_the_usual_one_on_every_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other stages have channels-last maps and weights on a GPU."""

    class Tutorial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
            self.full = nn.Linear(8 * 2 * 2, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.max_pool2d(self.conv1(x).relu(), 2)
            x = torch.max_pool2d(self.conv2(x).relu(), 2)
            return self.full(x.view(-1, 8 * 2 * 2))

    torch.manual_seed(0)
    network = Tutorial()
    images = torch.randn(4, 3, 14, 14)
    expected = network(images)
    monkeypatch.setattr(memory_format, "preferred_layout", as_on_a_gpu)
    monkeypatch.setattr(stages, "usual_layout", torch.Tensor.contiguous)
    made = [placed(each, torch.device("cpu")) for each in cut(sequential(network, (3, 14, 14)))]
    assert not all(each.any_layout for each in made)
    x = as_on_a_gpu(images)
    for each in made:
        x = each(as_on_a_gpu(x) if x.dim() == 4 else x)
    torch.testing.assert_close(x, expected)


def test_on_a_cpu_nothing_is_copied() -> None:
    """A block that gives channels-last maps, as ConvNeXt's does, is followed by one that takes
    them as they are: with the same digits as ever."""

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    own = stage(Permuted())
    assert not own.any_layout
    maps = own(torch.randn(2, 4, 5, 5))
    assert not maps.is_contiguous()
    assert own.arranged(maps) is maps
