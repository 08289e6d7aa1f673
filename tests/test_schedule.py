"""The learning rate over the epochs, and gradients that are clipped."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from small_training import TEST, TRAIN, files, new_trainer, same, weights
from torch import nn

from greedy import UserError
from greedy.recipes import load
from greedy.training.learners import new_schedule
from greedy.training.schedule import Patience

RATE = 0.02


def rates(*settings: str) -> list[float]:
    """Returns the rate in each epoch of the demo's first stage, as a share of the first rate."""
    recipe = load("demo", [f"training.{setting}" for setting in settings])
    schedule = new_schedule(recipe, 1)
    assert isinstance(recipe.training.epochs, int)
    return [schedule.factor_at(epoch) for epoch in range(recipe.training.epochs)]


def test_a_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates("schedule=cosine", "epochs=8") == pytest.approx(expected)
    warm = rates("schedule=cosine", "epochs=11", "warmup_epochs=3")
    assert warm == pytest.approx([0.25, 0.5, 0.75, *expected])


def test_the_rate_rises_before_it_drops_at_milestones() -> None:
    settings = ("epochs=8", "milestones=[5]", "lr_decay=0.5", "warmup_epochs=1")
    assert rates(*settings) == [0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("first", [1.0, 1e-3, 0.0, -1e-3, -1.0])
def test_patience_takes_losses_of_either_sign(first: float) -> None:
    patience = Patience(0.1, decay=0.5, epochs=2)
    loss = first
    for _ in range(3):
        assert not patience.observe(loss)
        loss -= 0.002 * max(abs(first), 1e-3)
    assert patience.waited == 0
    ends = [patience.observe(patience.best + n * 1e-4 * abs(first)) for n in range(8)]
    assert ends == [False] * 7 + [True]
    assert patience.dropped == 4


def test_a_stage_trains_at_the_rates_of_its_own_epochs(tmp_path: Path) -> None:
    trainer = new_trainer(
        tmp_path, epochs=[2, 3, 2], learning_rate=RATE, schedule="cosine", warmup_epochs=1
    )
    trainer.fit(TRAIN, TEST)
    for stage, expected in ((1, [0.5, 1]), (2, [0.5, 1, 0.5])):
        lines = (tmp_path / f"stage{stage}/history.jsonl").read_text().splitlines()
        found = [json.loads(line)["learning_rate"] for line in lines]
        assert found == pytest.approx([RATE * factor for factor in expected])


class Clipping(torch.optim.SGD):
    """SGD that clips before it steps."""

    def step(self, closure=None):
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.05)
        return super().step(closure)


@pytest.mark.parametrize("settings", [{}, {"strategy": "backprop"}, {"precision": "float16"}])
def test_gradients_are_clipped_to_a_norm(tmp_path: Path, settings) -> None:
    """Those of a stage with its heads, or of the network that one loss trains; after float16's
    scale is taken away."""
    sgd = {"momentum": 0.0, "optimizer": "sgd"} | settings
    new_trainer(tmp_path / "clipped", gradient_clip=0.05, **sgd).fit(TRAIN, TEST)
    new_trainer(tmp_path / "free", **sgd).fit(TRAIN, TEST)
    own = {"optimizer": partial(Clipping, lr=0.01)} | settings
    new_trainer(tmp_path / "own", **own).fit(TRAIN, TEST)
    for stage in (1, 2):
        clipped, free = weights(tmp_path / "clipped", stage), weights(tmp_path / "free", stage)
        assert not same(clipped, free)
        for key, value in weights(tmp_path / "own", stage).items():
            if "weight" in key:
                torch.testing.assert_close(clipped[key], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 2}, "warmup_epochs is 2 but must be less than training.epochs, 2"),
        ({"schedule": "cosine", "patience": 3}, "must be 0 where training.schedule is cosine"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", **settings)
    assert not files(tmp_path)
