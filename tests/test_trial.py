"""Networks whose code would make a run silently wrong are refused before anything is written."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import CLASSES, TEST, TRAIN, new_trainer
from torch import Tensor, nn

from greedy import GreedyTrainer, UserError
from greedy.build.trial import require_resumable
from greedy.losses import Features, LocalHeads, PredSim

WIDTH = 16


def network(*layers: nn.Module) -> nn.Sequential:
    values = TRAIN[0][0].numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(values, WIDTH), nn.ReLU(), *layers, nn.Linear(WIDTH, CLASSES)
    )


def trainer(run: Path, model: nn.Module, **settings: object) -> GreedyTrainer:
    return new_trainer(run, model=model, epochs=1, augmentation="none", **settings)


class Centred(nn.Module):
    """Subtracts a running mean, which is kept in one of several ways."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        if kept == "attribute":
            self.mean = torch.zeros(WIDTH)
        else:
            self.register_buffer("mean", torch.zeros(WIDTH), persistent=kept == "saved")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


class SetByTheFirstBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.is_set = nn.Parameter(torch.zeros(WIDTH)), False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.is_set:
            self.bias.data, self.is_set = -x.mean(0), True
        return x + self.bias


class Growing(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x * (1 + self.calls / 100)


class Counting(nn.Module):
    """What it counts changes nothing."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class AlwaysDropping(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


class OfTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - x.mean(0))


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[None].squeeze()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=WIDTH))


LOST = "computes with numbers that it changes as it trains and that its state_dict lacks"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Centred("buffer"), LOST),
        (lambda: Centred("attribute"), LOST),
        (SetByTheFirstBatch, LOST),
        (Growing, LOST),
        (lambda: AlwaysDropping(0.3), "is random in evaluation mode, too"),
        (OfTheBatch, "depends on the others in its batch"),
        (lambda: nn.Softmax(dim=0), "depends on the others in its batch"),
        (Squeezed, "depends on the others in its batch"),
    ],
)
def test_what_a_stage_gives_can_be_stored_and_its_state_saved(
    tmp_path: Path, layer, message: str
) -> None:
    model = network(nn.Linear(WIDTH, WIDTH), layer(), nn.ReLU())
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(UserError, match=rf"stage 2 \(linear16\).*{message}"):
        trainer(tmp_path / "run", model).fit(TRAIN, TEST)
    assert not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("layer", [lambda: Centred("saved"), Counting])
def test_state_that_is_saved_or_changes_nothing_is_no_fault(tmp_path: Path, layer) -> None:
    model = network(nn.Linear(WIDTH, WIDTH), layer(), nn.ReLU())
    trained = trainer(tmp_path / "run", model)
    records = trained.fit(TRAIN, TEST)
    images, labels = TEST.tensors
    wrong = trained.assemble()(images / 255).argmax(1) != labels
    recorded = records[-1].metrics.test_error_percent
    assert 100 * float(wrong.float().mean()) == pytest.approx(recorded, abs=2)


@pytest.mark.parametrize("strategy", ["greedy", "joint"])
def test_stages_that_share_layers_can_only_be_trained_together(
    tmp_path: Path, strategy: str
) -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    trained = trainer(
        tmp_path / "run", network(shared, nn.ReLU(), shared, nn.ReLU()), strategy=strategy
    )
    if strategy == "greedy":
        with pytest.raises(UserError, match="stage 3 .* shares weights with stage 2 .*: give each"):
            trained.fit(TRAIN, TEST)
        return
    trained.fit(TRAIN, TEST)
    _, second, third, _ = [m.weight for m in trained.assemble() if isinstance(m, nn.Linear)]
    assert torch.equal(second, third)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((WIDTH,), 2.0))
        self.same = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x * self.factor)


def test_constants_may_be_shared(tmp_path: Path) -> None:
    shared = Fixed()
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), shared) for _ in range(2)]
    trainer(tmp_path / "run", network(*layers)).fit(TRAIN, TEST)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            x = x + torch.from_numpy(np.random.rand(WIDTH)).float()  # noqa: NPY002
        return x


class OddRowsFail(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1, WIDTH).flatten(0, 1)


def test_noise_in_training_is_no_fault_and_a_stage_that_cannot_be_tried_hides_none(
    tmp_path: Path,
) -> None:
    noisy = [module for _ in range(3) for module in (nn.Linear(WIDTH, WIDTH), Noisy(), nn.ReLU())]
    trainer(tmp_path / "noisy", network(*noisy)).fit(TRAIN, TEST)
    model = network(OddRowsFail(), nn.Linear(WIDTH, WIDTH), AlwaysDropping(0.5))
    with pytest.raises(UserError, match="stage 2 .* is random in evaluation mode"):
        trainer(tmp_path / "run", model).fit(TRAIN, TEST)


def test_running_statistics_cannot_be_shared_either(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(WIDTH)
    model = network(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, WIDTH), norm)
    with pytest.raises(UserError, match="shares weights with stage 2"):
        trainer(tmp_path / "run", model).fit(TRAIN, TEST)


def test_what_cannot_be_copied_or_optimised_is_told(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(UserError, match=r"stage 2 .* cannot be copied .*: use for inst"):
        trainer(tmp_path / "old", network(old, nn.ReLU())).fit(TRAIN, TEST)
    with pytest.raises(UserError, match=r"weight of stage 2 .* is complex"):
        trainer(tmp_path / "complex", network(Complex(), nn.ReLU())).fit(TRAIN, TEST)


class Scaled(nn.Module):
    """A loss that hopes to learn its scale."""

    output_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        return PredSim().heads(shape, num_classes)

    def forward(self, features, y: Tensor) -> Tensor:
        return self.scale * PredSim()(features, y)


def test_a_loss_learns_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss Scaled has parameters of its own"):
        trainer(tmp_path / "run", network(), loss=Scaled()).fit(TRAIN, TEST)
    trainer(tmp_path / "run", network(), loss=Scaled().requires_grad_(False)).fit(TRAIN, TEST)


class OwnDropout(nn.Dropout):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        OwnDropout.calls += 1
        return super().forward(x)


def test_dropout_with_code_or_hooks_of_its_own_stays_where_it_is(tmp_path: Path) -> None:
    hooked, seen = nn.Dropout(0.3), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    model = network(nn.Linear(WIDTH, WIDTH), OwnDropout(0.3), nn.Linear(WIDTH, WIDTH), hooked)
    trained = trainer(tmp_path / "run", model)
    trained.fit(TRAIN, TEST)
    assert OwnDropout.calls > 10
    assert len(seen) > 10
    assert any(isinstance(module, OwnDropout) for module in trained.assemble())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
def test_the_caller_s_modes_change_nothing(tmp_path: Path, mode) -> None:
    def weights(run: Path) -> bytes:
        torch.manual_seed(0)
        made = trainer(run, network(nn.Linear(WIDTH, WIDTH), nn.ReLU()), precision="float32")
        with mode() if mode else torch.autocast("cpu", torch.bfloat16):
            made.fit(TRAIN, TEST)
        return (run / "stage2/encoder.safetensors").read_bytes()

    torch.manual_seed(0)
    usual = trainer(
        tmp_path / "usual", network(nn.Linear(WIDTH, WIDTH), nn.ReLU()), precision="float32"
    )
    usual.fit(TRAIN, TEST)
    assert weights(tmp_path / "run") == (tmp_path / "usual/stage2/encoder.safetensors").read_bytes()


class Counted(PredSim):
    """Counts its calls, as logging does or as a weight that grows from step to step."""

    calls = 0
    grows = False

    def __call__(self, features, y: Tensor) -> Tensor:
        Counted.calls += 1
        weight = min(1.0, self.calls / 1000) if self.grows else 1.0
        return weight * super().__call__(features, y)


class CentredLoss(PredSim):
    """Draws features to a mean that it moves."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "mean", 0.0)

    def __call__(self, features, y: Tensor) -> Tensor:
        object.__setattr__(self, "mean", 0.9 * self.mean + 0.1 * float(features.z.detach().mean()))
        return super().__call__(features, y) + (features.z - self.mean).square().mean()


class NoisyLoss(PredSim):
    def __call__(self, features, y: Tensor) -> Tensor:
        return super().__call__(features, y) * torch.rand(())


class Growing(Counted):
    grows = True


@pytest.mark.parametrize("loss", [Growing, CentredLoss])
def test_a_loss_keeps_no_numbers_between_steps(loss: type, tmp_path: Path) -> None:
    """They are in no checkpoint."""
    made = trainer(tmp_path / "run", network(), loss=loss())
    with pytest.raises(UserError, match=f"the loss {loss.__name__} gives something else"):
        made.fit(TRAIN, TEST)
    assert not (tmp_path / "run" / "stage1").exists()


class Whitened(nn.Module):
    """Subtracts a running mean, which is in no buffer."""

    mean = 0.0

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * h.detach().mean(0)
        return h - self.mean


class OwnHeads(PredSim):
    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        heads = super().heads(shape, num_classes)
        heads.similarity = nn.Sequential(Whitened(), heads.similarity)
        return heads


def test_heads_have_what_they_learn_in_their_state(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", network(), loss=OwnHeads())
    with pytest.raises(UserError, match=r"one of the heads of OwnHeads .* register_buffer"):
        made.fit(TRAIN, TEST)


class Rooted(PredSim):
    """Is not a number, whatever it is given."""

    def __call__(self, features, y: Tensor) -> Tensor:
        return super().__call__(features, y) + 0.0 * (features.p.detach().abs().mean() * -1).sqrt()


def test_a_loss_that_is_no_number_is_no_other_each_time() -> None:
    """Training says what is wrong with it."""
    loss = Rooted()
    assert loss(Features(torch.ones(4, 3), torch.ones(4, CLASSES)), torch.eye(4, CLASSES)).isnan()
    require_resumable(loss, (WIDTH,), CLASSES)


@pytest.mark.parametrize("loss", [Counted, NoisyLoss])
def test_a_loss_may_count_and_draw(loss: type, tmp_path: Path) -> None:
    trainer(tmp_path / "run", network(), loss=loss()).fit(TRAIN, TEST)
