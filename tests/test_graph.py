"""Which steps may be recorded as CUDA graphs: those that are the same kernels every time."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_training import CLASSES, SIDE, TEST, TRAIN, files, new_trainer, same, weights
from torch import Tensor, nn

from greedy.base.seeds import global_states
from greedy.base.torch_private import FakeTensorMode
from greedy.build.modules import build_loss, build_network
from greedy.losses import PredSim
from greedy.losses.strategies import stage_losses
from greedy.models import cut, shapes
from greedy.recipes import load, names
from greedy.steps import graph
from greedy.steps.guard import Guard
from greedy.steps.recordable import NotRecordable, Watch, require_recordable
from greedy.steps.step import Learner, step
from greedy.stores.ring import Ring
from greedy.stores.source import Batch
from greedy.training import learners

ROWS, WIDTH = 8, 6
Function = Callable[[nn.Module, Tensor], Tensor]


class Step(nn.Module):
    """A module with a weight, a batch norm and a running mean, that does something else, too."""

    def __init__(self, does: Function) -> None:
        super().__init__()
        self.does = does
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, self.norm(self.linear(x)))

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        self.zero_grad()
        loss = nn.functional.cross_entropy(self(x), y)
        loss.backward()
        return loss.detach(), None

    def require_recordable(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(ROWS, WIDTH), torch.arange(ROWS) % WIDTH
        require_recordable(self.gradients, x, y, lambda: list(self.buffers()))


def moved(module: nn.Module, h: Tensor) -> Tensor:
    module.mean.lerp_(h.detach().mean(0), 0.1)
    return h - module.mean


def replaced(module: nn.Module, h: Tensor) -> Tensor:
    module.mean = 0.9 * module.mean + 0.1 * h.detach().mean(0)
    return h - module.mean


def averaged(module: nn.Module, h: Tensor) -> Tensor:
    norm = nn.BatchNorm1d(WIDTH, momentum=None)
    return norm(h)


def written(module: nn.Module, h: Tensor) -> Tensor:
    out = h.clone()
    out[h < 0] = 0
    return out


def solved(module: nn.Module, h: Tensor) -> Tensor:
    return h @ torch.linalg.inv(torch.eye(WIDTH) + 0.1 * module.linear.weight)


def repointed(module: nn.Module, h: Tensor) -> Tensor:
    module.mean.data = 0.9 * module.mean + 0.1 * h.detach().mean(0)
    return h - module.mean


def noisy(module: nn.Module, h: Tensor) -> Tensor:
    return h * np.random.random()  # noqa: NPY002 - users' code draws from it


FINE: dict[str, Function] = {
    "nothing": lambda module, h: h,
    "a running mean that moves": moved,
    "chosen by number": lambda module, h: h[:, torch.arange(WIDTH).flip(0)],
    "chosen by sign": lambda module, h: torch.where(h > 0, h, 0 * h),
}
NOT: dict[str, tuple[Function, str]] = {
    "a number": (lambda module, h: h / float(h.detach().abs().max()), "_local_scalar_dense"),
    "a condition": (lambda module, h: -h if h.sum() > 0 else h, "_local_scalar_dense"),
    "rows by a mask": (lambda module, h: h + h[h > 0].mean(), "aten.index.Tensor"),
    "written by a mask": (written, "aten.index_put_"),
    "cumulative norm": (averaged, "_local_scalar_dense"),
    "Python": (lambda module, h: h * random.random(), "random numbers on the CPU"),
    "NumPy": (noisy, "random numbers on the CPU"),
    "torch": (lambda module, h: h * torch.rand(()), "random numbers on the CPU"),
    "a buffer": (replaced, "replaces a buffer"),
    "a buffer's memory": (repointed, "replaces a buffer"),
    "an inverse": (solved, "aten.linalg_inv_ex"),
}


@pytest.mark.parametrize("what", FINE)
def test_the_same_kernels_every_time_are_recorded_and_nothing_has_changed(what: str) -> None:
    module = Step(FINE[what])
    before = [buffer.clone() for buffer in module.buffers()]
    module.require_recordable()
    states = global_states()
    module.require_recordable()
    assert states == global_states()
    assert all(map(torch.equal, before, module.buffers()))


@pytest.mark.parametrize("what", NOT)
def test_what_a_graph_would_not_do_again_is_not_recorded(what: str) -> None:
    does, reason = NOT[what]
    with pytest.raises(NotRecordable, match=reason):
        Step(does).require_recordable()


def test_nor_is_what_moves_between_devices() -> None:
    with FakeTensorMode():
        x, y = torch.empty(ROWS, device="cuda"), torch.empty(ROWS)
        with Watch() as watch:
            x.square()
            assert watch.found == ""
            y.to(x.device)
    assert watch.found == "aten._to_copy.default"


def test_attention_s_seed_is_on_the_cpu_and_does_not_matter() -> None:
    """Torch's kernel for float32 moves it to the GPU in recordings."""
    with FakeTensorMode(), torch.device("cuda"), Watch() as watch:
        q = torch.empty(2, 4, 7, 8)
        seed = torch.empty((), dtype=torch.long, device="cpu")
        torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *(
                q,
                q,
                q,
                q,
                None,
                q,
                torch.empty(2, 4, 32),
                seed,
                seed,
                0.0,
                [True, True, True, False],
            )
        )
    assert watch.found == ""


def test_what_is_compiled_stays_so() -> None:
    calls = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls.append(module)
            return module(*arguments)

        return call

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    x, y = torch.randn(ROWS), torch.randn(ROWS)
    for _ in range(2):
        compiled(x)
    require_recordable(lambda x, y: (compiled(x).sum(), None), x, y, list)
    assert len(calls) == 2
    compiled(x)
    assert len(calls) == 3


def on_a_gpu(module: nn.Module) -> nn.Module:
    """Gives a module fake tensors of a GPU that need not be there."""
    for part in module.modules():
        part._parameters = {
            name: None if p is None else nn.Parameter(torch.empty(p.shape, device="cuda"))
            for name, p in part._parameters.items()
        }
        part._buffers = {
            name: None if b is None else torch.empty(b.shape, dtype=b.dtype, device="cuda")
            for name, b in part._buffers.items()
        }
    return module.train()


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("cifar10/")])
def test_no_recipe_waits_for_a_gpu_or_computes_beside_it(name: str) -> None:
    """Torch computes no gradients of fake tensors of a GPU where there is none."""
    recipe, row = load(name), (3, 32, 32)
    with torch.device("meta"):
        stages = cut(build_network(recipe.model, row, CLASSES, 0))
    each = shapes(stages, row)
    losses = stage_losses(
        recipe.training.strategy, build_loss(recipe.loss), [shape.hidden for shape in each]
    )
    for stage, shape, loss in zip(stages, each, losses, strict=True):
        with FakeTensorMode(), torch.device("cuda"):
            heads = on_a_gpu(loss.heads(shape.hidden, CLASSES))
            learner = Learner(on_a_gpu(stage), heads, loss, CLASSES, "float32")
            batch = Batch(
                torch.empty(ROWS, dtype=torch.long), torch.empty(ROWS, *shape.input).__getitem__
            )
            x, y = batch.inputs(), learner.targets(batch)
            with Watch() as watch:
                features = learner.features(x)
                assert learner.loss(features, y).isfinite().device.type == "cuda"
                learner.heads.logits(features)
        assert watch.found == ""


class Replayed(NamedTuple):
    """Stands for a recorded step; there is no GPU."""

    step: graph.Gradients

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.step(x, y)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[graph.Gradients]:
    """Lets steps on the CPU be recorded. Returns them."""
    found: list[graph.Gradients] = []

    def record(compute: graph.Gradients, *_: object) -> Replayed:
        found.append(compute)
        return Replayed(compute)

    monkeypatch.setattr(graph.StepGraph, "of", record)
    monkeypatch.setattr(learners, "graphs", lambda *_: True)
    return found


class Noise(nn.Module):
    """Draws on the CPU, whichever device it is on."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape[1:], device="cpu") if self.training else 0.0
        return x + 0.1 * noise


@pytest.mark.parametrize("own", [nn.Identity, Noise])
def test_a_run_is_the_same_whether_a_step_can_be_recorded(
    own: type[nn.Module], recorded: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> Path:
        torch.manual_seed(0)
        hidden, values = [nn.Linear(SIDE * SIDE, 16), nn.ReLU(), own()], nn.Linear(16, CLASSES)
        model = nn.Sequential(nn.Flatten(), *hidden, values)
        new_trainer(tmp_path / name, model).fit(TRAIN, TEST)
        return tmp_path / name

    run = trained("recorded")
    assert len(recorded) == (2 if own is nn.Identity else 1)  # of two stages
    monkeypatch.setattr(learners, "graphs", lambda *_: False)
    usual = trained("usual")
    for stage in (1, 2):
        assert same(weights(run, stage), weights(usual, stage))


def test_a_graph_that_gives_way_takes_its_gradients_with_it(recorded: list) -> None:
    stage = cut(nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, CLASSES)))[0]
    loss = PredSim()
    learner = Learner(stage, loss.heads((4,), CLASSES), loss, CLASSES, "float32", graph_rows=ROWS)
    learner.optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    batch = Batch(torch.arange(ROWS) % CLASSES, torch.randn(ROWS, WIDTH).__getitem__)
    for position in range(4):
        step(learner, batch, Guard(), position)
    assert learner.has_graph
    learner.drop_graph()
    assert not learner.has_graph
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_a_graph_gives_way_to_a_view_that_has_no_room(
    recorded: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"augmentation": "hflip", "views": 2, "reuse": 2, "epochs": 4}
    new_trainer(tmp_path / "ample", **settings).fit(TRAIN, TEST)
    real, failed = Ring.draw, []

    def draw(ring: Ring, epoch: int, done: int, rows: int) -> None:
        if recorded and epoch == 1 and not failed:
            failed.append(ring)
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(ring, epoch, done, rows)

    monkeypatch.setattr(Ring, "draw", draw)
    new_trainer(tmp_path / "short", **settings).fit(TRAIN, TEST)
    assert failed
    for stage in (1, 2):
        ample, short = (
            files(tmp_path / f"{run}/stage{stage}/activations.zarr") for run in ("ample", "short")
        )
        assert short == ample


@pytest.mark.parametrize(
    ("graphs", "epoch", "error"),
    [
        (False, 1, torch.OutOfMemoryError("CUDA out of memory")),
        (True, 0, torch.OutOfMemoryError("CUDA out of memory")),  # in the first step
        (True, 1, MemoryError()),
    ],
    ids=["without graphs", "before one is recorded", "of the host"],
)
def test_there_is_no_other_way_out(
    graphs: bool, epoch: int, error: Exception, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if graphs:
        request.getfixturevalue("recorded")
    monkeypatch = request.getfixturevalue("monkeypatch")
    real, failed = Ring.draw, []

    def draw(ring: Ring, now: int, done: int, rows: int) -> None:
        if now == epoch:
            failed.append(now)
            raise error
        real(ring, now, done, rows)

    monkeypatch.setattr(Ring, "draw", draw)
    trainer = new_trainer(tmp_path / "run", augmentation="hflip", views=2, reuse=2, epochs=4)
    with pytest.raises(type(error)):
        trainer.fit(TRAIN, TEST)
    assert failed == [epoch]
