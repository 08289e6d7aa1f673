"""Convolutions of small maps as matrix products."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from interrupting import Listener
from small_training import CLASSES, noise
from small_training import new_trainer as small_trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from greedy import GreedyTrainer, Reporter
from greedy.base.errors import Interrupted
from greedy.base.precision import autocast
from greedy.losses import PredSim
from greedy.memory.choice import fused_adam
from greedy.memory.counting import Counter
from greedy.memory.peaks import StepDemand
from greedy.models import cut, shapes
from greedy.runs.choices import Mode, StepMemory
from greedy.steps import unfolded
from greedy.steps.step import Learner, gradients
from greedy.steps.unfolded import Unfolded
from greedy.stores.source import Batch

SMALL = [(4, 4), (1, 1), (2, 3), (1, 4), (4, 2)]
RUNS = "whole", "resumed"
DATA = noise(32), noise(8)
BFLOAT16 = float(torch.finfo(torch.bfloat16).eps)


def computed(layer: nn.Module, x: Tensor, precision: str, *, products: bool) -> list[Tensor]:
    """Returns a layer's output, and the gradients of its input and parameters."""
    layer, x = deepcopy(layer), x.clone().requires_grad_()
    with autocast("cpu", precision):
        if products:
            with Unfolded():
                out = layer(x)
        else:
            out = layer(x)
    slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(slopes.to(out.dtype))
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


def far(actual: Tensor, expected: Tensor) -> float:
    """Returns the distance of two tensors as a share of the second."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SMALL)
def test_products_err_as_little_as_convolutions_in_bfloat16(
    size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(260, 270, 3, padding=1, bias=bias)
    x = torch.randn(5, 260, *size)
    exact = computed(layer, x, "float32", products=False)
    usual = computed(layer, x, "bfloat16", products=False)
    products = computed(layer, x, "bfloat16", products=True)
    for product, convolution, truth in zip(products, usual, exact, strict=True):
        assert product.dtype == convolution.dtype
        assert far(product, truth) <= 1.2 * far(convolution, truth) + BFLOAT16 / 4


def test_large_batches_are_unfolded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfolded, "UNFOLDED_VALUES", 2 * 9 * 256 * 16)  # two rows at a time
    torch.manual_seed(0)
    layer, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(5, 256, 4, 4)
    exact = computed(layer, x, "float32", products=False)
    for product, truth in zip(computed(layer, x, "bfloat16", products=True), exact, strict=True):
        assert far(product, truth) <= BFLOAT16


@pytest.mark.parametrize(
    ("layer", "size", "precision"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), (5, 4), "bfloat16"),
        (nn.Conv2d(256, 256, 3, padding=1), (4, 4), "float32"),
        (nn.Conv2d(255, 256, 3, padding=1), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 255, 3, padding=1), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 256, 3, padding=1), (1, 16), "bfloat16"),
        (nn.Conv2d(256, 256, 3, padding=1, stride=2), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 256, 3, padding=2, dilation=2), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 512, 3, padding=1, groups=2), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 256, 3), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 256, 3, padding="same"), (4, 4), "bfloat16"),
        (nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular"), (2, 2), "bfloat16"),
        (nn.Conv2d(256, 256, 1), (4, 4), "bfloat16"),
        (nn.ConvTranspose2d(256, 256, 3, padding=1), (4, 4), "bfloat16"),
    ],
    ids=str,
)
def test_other_convolutions_are_as_ever(
    layer: nn.Conv2d, size: tuple[int, int], precision: str
) -> None:
    x = torch.randn(3, layer.in_channels, *size, generator=torch.Generator().manual_seed(1))
    usual = computed(layer, x, precision, products=False)
    for value, expected in zip(computed(layer, x, precision, products=True), usual, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


LAYER = nn.Conv2d(256, 256, 3, padding=1).bfloat16()
MAPS = torch.ones(2, 256, 4, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "x",
    [MAPS[0], MAPS[:0], MAPS.to("meta"), MAPS.float(), MAPS.double(), MAPS[:, :255]],
    ids=["one map", "no map", "other device", "other precision", "float64", "other channels"],
)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_unusual_inputs_give_what_they_ever_gave(x: Tensor, is_autocast: bool) -> None:
    layer = deepcopy(LAYER).to(x.device)

    def outcome() -> Tensor | str:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            try:
                return layer(x)
            except RuntimeError as error:
                return str(error)

    expected = outcome()
    with Unfolded():
        found = outcome()
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.is_meta or torch.allclose(found, expected, rtol=0.02)


def test_gradients_of_gradients_are_right() -> None:
    torch.manual_seed(0)
    layer, maps = nn.Conv2d(256, 256, 3, padding=1), torch.randn(2, 256, 4, 4)

    def penalised(precision: str, context: AbstractContextManager) -> Tensor:
        own, x = deepcopy(layer), maps.clone().requires_grad_()
        with context, autocast("cpu", precision):
            out = own(x).float()
        (slope,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        (slope**2).sum().backward()
        assert own.weight.grad is not None
        return own.weight.grad

    exact = penalised("float32", nullcontext())
    assert far(penalised("bfloat16", Unfolded()), exact) <= 3 * BFLOAT16


def stage_gradients(
    layers: list[nn.Module], memory: StepMemory, precision: str, *, unfolds: bool
) -> dict[str, Tensor]:
    """Returns the gradients of a stage over maps of 4x4, and of its heads."""
    torch.manual_seed(0)
    stage = cut(nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, CLASSES)), 2)[0]
    loss = PredSim(pool_target=512)
    learner = Learner(stage, loss.heads((256, 4, 4), CLASSES), loss, CLASSES, precision)
    for parameter in learner.heads.parameters():  # the classifier begins at 0
        nn.init.normal_(parameter, std=0.1)
    learner.memory, learner.unfolds = memory, unfolds
    learner.train()
    x = torch.randn(8, 256, 4, 4)
    gradients(learner, Batch(torch.arange(8) % CLASSES, x.__getitem__))
    modules = {"stage": learner.stage, "heads": learner.heads}
    return {f"{m}.{k}": p.grad for m in modules for k, p in modules[m].named_parameters()}


class Convolutions(TorchDispatchMode):
    """The names of torch's operators of convolutions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Gradients for all outputs alike, one product, are computed as ever.
        if "conv" in (name := function.name()) and len(args[2]) > 1:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def convolution(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("is_block", [False, True])
def test_every_mode_computes_products(is_block: bool, mode: Mode) -> None:
    layers = [*convolution(256, 256), *(convolution(256, 256) if is_block else [])]
    plain = StepMemory(Mode.PLAIN)
    exact = stage_gradients(layers, plain, "float32", unfolds=False)
    usual = stage_gradients(layers, StepMemory(mode, 3), "bfloat16", unfolds=False)
    seen = Convolutions()
    with seen:
        products = stage_gradients(layers, StepMemory(mode, 3), "bfloat16", unfolds=True)
    assert not seen.names
    for name, truth in exact.items():
        error = far(usual[name], truth)
        assert far(products[name], truth) <= 2 * error + BFLOAT16, name


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 256, 2, 2), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(4)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(256, CLASSES))


def new_trainer(run: Path, reporter: Reporter | None = None) -> GreedyTrainer:
    settings = {"precision": "bfloat16", "views": 1, "checkpoint_minutes": 0}
    return small_trainer(run, network(), reporter=reporter, **settings)


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.KEEP_C, Mode.KEEP_NOTHING])
def test_the_plan_counts_what_products_take(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfolded, "has_amx", lambda: True)
    network = nn.Sequential(*convolution(256, 256), nn.Flatten(), nn.Linear(256 * 16, CLASSES))
    stage = cut(network)[0]
    loss, memory = PredSim(pool_target=512), StepMemory(mode, 4)
    shape = shapes([stage], (256, 4, 4))[0]
    learner = Learner(stage, loss.heads((256, 4, 4), CLASSES), loss, CLASSES, "bfloat16")
    learner.memory, learner.unfolds = memory, True
    learner.train()
    batch = Batch(torch.arange(16) % CLASSES, torch.randn(16, 256, 4, 4).__getitem__)
    gradients(learner, batch)
    with Counter() as counter:
        counter.add([t for p in learner.parameters() for t in (p, p.grad) if t is not None])
        gradients(learner, batch)
    demand = StepDemand(stage, shape, loss, CLASSES, 16, "bfloat16", fused_adam, "cpu", 0)
    planned = demand.peak(memory) - 2 * sum(4 * p.numel() for p in learner.parameters())  # moments
    assert 0.95 * counter.peak <= planned <= 1.25 * counter.peak


class Within(nn.Module):
    """A convolution within something else of torch's."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.around = nn.Conv2d(256, 256, 3, padding=1), around

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.layer, x)


def computed_again(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def mapped(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(layer, chunk_size=len(x))(x[:, None])[:, 0]


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape)


@pytest.mark.parametrize("mode", Mode)
def test_outputs_are_changed_in_place_and_viewed_flat(mode: Mode) -> None:
    layers = [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), Flat()]
    layers += [nn.Conv2d(256, 256, 3, padding=1), nn.LeakyReLU(0.1, inplace=True)]
    exact = stage_gradients(layers, StepMemory(Mode.PLAIN), "float32", unfolds=False)
    products = stage_gradients(layers, StepMemory(mode, 3), "bfloat16", unfolds=True)
    assert all(far(products[name], truth) < 0.1 for name, truth in exact.items())


@pytest.mark.parametrize(
    ("around", "mode"),
    [(computed_again, Mode.PLAIN), (computed_again, Mode.KEEP_NOTHING), (mapped, Mode.PLAIN)],
)
def test_what_torch_computes_in_other_ways_is_as_ever(
    around: Callable[[nn.Module, Tensor], Tensor], mode: Mode
) -> None:
    layers = [Within(around), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
    exact = stage_gradients(layers, StepMemory(Mode.PLAIN), "float32", unfolds=False)
    products = stage_gradients(layers, StepMemory(mode, 3), "bfloat16", unfolds=True)
    assert all(far(products[name], truth) < 0.1 for name, truth in exact.items())


def unfold(run: Path, stage: int) -> bool | None:
    """Returns what was decided of a stage's small maps; ``None`` for nothing."""
    record = json.loads((run / f"stage{stage}/stage.json").read_text())
    return record["resolved"].get("unfold")


def test_a_stage_goes_on_as_it_began_on_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfolded, "has_amx", lambda: True)
    new_trainer(tmp_path / "whole").fit(*DATA)
    chosen = [unfold(tmp_path / "whole", number) for number in (1, 2)]
    assert chosen == [True, None]  # maps of 4x4, and none
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "resumed", Listener(interrupted=1)).fit(*DATA)
    monkeypatch.setattr(unfolded, "has_amx", lambda: False)
    new_trainer(tmp_path / "resumed").fit(*DATA)
    for name in ("encoder", "heads"):
        whole, resumed = (tmp_path / run / f"stage1/{name}.safetensors" for run in RUNS)
        assert resumed.read_bytes() == whole.read_bytes()
