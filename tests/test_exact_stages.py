"""Stages of several layers give the gradients of the whole batch in every memory mode."""

from copy import deepcopy

import pytest
import torch
from block_kinds import BLOCKS, PreActivation
from test_exact_step import CLASSES, MICRO_MODES, ROWS, assert_same, measured
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth

from greedy.losses import LocalHeads, Pred, PredSim
from greedy.memory.counting import Counter
from greedy.models import Stage, shapes
from greedy.models.stages import InputDropout
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.guard import Guard
from greedy.steps.scaling import LossScale
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

C, MAPS, TOKENS = 8, (8, 9, 9), (7, 8)
LOSS = PredSim(0.9, pool_target=32)


class NormedHeads(Pred):
    """A local classifier with batch norm."""

    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        conv = nn.Conv2d(shape[0], 6, 3, padding=1, bias=False)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
        return LocalHeads(prediction=nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(True), pool))


def flat_block() -> nn.Module:
    layers = [nn.Linear(648, 20), nn.BatchNorm1d(20), nn.ReLU(True), nn.Dropout(0.0)]
    return nn.Sequential(*layers, nn.Linear(20, 12), nn.BatchNorm1d(12), nn.LeakyReLU(0.1))


def overwritten() -> nn.Module:
    """Activations that write over the layers' outputs, which cannot be kept then."""
    layers = [nn.Conv2d(C, C, 3), nn.ReLU(True), nn.BatchNorm2d(C)]
    return nn.Sequential(*layers, nn.Conv2d(C, 6, 3, bias=False), nn.ReLU(True), nn.BatchNorm2d(6))


STAGES = BLOCKS | {
    "two pre-activation blocks": lambda: nn.Sequential(PreActivation(C), PreActivation()),
    "flattened": flat_block,
    "overwritten": overwritten,
}


def make_learner(
    block: nn.Module,
    loss=LOSS,
    shape: tuple[int, ...] = MAPS,
    dtype: torch.dtype = torch.float64,
    precision: str = "float32",
) -> Learner:
    torch.manual_seed(0)
    layer = nn.Sequential(block)
    flatten = any(isinstance(m, nn.Linear) for m in layer.modules()) and len(shape) == 3
    flatten = flatten and not any(isinstance(m, nn.Conv2d) for m in layer.modules())
    dropout = InputDropout(0.3, channels=len(shape) == 3)
    stage = Stage(2, layer, nn.Sequential(), flatten=flatten, dropout=dropout)
    hidden = shapes([stage], shape)[0].hidden
    learner = Learner(stage, loss.heads(hidden, CLASSES), loss, CLASSES, precision, shape=hidden)
    for module in (learner.stage, learner.heads):
        module.to(dtype)
    for module in (*learner.stage.modules(), *learner.heads.modules()):
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.Linear):  # the classifier begins at 0
            nn.init.normal_(module.weight, std=0.3)
    learner.train()
    return learner


def make_batch(learner: Learner, shape: tuple[int, ...] = MAPS, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(1)
    dtype = next(learner.stage.parameters()).dtype
    x = torch.randn((rows, *shape), generator=generator).to(dtype)
    assert learner.stage.dropout is not None
    mask = learner.stage.dropout.mask(rows, shape, generator).to(dtype)
    return Batch(torch.randint(CLASSES, (rows,), generator=generator), x.__getitem__, mask)


def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out the gradients of what is frozen."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("mode", MICRO_MODES)
@pytest.mark.parametrize("block", STAGES)
def test_every_mode_gives_what_autograd_gives(block: str, mode: Mode) -> None:
    shape = TOKENS if block == "transformer" else MAPS
    learner = make_learner(STAGES[block](), shape=shape)
    assert learner.parts is None
    batch = make_batch(learner, shape)
    expected = trained(measured(learner, batch, StepMemory(Mode.PLAIN)))
    for micro_batch in (5, 100):
        actual = measured(learner, batch, StepMemory(mode, micro_batch))
        assert_same(trained(actual), expected)


@pytest.mark.parametrize("mode", MICRO_MODES)
def test_heads_may_have_batch_norm(mode: Mode) -> None:
    learner = make_learner(BasicBlock(C, C), NormedHeads())
    batch = make_batch(learner)
    expected = measured(learner, batch, StepMemory(Mode.PLAIN))
    assert_same(measured(learner, batch, StepMemory(mode, 5)), expected)


@pytest.mark.parametrize("mode", MICRO_MODES)
@pytest.mark.parametrize("block", ["bottleneck, downsampling", "two pre-activation blocks"])
def test_a_step_repeats_and_learns_its_passes_once(block: str, mode: Mode) -> None:
    learner = make_learner(STAGES[block]())
    learner.memory = StepMemory(mode, 5)
    learner.optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    batch = make_batch(learner)
    first = step(learner, batch, Guard(), 0)
    passes = learner.schedule
    gradients = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
    second = step(learner, batch, Guard(), 1)
    assert passes is not None and learner.schedule is passes
    assert torch.equal(first[0], second[0])
    again = [p.grad for p in learner.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("mode", MICRO_MODES)
@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout2d(0.5), StochasticDepth(0.5, "row")])
def test_random_layers_draw_once_a_step(drop: nn.Module, mode: Mode) -> None:
    """Another seed gives other gradients, the same seed the same in every mode that draws for
    micro-batches of one size."""
    layers = [nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), drop, nn.Conv2d(C, C, 3)]
    learner = make_learner(nn.Sequential(*layers, nn.BatchNorm2d(C)))
    batch = make_batch(learner)

    def after(seed: int, mode: Mode) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return measured(learner, batch, StepMemory(mode, 5))

    reference = after(3, Mode.KEEP_NOTHING)
    assert_same(after(3, mode), reference)
    assert not torch.equal(after(4, mode)["loss"], reference["loss"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("block", ["basic, downsampling", "pre-activation", "convnext"])
def test_halves_err_no_more_than_the_plain_step_does(block: str, precision: str) -> None:
    rows = 32
    exact = make_learner(STAGES[block]())
    truth = measured(exact, make_batch(exact, rows=rows), StepMemory(Mode.PLAIN))
    rough = make_learner(STAGES[block](), dtype=torch.float32, precision=precision)
    rough.scale = LossScale() if precision == "float16" else None
    rough.stage.load_state_dict(exact.stage.state_dict())
    rough.heads.load_state_dict(exact.heads.state_dict())
    batch = make_batch(rough, rows=rows)

    def errors(mode: Mode) -> dict[str, float]:
        halves = measured(rough, batch, StepMemory(mode, 8))
        return {k: float((halves[k] - v).norm()) for k, v in truth.items() if k.endswith("grad")}

    plain = errors(Mode.PLAIN)
    eps = torch.finfo(torch.bfloat16 if precision == "bfloat16" else torch.float16).eps
    for mode in MICRO_MODES:
        for name, error in errors(mode).items():
            rounding = eps * float(truth[name].norm()) + 1e-6
            assert error <= 4 * plain[name] + rounding, (mode, name)


def test_each_mode_takes_less_than_the_one_before() -> None:
    def taken(mode: Mode) -> int:
        learner = make_learner(deepcopy(block), dtype=torch.float32)
        learner.memory = StepMemory(mode, 4)
        batch = make_batch(learner, rows=64)
        learner.optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        with Counter() as counter:
            step(learner, batch, Guard(), 0)
        return counter.peak

    block = BasicBlock(C, C)
    modes = [Mode.PLAIN, Mode.HEADS, Mode.KEEP_C, Mode.KEEP_NOTHING]
    peaks = [taken(mode) for mode in modes]
    assert peaks == sorted(set(peaks), reverse=True)
    assert peaks[-1] < peaks[0] / 4
