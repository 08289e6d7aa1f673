"""Unusual modules, losses and optimisers of PyTorch users."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interrupting import StopAfter, interrupt
from small_training import CLASSES, SIDE, TEST, TRAIN, learned, new_trainer, weights
from small_training import network as small_network
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from greedy import GreedyTrainer, Reporter, UserError
from greedy.base.errors import Interrupted
from greedy.losses import LocalHeads, Pred


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


class WithBuffer(Convolution):
    """Holds a buffer that is not in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((1, 4, 1, 1), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class WithTensor(Convolution):
    """Holds a tensor as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.full((1, 4, 1, 1), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class Tied(Convolution):
    """Holds one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.conv = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.again(super().forward(self.widen(x))))


class Deciding(Convolution):
    """Computes what depends on the values of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = super().forward(x)
        return h if h.sum() > 1 else 2 * h


def with_stage(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(4 * SIDE * SIDE, CLASSES))


def unused() -> nn.Sequential:
    """Returns a stage with a parameter that gets no gradient, and one that is frozen."""
    torch.manual_seed(0)
    stage = Convolution()
    stage.spare = nn.Linear(2, 2)
    stage.conv.weight.requires_grad_(False)
    return with_stage(stage)


class OwnLoss:
    output_scale = 1.0

    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        return Pred().heads(shape, num_classes)

    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(features.p, y)


@dataclass
class Scaled(OwnLoss):
    """A loss without a hash: a dataclass that is not frozen."""

    factor: float = 2.0

    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return self.factor * super().__call__(features, y)


@dataclass(frozen=True)
class Listed(OwnLoss):
    """A frozen dataclass, which has a hash that fails."""

    factors: list[float] = field(default_factory=lambda: [2.0])


class Weighted(OwnLoss):
    def __init__(self) -> None:
        self.criterion = nn.CrossEntropyLoss(weight=torch.arange(1.0, CLASSES + 1))

    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return self.criterion(features.p, y.argmax(dim=1))


class OfPresentClasses(OwnLoss):
    """A loss that depends on the number of classes in the batch."""

    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return super().__call__(features, y) / len(y.argmax(dim=1).unique())


class TiedHeads(OwnLoss):
    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        heads = super().heads(shape, num_classes)
        heads.twin = heads.prediction
        return heads


@pytest.mark.parametrize("module", [WithBuffer, WithTensor, Tied])
def test_modules_of_every_kind_are_stages(tmp_path: Path, module: type[nn.Module]) -> None:
    trainer = new_trainer(tmp_path / "run", with_stage(module()), epochs=3)
    records = trainer.fit(TRAIN, TEST)
    assert records[-1].metrics.test_error_percent < 33  # chance is 67
    assert records[0].choices.planned_peak_bytes > 32 * 4 * SIDE * SIDE * 4
    with torch.no_grad():
        assert trainer.assemble().eval()(torch.rand(2, 1, SIDE, SIDE)).shape == (2, CLASSES)


def test_what_cannot_be_counted_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory of stage 1 \(conv4\) .* torch.where"):
        new_trainer(tmp_path / "run", with_stage(Deciding())).fit(TRAIN, TEST)
    with pytest.raises(UserError, match="has lazy layers, which have no weights yet"):
        new_trainer(tmp_path / "lazy", nn.Sequential(nn.Flatten(), nn.LazyLinear(2))).fit(
            TRAIN, TEST
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "lazy").exists()


@pytest.mark.parametrize("loss", [Scaled, Listed, Weighted, OfPresentClasses, TiedHeads])
def test_losses_of_every_kind_train(tmp_path: Path, loss: type[OwnLoss]) -> None:
    records = new_trainer(tmp_path / "run", loss=loss(), epochs=3).fit(TRAIN, TEST)
    assert records[-1].metrics.test_error_percent < 33


class Vector(OwnLoss):
    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return (features.p * y).sum(dim=1)


class Number(OwnLoss):
    def __call__(self, features, y: torch.Tensor) -> float:
        return 3.0


class OfIntegers(OwnLoss):
    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(features.p, y)


class Unscaled:
    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        return Pred().heads(shape, num_classes)

    def __call__(self, features, y: torch.Tensor) -> torch.Tensor:
        return Pred()(features, y)


class OtherHeads(OwnLoss):
    def heads(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Linear(shape[0], num_classes)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), r"CrossEntropyLoss\(\) is no local loss"),
        ("predsim", "'predsim' is no local loss"),
        (Pred, "Pred is no local loss"),
        (Unscaled(), "is no local loss: .* write one with heads, output_scale and __call__"),
        (Vector(), r"the loss Vector fails in stage 1 \(linear16\) \(grad can be"),
        (Number(), "the loss Number fails in stage 1 .* and returns a scalar tensor"),
        (OfIntegers(), "the loss OfIntegers fails in stage 1 .* one-hot labels"),
        (OtherHeads(), "the heads of OtherHeads are of type Linear"),
    ],
)
def test_what_is_no_local_loss_is_told(tmp_path: Path, loss: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", loss=loss).fit(TRAIN, TEST)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ([nn.Flatten(), nn.Linear(64, CLASSES), nn.Softmax(dim=1)], "ends in Softmax"),
        ([nn.Conv2d(1, CLASSES, 1), nn.AdaptiveAvgPool2d(1)], r"ends in feature maps \(3x1x1"),
        ([nn.Conv2d(1, CLASSES, 8), nn.Flatten()], "followed by Flatten: end the network with"),
    ],
)
def test_a_network_ends_in_logits(tmp_path: Path, end: list[nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", nn.Sequential(*end)).fit(TRAIN, TEST)


@pytest.mark.parametrize("optimizer", ["ASGD", "Adafactor", "Rprop"])
def test_optimisers_of_every_kind_train(tmp_path: Path, optimizer: str) -> None:
    new_trainer(tmp_path / "run", optimizer=getattr(torch.optim, optimizer)).fit(TRAIN, TEST)
    assert learned(tmp_path / "run", 1)


def test_optimisers_that_cannot_train_a_stage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LBFGS wants to compute the loss several times"):
        new_trainer(tmp_path / "run", optimizer=torch.optim.LBFGS).fit(TRAIN, TEST)
    with pytest.raises(UserError, match="optimizer_state is for optimisers that are built in"):
        new_trainer(tmp_path / "host", optimizer=torch.optim.SGD, optimizer_state="host")
    assert not (tmp_path / "run").exists() and not (tmp_path / "host").exists()


def weights_and_biases(parameters) -> torch.optim.Optimizer:
    """Returns two groups; biases, those of batch norms and of the output layer, learn more
    slowly."""
    groups = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    slower = {"params": groups[False], "lr": 0.01}
    return torch.optim.SGD([{"params": groups[True]}, slower], lr=0.1)


class Rates(Reporter):
    """Records the rates of all groups, and those reported, in every epoch of the first stage; can
    end the process after a number of batches."""

    def __init__(self, batches: int = -1) -> None:
        self.made, self.seen, self.reported, self.left = [], [], [], batches

    def factory(self, parameters) -> torch.optim.Optimizer:
        self.made.append(weights_and_biases(parameters))
        return self.made[-1]

    def batch_finished(self, rows: int) -> None:
        rates = [group["lr"] for group in self.made[-1].param_groups]
        if self.seen[-1:] != [rates]:
            self.seen.append(rates)
        self.left -= 1
        if not self.left:
            interrupt()

    def epoch_finished(self, report) -> None:
        self.reported.append(report.learning_rate)


DROPPING = {"epochs": 3, "milestones": [1, 2], "lr_decay": 0.5, "checkpoint_minutes": 0, "views": 1}


def with_rates(run: Path, rates: Rates, **settings) -> GreedyTrainer:
    given = {"precision": "float32", "batch_size": 32, "device": "cpu"} | DROPPING | settings
    return GreedyTrainer(
        small_network(), run_dir=run, reporter=rates, optimizer=rates.factory, **given
    )


@pytest.mark.parametrize("strategy", ["greedy", "joint", "backprop"])
def test_each_group_keeps_its_own_rate_and_the_schedule_scales_it(
    tmp_path: Path, strategy: str
) -> None:
    rates = Rates()
    with_rates(tmp_path / "run", rates, strategy=strategy).fit(TRAIN, TEST)
    assert rates.seen[:3] == [[0.1, 0.01], [0.05, 0.005], [0.025, 0.0025]]
    assert rates.reported[:3] == [0.1, 0.05, 0.025]


def test_a_learning_rate_that_is_given_is_that_of_all_groups(tmp_path: Path) -> None:
    rates = Rates()
    with_rates(tmp_path / "run", rates, learning_rate=[0.2, 0.4, 0.8]).fit(TRAIN, TEST)
    firsts = [seen for seen in rates.seen if seen[0] in (0.2, 0.4, 0.8)]
    assert rates.seen[:3] == [[0.2, 0.2], [0.1, 0.1], [0.05, 0.05]]
    assert [0.8, 0.8] in firsts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with_rates(run, Rates()).fit(TRAIN, TEST)
    return run


@pytest.mark.parametrize("batches", [20, 26, 39])
def test_rates_of_groups_go_on_where_they_were(tmp_path: Path, whole: Path, batches: int) -> None:
    """The run is interrupted within an epoch and at its end, after the rates have dropped."""
    with pytest.raises(Interrupted):
        with_rates(tmp_path / "cut", Rates(batches)).fit(TRAIN, TEST)
    rest = Rates()
    with_rates(tmp_path / "cut", rest).fit(TRAIN, TEST)
    assert [0.1, 0.01] not in rest.seen[:1]
    for stage in (1, 2, 3):
        cut, uncut = (weights(run, stage) for run in (tmp_path / "cut", whole))
        assert all(torch.equal(cut[k], uncut[k]) for k in uncut)


def test_a_rate_that_is_a_tensor_or_absent(tmp_path: Path) -> None:
    class Fixed(torch.optim.SGD):
        """Has groups without a rate."""

        def __init__(self, parameters) -> None:
            super().__init__(parameters, lr=0.1)
            for group in self.param_groups:
                group["lr"] = None

        def step(self, closure=None) -> None:
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter.data.sub_(parameter.grad, alpha=0.1)

    class OfTensors(torch.optim.Adam):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, lr=torch.tensor(0.5), foreach=False)

    made = []
    given = {"precision": "float32", "batch_size": 32, "device": "cpu"} | DROPPING
    for kind in (Fixed, OfTensors):

        def factory(parameters, kind=kind) -> torch.optim.Optimizer:
            made.append(kind(parameters))
            return made[-1]

        run = tmp_path / kind.__name__
        trainer = GreedyTrainer(small_network(), run_dir=run, optimizer=factory, **given)
        trainer.fit(TRAIN, TEST)
        rate = made[-1].param_groups[0]["lr"]
        assert rate is None if kind is Fixed else torch.equal(rate, torch.tensor(0.125))


@pytest.mark.parametrize("budget", ["auto", "250KiB"])
def test_what_is_not_to_be_trained_stays(tmp_path: Path, budget: str) -> None:
    model = nn.Sequential(*unused(), nn.ReLU(), nn.Linear(CLASSES, CLASSES))
    frozen = nn.Conv2d(1, 4, 3, padding=1).requires_grad_(False)
    plain = with_stage(frozen, nn.BatchNorm2d(4), nn.ReLU())
    for name, network in (("module", model), ("layer", plain)):
        run = tmp_path / name
        new_trainer(run, network, memory_budget=budget).fit(TRAIN, TEST)
        before = next(p for p in network.parameters() if not p.requires_grad)
        (after,) = (v for v in weights(run, 1).values() if v.shape == before.shape and v.dim() == 4)
        assert torch.equal(before, after)


@pytest.mark.parametrize("strategy", ["greedy", "joint"])
def test_a_parameter_without_a_gradient_resumes(tmp_path: Path, strategy: str) -> None:
    settings = {"strategy": strategy, "checkpoint_minutes": 0}
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "cut", unused(), reporter=StopAfter(1), **settings).fit(TRAIN, TEST)
    (next((tmp_path / "cut").rglob("training")) / ".swp").write_text("left by an editor")
    new_trainer(tmp_path / "cut", unused(), **settings).fit(TRAIN, TEST)
    new_trainer(tmp_path / "whole", unused(), **settings).fit(TRAIN, TEST)
    for stage in (1, 2):
        cut, whole = (weights(tmp_path / name, stage) for name in ("cut", "whole"))
        assert all(torch.equal(cut[k], whole[k]) for k in whole)
        recorded = json.loads((tmp_path / f"cut/stage{stage}/stage.json").read_text())["files"]
        assert set(recorded) == {"encoder.safetensors", "heads.safetensors", "history.jsonl"}


def test_a_weight_norm_is_trained_as_it_is_written(tmp_path: Path) -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        conv = weight_norm(nn.Conv2d(1, 4, 3, padding=1))
        return with_stage(conv, nn.BatchNorm2d(4), nn.ReLU())

    new_trainer(tmp_path / "roomy", normed()).fit(TRAIN, TEST)
    new_trainer(tmp_path / "tight", normed(), memory_budget="300KiB").fit(TRAIN, TEST)
    roomy, tight = (weights(tmp_path / name, 1) for name in ("roomy", "tight"))
    assert all(torch.equal(roomy[k], tight[k]) for k in roomy)
