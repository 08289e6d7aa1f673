"""The micro-batched step gives the gradients of the whole batch."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from allocator import Allocator
from torch import nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from greedy.losses import Pred, PredBio, PredSim, PredSimBio, Sim, SimBio
from greedy.losses.prediction import CrossEntropy
from greedy.models import Stage, cut, shapes
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.guard import Guard
from greedy.steps.host_state import HostAdam
from greedy.steps.parts import parts_of
from greedy.steps.scaling import LossScale
from greedy.steps.step import Learner, gradients, step
from greedy.stores.source import Batch

ROWS, CLASSES = 12, 4


class SimAlone(PredSim):
    """Has a classifier that it does not use."""

    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return Sim()(features._replace(p=None), y)


LOSSES = {
    "pred": Pred(pool_target=32),
    "smooth-pred": Pred(32, cross_entropy=CrossEntropy(0.1, (1.0, 0.5, 2.0, 1.5))),
    "sim": Sim(),
    "predsim": PredSim(0.9, pool_target=32),
    "deep-predsim": PredSim(0.9, pool_target=32, hidden_layers=2),
    "pred-bio": PredBio(pool_target=32, target_projection=7),
    "sim-bio": SimBio(pool_target=32, target_projection=7),
    "sim-of-predsim": SimAlone(0.9, pool_target=32),
    "predsim-bio": PredSimBio(0.5, pool_target=32, target_projection=7),
}
INPUTS = {"conv": (5, 7, 6), "strided": (5, 7, 6), "linear": (9,), "flattened": (3, 2, 2)}
MICRO_MODES = [mode for mode in Mode if mode is not Mode.PLAIN]


def make_stage(kind: str) -> Stage:
    """Returns the second stage of a small network, so that its input has dropout."""
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
    """Returns the loss, the gradients and the buffers after a step of a copy."""
    learner = deepcopy(learner)
    learner.memory = memory
    loss, logits = gradients(learner, batch)
    if learner.scale is not None:
        assert not learner.scale.unscale(learner.parameters())
    tensors = {"loss": loss} | ({} if logits is None else {"logits": logits})
    for name, module in (("stage", learner.stage), ("heads", learner.heads)):
        for key, p in module.named_parameters():  # without one where the loss does not use it
            tensors[f"{name}.{key}.grad"] = torch.zeros_like(p) if p.grad is None else p.grad
        tensors |= {f"{name}.{k}": b for k, b in module.named_buffers()}
    return tensors


@pytest.mark.parametrize("mode", MICRO_MODES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_mode_gives_what_autograd_gives(kind: str, loss: str, mode: Mode) -> None:
    learner = make_learner(kind, LOSSES[loss])
    batch = make_batch(kind, learner)
    expected = measured(learner, batch, StepMemory(Mode.PLAIN))
    for micro_batch in (1, 4, 5, 100):
        assert_same(measured(learner, batch, StepMemory(mode, micro_batch)), expected)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        worst = float((actual[name] - value).abs().max())
        assert worst <= 1e-10 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("loss", LOSSES)
def test_halves_err_no_more_than_the_plain_step_does(kind: str, loss: str, precision: str) -> None:
    exact = make_learner(kind, LOSSES[loss])
    rows = 64
    batch = make_batch(kind, exact, rows)
    truth = measured(exact, batch, StepMemory(Mode.PLAIN))
    rough = make_learner(kind, LOSSES[loss], torch.float32, precision)
    rough.scale = LossScale() if precision == "float16" else None
    rough.stage.load_state_dict(exact.stage.state_dict())
    rough.heads.load_state_dict(exact.heads.state_dict())
    batch = make_batch(kind, rough, rows)

    def errors(mode: Mode) -> dict[str, float]:
        halves = measured(rough, batch, StepMemory(mode, 16))
        return {k: float((halves[k] - v).norm()) for k, v in truth.items() if k.endswith("grad")}

    plain = errors(Mode.PLAIN)
    eps = torch.finfo(torch.bfloat16 if precision == "bfloat16" else torch.float16).eps
    rounding = {k: eps * float(truth[k].norm()) + 1e-6 for k in plain}
    for mode in MICRO_MODES:
        for name, error in errors(mode).items():
            assert error <= 4 * plain[name] + rounding[name], (mode, name)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("kind", ["conv", "strided"])
def test_channels_last_changes_the_layout_alone(kind: str, mode: Mode) -> None:
    """Inputs and weights are laid out as on CUDA."""
    learner = make_learner(kind, LOSSES["predsim"])
    batch = make_batch(kind, learner, 32)
    expected = measured(learner, batch, StepMemory(mode, 5))
    for parameter in learner.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x = batch.read(slice(None)).contiguous(memory_format=torch.channels_last)
    batch = replace(batch, read=x.__getitem__)
    channels_last = measured(learner, batch, StepMemory(mode, 5))
    for name, value in expected.items():
        torch.testing.assert_close(channels_last[name], value, msg=name)
    h = learner.hidden(batch.inputs())
    assert h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()


def test_many_steps_stay_together() -> None:
    """Computed in float64, where rounding stays far below what a wrong gradient would do."""

    def losses(mode: Mode) -> torch.Tensor:
        learner = make_learner("conv", LOSSES["predsim"])
        learner.optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
        learner.memory = StepMemory(mode, 4)
        batch = make_batch("conv", learner, 24)
        return torch.stack([step(learner, batch, Guard(), i)[0] for i in range(40)])

    plain = losses(Mode.PLAIN)
    assert plain[-1] < plain[0] / 2
    for mode in MICRO_MODES:
        assert (losses(mode) - plain).abs().max() <= 1e-8, mode


def test_a_step_that_runs_out_of_memory_is_repeated_in_a_smaller_mode() -> None:
    def trained(limit_at: int) -> tuple[Learner, dict[str, torch.Tensor]]:
        learner = make_learner("conv", LOSSES["sim"])
        learner.optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
        learner.memory = StepMemory(micro_batch=4)
        batch = make_batch("conv", learner, 64)
        with Allocator() as allocator:
            for i in range(4):
                if i == limit_at:  # what a step has taken is too much from here on
                    allocator.limit = allocator.live + (allocator.peak - allocator.live) * 2 // 3
                step(learner, batch, Guard(), i)
        state = learner.stage.state_dict() | learner.heads.state_dict()
        return learner, {k: v.detach() for k, v in state.items()}

    untouched, expected = trained(limit_at=9)
    assert untouched.memory.mode is Mode.PLAIN
    learner, tensors = trained(limit_at=2)
    assert learner.memory.mode is not Mode.PLAIN
    assert_same(tensors, expected)


def test_without_any_smaller_mode_the_failure_is_the_user_s() -> None:
    learner = make_learner("linear", LOSSES["pred"])
    learner.optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    batch = make_batch("linear", learner)
    with Allocator() as allocator:
        allocator.add(learner.parameters())
        allocator.limit = allocator.live + 1024
        with pytest.raises(torch.OutOfMemoryError):
            step(learner, batch, Guard(), 0)
    assert learner.memory == StepMemory(Mode.KEEP_NOTHING, 1)


class Doubled(nn.Conv2d):
    """Computes something else than its class does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.BatchNorm2d(5), nn.ReLU()],
        [nn.Conv2d(5, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.ReLU()],
        [nn.Conv2d(5, 5, 3, padding=1), nn.Softmax(dim=1)],
        [Doubled(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()],
        [weight_norm(nn.Conv2d(5, 5, 3, padding=1)), nn.BatchNorm2d(5), nn.ReLU()],
        [spectral_norm(nn.Conv2d(5, 5, 3, padding=1)), nn.BatchNorm2d(5), nn.ReLU()],
        [nn.Conv2d(5, 5, 3, padding=1).requires_grad_(False), nn.BatchNorm2d(5), nn.ReLU()],
    ],
)
def test_other_stages_are_told_apart(layers: list[nn.Module]) -> None:
    stage = cut(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, CLASSES)))[0]
    assert parts_of(stage, LOSSES["sim"].heads((5, 7, 6), CLASSES), (5, 7, 6)) is None


def test_adam_in_host_memory_is_adam() -> None:
    def trained(optimizer, **settings) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 5, 3, 3), (6,), (40, 9)]
        parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        adam = optimizer(parameters, lr=1e-2, **settings)
        for _ in range(5):
            for each in parameters:
                each.grad = torch.randn(each.shape, generator=generator)
            adam.step()
        return [each.detach() for each in parameters]

    device, host = trained(torch.optim.Adam, fused=True), trained(HostAdam)
    torch.testing.assert_close(host, device, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", Mode)
def test_backward_passes_are_outside_autocast(mode, monkeypatch):
    """Autograd's thread may compute in float16 within it, whatever was asked for."""
    learner, seen = make_learner("conv", LOSSES["predsim"], torch.float32, "bfloat16"), []
    learner.memory = StepMemory(mode, 5)
    backward = torch.autograd.backward

    def watched(*tensors, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return backward(*tensors, **options)

    monkeypatch.setattr(torch.autograd, "backward", watched)
    gradients(learner, make_batch("conv", learner))
    assert len(seen) >= (1 if mode is Mode.PLAIN else 4)  # the loss's, and each micro-batch's
    assert not any(seen)


@pytest.mark.parametrize("mode", MICRO_MODES)
def test_the_classifier_is_cast_once_a_pass_for_all_micro_batches(mode: Mode) -> None:
    learner = make_learner("conv", LOSSES["predsim"], torch.float32, "bfloat16")
    weight = learner.heads.get_submodule("prediction.classifier").get_parameter("weight")

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default and args[0] is weight
            return function(*args, **(kwargs or {}))

    learner.memory = StepMemory(mode, 2)
    with Casts() as casts:
        gradients(learner, make_batch("conv", learner))
    assert casts.count == 2  # without and with gradient
