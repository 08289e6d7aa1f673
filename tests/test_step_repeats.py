"""A step that fails is repeated where nothing has been changed, and ends the stage where it has."""

from pathlib import Path

import pytest
import torch
from allocator import Allocator
from safetensors.torch import load_file
from small_training import TEST, TRAIN, new_trainer, same, weights
from torch import nn

from greedy.base.errors import TrainingError
from greedy.losses import Features, LocalHeads, Pred, Sim
from greedy.models import cut, shapes
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.guard import Guard, OptimizerFailed
from greedy.steps.host_state import HostAdam
from greedy.steps.moments import make_moments
from greedy.steps.scaling import LossScale
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

CLASSES, ROWS = 3, 12
STEPS = 400 // 32 + 1  # an epoch's


class Seeded:
    """A small stage with everything that a step moves, and batches for it."""

    def __init__(self, optimizer=torch.optim.Adam, loss=None, scale=None, **settings) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()]
        stage = cut(nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 36, CLASSES)))[0]
        loss = loss or Sim()
        heads = loss.heads(shapes([stage], (2, 6, 6))[0].hidden, CLASSES)
        self.learner = Learner(stage, heads, loss, CLASSES, "float32", scale=scale)
        self.learner.optimizer = optimizer(self.learner.parameters(), **settings)
        self.learner.train()

    def step(self, position: int, guard: Guard) -> None:
        generator = torch.Generator().manual_seed(position)
        x = torch.randn(ROWS, 2, 6, 6, generator=generator)
        step(self.learner, Batch(torch.arange(ROWS) % CLASSES, x.__getitem__), guard, position)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.learner.parameters()]


class FailsHalfWay(torch.optim.AdamW):
    """Its step number ``at`` runs out of memory when some weights have been changed."""

    at, error = STEPS + 3, torch.OutOfMemoryError("no room for a temporary")
    seen = 0

    def step(self, closure=None):
        FailsHalfWay.seen += _real(self.param_groups[0]["params"][0])
        if FailsHalfWay.seen != self.at:
            return super().step(closure)
        self.param_groups[0]["params"][-1].grad = None
        super().step(closure)
        raise self.error


def _real(parameter: torch.Tensor) -> bool:
    """Returns whether a parameter is real, not a fake one on which memory is counted."""
    return type(parameter.data) is torch.Tensor


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=True)


def failing(parameters) -> torch.optim.Optimizer:
    return FailsHalfWay(parameters, foreach=True)


def shallow() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def fit(run: Path, optimizer) -> None:
    new_trainer(run, shallow(), optimizer=optimizer, views=1).fit(TRAIN, TEST)


def test_an_optimizer_that_fails_half_way_ends_the_stage_at_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"the optimiser of stage 1 failed in epoch 2, step 3 \(no room for a temporary; the "
    said += "last good checkpoint is after epoch 1"
    with pytest.raises(TrainingError, match=said + r"\): free memory on its device and give"):
        fit(tmp_path / "cut", failing)
    monkeypatch.setattr(FailsHalfWay, "error", ValueError("mine is broken\nhere"))
    monkeypatch.setattr(FailsHalfWay, "seen", 0)
    said = r"epoch 2, step \d+ \(mine is broken; .* after epoch 1\): mend it and give the same comm"
    monkeypatch.setattr(FailsHalfWay, "at", 1)
    with pytest.raises(TrainingError, match=said):
        fit(tmp_path / "cut", failing)
    fit(tmp_path / "cut", adamw)
    fit(tmp_path / "whole", adamw)
    for stage in (1, 2):
        assert same(weights(tmp_path / "cut", stage), weights(tmp_path / "whole", stage))


def test_an_optimizer_steps_once_a_batch_whatever_it_runs_out_of() -> None:
    class Counts(torch.optim.AdamW):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            super().step(closure)
            raise torch.OutOfMemoryError

    seeded, guard = Seeded(Counts, lr=0.01, foreach=True), Guard()
    with pytest.raises(OptimizerFailed):
        seeded.step(0, guard)
    assert seeded.learner.optimizer.calls == 1
    assert seeded.learner.memory == StepMemory()  # a smaller mode would not have helped
    counts = {float(state["step"]) for state in seeded.learner.optimizer.state.values()}
    assert counts == {1.0}


class FailingHeads(nn.Module):
    """Local heads with batch norm of their own and numbers drawn from torch's generator, whose
    first passes run out of memory when both have been moved on."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures, self.norm = failures, nn.BatchNorm1d(5)
        self.classifier = nn.Linear(5, CLASSES)

    def forward(self, h: torch.Tensor) -> Features:
        p = self.classifier(nn.functional.dropout(self.norm(h.mean((2, 3)))))
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no compiled step")
        return Features(None, p)

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def logits(self, features: Features) -> torch.Tensor | None:
        return features.p


class Own(Pred):
    """A loss with such heads."""

    failures = 0

    def heads(self, shape, num_classes: int) -> LocalHeads:
        return FailingHeads(self.failures)


def test_a_repeated_step_draws_the_same_and_moves_statistics_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(failures: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(Own, "failures", failures)
        seeded = Seeded(loss=Own())
        seeded.learner.graph_rows = failures  # a graph gives way to whatever fails
        torch.manual_seed(5)
        seeded.step(0, Guard())
        assert not seeded.learner.graph_rows
        heads = seeded.learner.heads.state_dict()
        return heads | {f"stage.{k}": v for k, v in seeded.learner.stage.state_dict().items()}

    expected, repeated = trained(0), trained(1)
    assert expected["norm.num_batches_tracked"] == 1
    assert same(repeated, expected)


class Rooted(Pred):
    """Cross-entropy with a term whose value is 0 and whose gradient is not finite."""

    def __call__(self, features: Features, y: torch.Tensor) -> torch.Tensor:
        return super().__call__(features, y) + (0 * features.p).square().sum().sqrt()


FUSED = [(torch.optim.Adam, {"fused": True}), (torch.optim.Adam, {}), (torch.optim.SGD, {})]


@pytest.mark.parametrize(("optimizer", "settings"), FUSED)
@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.KEEP_C, Mode.KEEP_NOTHING])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_noted(
    optimizer, settings, mode: Mode
) -> None:
    seeded, guard = Seeded(optimizer, Rooted(), lr=0.1, **settings), Guard()
    seeded.learner.memory = StepMemory(mode, 4)
    before = seeded.weights
    seeded.step(6, guard)
    assert (guard.step, guard.in_loss) == (7, False)
    assert all(map(torch.equal, seeded.weights, before))


def test_float16_s_scale_cannot_help_a_gradient_that_is_none() -> None:
    seeded, guard = Seeded(loss=Rooted(), scale=LossScale(), lr=0.1), Guard()
    before = seeded.weights
    for position in range(40):
        seeded.step(position, guard)
    assert guard.step is not None and 30 <= guard.step < 40  # it was halved until then
    assert all(map(torch.equal, seeded.weights, before))


def test_of_several_bad_steps_the_first_is_told() -> None:
    seeded, guard = Seeded(lr=0.1), Guard()
    for position, good in enumerate([True, False, True]):
        seeded.learner.loss = Sim() if good else lambda f, y: f.z.sum() * float("nan")
        seeded.step(position, guard)
    assert (guard.step, guard.in_loss) == (2, True)


@pytest.mark.parametrize("strategy", ["greedy", "joint", "backprop"])
def test_the_last_good_checkpoint_stays_one(tmp_path: Path, strategy: str) -> None:
    """A loss that is finite to the end, with a gradient that is not from some step on."""

    class RootedLater(nn.Module):
        steps = 0

        def forward(self, x):
            if not self.training or not _real(x) or len(x) < 3:  # as when a stage is planned
                return x
            RootedLater.steps += 1
            return x + (0 * x).square().sum().sqrt() if RootedLater.steps >= STEPS + 4 else x

    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 8), RootedLater(), nn.ReLU(), nn.Linear(8, 3)]
    trainer = new_trainer(
        tmp_path / "run", nn.Sequential(*layers), strategy=strategy, epochs=3, views=1
    )
    title = "stage 1" if strategy == "greedy" else "the network"
    said = f"the loss of {title} is finite and its gradient is not finite in epoch 2, step 4"
    with pytest.raises(TrainingError, match=said) as caught:
        trainer.fit(TRAIN, TEST)
    assert "the last good checkpoint is after epoch 1" in str(caught.value)
    (tensors,) = (tmp_path / "run").rglob("checkpoint/*.safetensors")
    assert all(torch.isfinite(v).all() for v in load_file(tensors).values())


def test_weights_that_an_optimizer_spoils_are_not_kept(tmp_path: Path) -> None:
    """The last step of an epoch spoils them: no loss has seen them yet."""

    class Spoils(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            super().step(closure)
            p = self.param_groups[0]["params"][0]
            Spoils.steps += _real(p)
            if Spoils.steps == 2 * STEPS:
                p.data.fill_(float("inf"))

    trainer = new_trainer(tmp_path / "run", optimizer=Spoils, epochs=3)
    with pytest.raises(TrainingError, match="what stage 1 has learned is not finite in epoch 2"):
        trainer.fit(TRAIN, TEST)
    (tensors,) = (tmp_path / "run").rglob("checkpoint/*.safetensors")
    assert all(torch.isfinite(v).all() for v in load_file(tensors).values())


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode.streams])
def test_a_streaming_mode_on_a_cpu_hides_no_error(mode: Mode) -> None:
    """A run that began on CUDA resumes with one."""

    def broken(features: Features, y: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("the user's own")

    seeded = Seeded()
    seeded.learner.memory, seeded.learner.loss = StepMemory(mode, 4), broken
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        seeded.step(0, Guard())


def test_a_streaming_mode_on_a_cpu_goes_on_to_those_that_make_a_difference() -> None:
    assert StepMemory(Mode.KEEP_C_STREAM_X, 4).smaller("cpu") == StepMemory(Mode.KEEP_NOTHING, 4)
    assert StepMemory(Mode.STREAM_X, 4).smaller("cpu") == StepMemory(Mode.STREAM_X, 2)
    assert StepMemory(Mode.STREAM_X, 1).smaller("cpu") is None
    seeded = Seeded(lr=0.01)
    seeded.learner.memory = StepMemory(Mode.KEEP_C_STREAM_X, 4)
    with Allocator() as allocator:
        for position in range(3):
            if position == 2:  # what a step has taken is too much from here on
                room = allocator.peak - allocator.live
                allocator.limit = allocator.live + room * 2 // 3
            allocator.reset_peak()
            seeded.step(position, Guard())
    assert seeded.learner.memory.mode is Mode.KEEP_NOTHING


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.Adam, {"foreach": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (HostAdam, {"lr": 0.01}),
    ],
)
def test_moments_made_before_the_first_step_are_those_that_it_would_make(kind, settings):
    ahead, lazy = Seeded(kind, **settings), Seeded(kind, **settings)
    make_moments(ahead.learner.optimizer, 1)
    assert len(ahead.learner.optimizer.state) == len(ahead.weights)
    assert not lazy.learner.optimizer.state
    for position in range(3):
        ahead.step(position, Guard())
        lazy.step(position, Guard())
    assert all(torch.equal(a, b) for a, b in zip(ahead.weights, lazy.weights, strict=True))
    made_ahead, made_by_step = (each.learner.optimizer.state_dict() for each in (ahead, lazy))
    assert made_ahead["param_groups"] == made_by_step["param_groups"]
    for number, state in made_by_step["state"].items():
        assert list(made_ahead["state"][number]) == list(state)
        for name, value in state.items():
            same_kind = made_ahead["state"][number][name].dtype == value.dtype
            assert same_kind and torch.equal(made_ahead["state"][number][name], value)


def test_moments_that_do_not_fit_are_a_sentence_before_the_first_step(tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("greedy.steps.moments._zeros", no_room)
    with pytest.raises(TrainingError, match="moments of stage 1's optimiser do not fit"):
        new_trainer(tmp_path / "run", epochs=1).fit(TRAIN, TEST)
    monkeypatch.undo()
    new_trainer(tmp_path / "run", epochs=1).fit(TRAIN, TEST)
