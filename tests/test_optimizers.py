"""The optimisers that a recipe can name."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from small_training import TEST, TRAIN, files, new_trainer, same, weights
from torch import nn

from greedy import Reporter, UserError
from greedy.base.errors import Interrupted
from greedy.recipes import load
from greedy.recipes.identity import recipe_digest, result_fields
from greedy.steps.guard import Guard
from greedy.steps.moments import make_moments
from greedy.steps.optimizers import make_optimizer, undecayed

NAMED = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "nesterov": True, "weight_decay": 0.01},
    "plain-sgd": {"optimizer": "sgd", "momentum": 0.0},
    "adam": {"weight_decay": 0.1},
}


def by_dimensions(parameters, kind, decay: float, **settings) -> torch.optim.Optimizer:
    """Returns an optimiser of a network without norms of several dimensions."""
    several = list(parameters)
    groups = [
        {"params": [p for p in several if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in several if p.dim() == 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=0.01, fused=True, **settings)


TORCH = {
    "adamw": partial(by_dimensions, kind=torch.optim.AdamW, decay=0.1),
    "sgd": partial(by_dimensions, kind=torch.optim.SGD, decay=0.01, momentum=0.9, nesterov=True),
    "plain-sgd": partial(by_dimensions, kind=torch.optim.SGD, decay=0.0),
    "adam": partial(by_dimensions, kind=torch.optim.Adam, decay=0.1),
}


@pytest.mark.parametrize("name", NAMED)
def test_they_are_torchs_without_decay_of_norms_and_biases(tmp_path: Path, name: str) -> None:
    new_trainer(tmp_path / "named", **NAMED[name]).fit(TRAIN, TEST)
    new_trainer(tmp_path / "torch", optimizer=TORCH[name]).fit(TRAIN, TEST)
    new_trainer(tmp_path / "host", optimizer_state="host", **NAMED[name]).fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        ours, hosts = weights(tmp_path / "named", stage), weights(tmp_path / "host", stage)
        theirs = weights(tmp_path / "torch", stage)
        for key in (key for key in ours if "weight" in key):
            torch.testing.assert_close(ours[key], theirs[key])
            torch.testing.assert_close(ours[key], hosts[key])


def test_norms_and_biases_of_every_kind_do_not_decay() -> None:
    parts = {
        "convolution": nn.Conv2d(3, 4, 3),
        "maps": nn.LayerNorm((4, 2, 2)),
        "batch": nn.BatchNorm2d(4),
        "attention": nn.MultiheadAttention(4, 2),
    }
    module = nn.ModuleDict(parts)
    kept = undecayed([module])
    decayed = {name for name, p in module.named_parameters() if p not in kept}
    expected = {"convolution.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert decayed == expected


def test_a_first_step_that_is_skipped_leaves_no_momentum() -> None:
    training = load("demo", ["training.optimizer=sgd"]).training
    weight = nn.Parameter(torch.ones(100))
    optimizer = make_optimizer(training, [weight], 0.1)
    make_moments(optimizer, 1)
    for position, loss in enumerate((float("nan"), 1.0)):
        weight.grad = torch.ones(100)
        Guard().update(optimizer, torch.tensor(loss), position, [weight])
    assert torch.equal(weight.detach(), torch.full((100,), 0.9))


class Stop(Reporter):
    """Interrupts after a number of batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def batch_finished(self, rows: int) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("state", ["device", "host"])
def test_they_resume_to_the_bit(tmp_path: Path, state: str) -> None:
    settings = NAMED["sgd"] | {"optimizer_state": state}
    new_trainer(tmp_path / "whole", **settings).fit(TRAIN, TEST)
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "cut", reporter=Stop(20), **settings).fit(TRAIN, TEST)
    new_trainer(tmp_path / "cut", **settings).fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        assert same(weights(tmp_path / "whole", stage), weights(tmp_path / "cut", stage))


class Copying(torch.optim.Optimizer):
    """Makes its state beforehand, and copies what is loaded into it."""

    def __init__(self, parameters, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})
        for parameter in self._parameters():
            self.state[parameter]["sum"] = torch.zeros_like(parameter)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None:
                self.state[parameter]["sum"].mul_(0.9).add_(parameter.grad)
                parameter.sub_(self.param_groups[0]["lr"] * self.state[parameter]["sum"])

    def load_state_dict(self, state) -> None:
        for number, parameter in enumerate(self._parameters()):
            self.state[parameter]["sum"].copy_(state["state"][number]["sum"])
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


class Braking(Copying):
    """Takes steps by numbers of the step before, from the second on."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter in self._parameters():
            if "steps" in self.state[parameter] and self.state[parameter]["sum"].norm().item() > 9:
                self.state[parameter]["sum"].zero_()
            self.state[parameter]["steps"] = 1
        super().step()


@pytest.mark.parametrize("kind", [Copying, Braking])
def test_a_users_own_resumes_to_the_bit(tmp_path: Path, kind) -> None:
    new_trainer(tmp_path / "whole", optimizer=kind).fit(TRAIN, TEST)
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "cut", optimizer=kind, reporter=Stop(20)).fit(TRAIN, TEST)
    new_trainer(tmp_path / "cut", optimizer=kind).fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        assert same(weights(tmp_path / "whole", stage), weights(tmp_path / "cut", stage))


def test_the_plan_counts_their_moments(tmp_path: Path) -> None:
    def planned(name: str, **settings) -> int:
        trainer = new_trainer(tmp_path / name, epochs=1, **settings)
        trainer.fit(TRAIN, TEST)
        return trainer.run.record(1).choices.planned_peak_bytes

    adam, sgd = planned("adam"), planned("sgd", optimizer="sgd")
    plain = planned("plain", **NAMED["plain-sgd"])
    assert adam > sgd > plain
    assert abs((adam - sgd) - (sgd - plain)) < 100  # one moment each, and Adam's counts of steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.5}, "momentum is 0.5 but must be left out where training.optimizer is"),
        ({"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "be false where .* is 0"),
        ({"optimizer": "rmsprop"}, "must be one of adam, adamw, sgd"),
        ({"optimizer": torch.optim.SGD, "weight_decay": 0.1}, "weight_decay is for optimisers"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", **settings)
    assert not files(tmp_path)


def test_digests_of_older_recipes_do_not_have_them() -> None:
    older = load("demo")
    assert not {f"training.{f}" for f in ("optimizer", "weight_decay")} & set(result_fields(older))
    assert recipe_digest(load("demo", ["training.weight_decay=0.1"])) != recipe_digest(older)
