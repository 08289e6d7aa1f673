"""Networks that cannot be trained, which are told beforehand, and some that look like them."""

from pathlib import Path

import pytest
import torch
from small_training import CLASSES, SIDE, TEST, TRAIN, learned, new_trainer, weights
from test_unusual import Convolution, with_stage
from torch import nn

from greedy import UserError
from greedy.models import cut, mlp


class WithState(Convolution):
    """Saves more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            with_stage(Convolution(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
            "a BatchNorm2d of stage 1 .* keeps no running statistics.*GroupNorm",
        ),
        *[
            (with_stage(Convolution()).to(dtype), rf"weights of {dtype}.*call network.float\(\)")
            for dtype in (torch.float64, torch.bfloat16, torch.float16)
        ],
        (with_stage(WithState()), "_extra_state, which is no tensor"),
        (
            with_stage(Convolution()).requires_grad_(False),
            "the output layer, has nothing to train",
        ),
    ],
    ids=["no-statistics", "double", "bfloat16", "half", "state", "frozen"],
)
def test_what_cannot_be_trained_is_told_beforehand(
    tmp_path: Path, model: nn.Module, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", model).fit(TRAIN, TEST)
    assert not (tmp_path / "run/stage0").exists()


class Casting(nn.Linear):
    """Has weights of another type, and gives features in the type that it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def test_a_stage_may_cast_images_to_the_type_of_its_weights(tmp_path: Path) -> None:
    model = mlp(1, SIDE, CLASSES, hidden_layers=1, hidden_width=8)
    model.insert(1, Casting(64, 64).double())
    new_trainer(tmp_path / "run", model).fit(TRAIN, TEST)
    assert torch.float64 in {each.dtype for each in weights(tmp_path / "run", 1).values()}


def test_a_run_that_was_begun_without_running_statistics_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = with_stage(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU())
    with monkeypatch.context() as patch:  # as older versions did
        for check in ("require_trainable", "require_repeatable"):
            patch.setattr(f"greedy.build.cut_network.{check}", lambda *stage: None)
        new_trainer(tmp_path / "run", model).fit(TRAIN, TEST)
    new_trainer(tmp_path / "run", model).train(2)


def test_hooks_of_the_network_itself_are_refused(tmp_path: Path) -> None:
    model = with_stage(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    model.register_forward_hook(lambda module, images, logits: 7 * logits)
    with pytest.raises(UserError, match="the network itself has hooks.*register them on its"):
        new_trainer(tmp_path / "run", model).fit(TRAIN, TEST)
    assert not (tmp_path / "run/stage0").exists()


@pytest.mark.parametrize("budget", ["auto", "250KiB"])
def test_statistics_may_be_means_over_all_batches(tmp_path: Path, budget: str) -> None:
    norm = nn.BatchNorm2d(4, momentum=None)
    model = with_stage(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU())
    new_trainer(tmp_path / "run", model, memory_budget=budget).fit(TRAIN, TEST)
    assert learned(tmp_path / "run", 1)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_dropout_keeps_the_mean_or_nothing(rate: float) -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Dropout(rate), nn.Linear(9, 2))
    dropout = cut(model)[1].dropout
    mask = torch.ones(()) if dropout is None else dropout.mask(50, (9,), torch.Generator())
    assert mask.isfinite().all()
    assert float(mask.mean()) == pytest.approx(float(rate < 1), abs=0.2)
