"""Who holds the graph and the optimiser: joint training, back-propagation, and both."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_training import new_trainer, noise, states
from torch import nn

from greedy import GreedyTrainer, UserError
from greedy.losses import Glob, Output, Pred, PredSim, Sim
from greedy.losses.strategies import stage_losses
from greedy.models import Stage, cut, shapes, vgg8b
from greedy.steps.guard import Guard
from greedy.steps.step import Learner
from greedy.steps.strategies import Greedy, together
from greedy.stores.source import Batch

CLASSES, ROWS, SIDE = 4, 12, 16
SGD = partial(torch.optim.SGD, lr=0.1)


def narrow() -> list[Stage]:
    return cut(vgg8b(3, SIDE, CLASSES, feature_multiplier=1 / 16, hidden_width=6, dropout=0.2))


SHAPES = shapes(narrow(), (3, SIDE, SIDE))


def learners(strategy: str, loss=None) -> list[Learner]:
    """Returns the stages of a narrow VGG8B in float64, with heads that are not zero."""
    torch.manual_seed(0)
    stages = narrow()
    hidden = [shape.hidden for shape in SHAPES]
    losses = stage_losses(strategy, loss or PredSim(pool_target=32), hidden)
    made = []
    for stage, shape, each in zip(stages, SHAPES, losses, strict=True):
        heads = each.heads(shape.hidden, CLASSES).double()
        for parameter in heads.parameters():
            nn.init.normal_(parameter, std=0.1)
        made.append(Learner(stage.double(), heads, each, CLASSES, "float32"))
        made[-1].train()
    return made


def batch_and_masks(trained: list[Learner]) -> tuple[Batch, list]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, SIDE, SIDE, generator=generator).double()
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    masks = [
        each.stage.dropout and each.stage.dropout.mask(ROWS, shape.input, generator).double()
        for each, shape in zip(trained, SHAPES, strict=True)
    ]
    return Batch(labels, x.__getitem__), masks


def state(trained: list[Learner]) -> dict[str, torch.Tensor]:
    modules = nn.ModuleList(nn.ModuleList((each.stage, each.heads)) for each in trained)
    return modules.state_dict()


def assert_close(a: list[Learner], b: list[Learner]) -> None:
    for name, value in state(a).items():
        torch.testing.assert_close(value, state(b)[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("auxiliary", ["none", "downstream:2"])
def test_joint_is_each_stage_alone_on_what_the_one_before_gave_before_its_step(
    auxiliary: str,
) -> None:
    loss = PredSim(pool_target=32, auxiliary=auxiliary)
    together_, alone = learners("joint", loss), learners("joint", loss)
    batch, masks = batch_and_masks(together_)
    together("joint", together_, 1, SGD).step(batch, masks, Guard(), 0)

    x = batch.inputs()
    for learner, mask in zip(alone, masks, strict=True):
        given = x
        twin = deepcopy(learner.stage)  # running statistics learn once
        with torch.no_grad():
            x = twin(given if mask is None else given * mask)
        learner.optimizer = SGD(learner.parameters())
        here = Batch(batch.labels, given.__getitem__)
        Greedy(learner).step(here, [mask], Guard(), 0)
    assert_close(together_, alone)


@pytest.mark.parametrize("strategy", ["backprop", "glob+sim"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_backprop_is_autograd_through_the_whole_network(strategy: str, accumulate: int) -> None:
    trained, expected = learners(strategy), learners(strategy)
    batch, masks = batch_and_masks(trained)
    outcomes = together(strategy, trained, accumulate, SGD).step(batch, masks, Guard(), 0)

    parameters = [p for each in expected for p in each.parameters()]
    total = 0.0
    for rows in np.split(np.arange(ROWS), accumulate):
        x, loss = batch.inputs()[rows], 0.0
        y = F.one_hot(batch.labels[rows], CLASSES).double()
        for learner, mask in zip(expected, masks, strict=True):
            h = learner.stage.hidden(x if mask is None else x * mask[rows])
            if strategy == "glob+sim" and learner is not expected[-1]:
                loss = loss + Sim()(learner.heads(h), y)  # unweighted
            x = learner.stage.pool(h)
        total = total + (loss + F.cross_entropy(x, y)) / accumulate
    total.backward()
    SGD(parameters).step()
    assert_close(trained, expected)
    assert float(sum(each.loss for each in outcomes)) == pytest.approx(total.item())
    assert outcomes[-1].logits.shape == (ROWS, CLASSES)


@pytest.mark.parametrize("strategy", ["backprop", "glob+sim"])
@pytest.mark.parametrize("accumulate", [3, 6])
def test_exact_micro_batches_are_the_whole_batch(strategy: str, accumulate: int) -> None:
    """Batch norm, the losses that compare samples, and dropout as well; in every step."""
    trained, expected = learners(strategy), learners(strategy)
    batch, masks = batch_and_masks(trained)
    exact = together(strategy, trained, accumulate, SGD, exact=True)
    plain = together(strategy, expected, 1, SGD)
    for position in range(2):
        found, known = (each.step(batch, masks, Guard(), position) for each in (exact, plain))
        assert_close(trained, expected)
        for one, other in zip(found, known, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("exact", [False, True])
def test_a_weight_that_stages_share_takes_one_step(exact: bool) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    model = nn.Sequential(nn.Flatten(), one, nn.ReLU(), other, nn.ReLU(), nn.Linear(6, 3)).double()
    stages = cut(deepcopy(model))
    trained = []
    for stage in stages:
        loss = Output() if stage is stages[-1] else Glob()
        learner = Learner(stage, loss.heads((6,), 3), loss, 3, "float32")
        learner.train()
        trained.append(learner)
    strategy = together(
        "backprop", trained, 2 if exact else 1, partial(torch.optim.SGD, lr=0.1), exact=exact
    )
    x, labels = torch.randn(8, 6, 1, 1, dtype=torch.float64), torch.arange(8) % 3
    strategy.step(Batch(labels, x.__getitem__), [None] * 3, Guard(), 0)
    F.cross_entropy(model(x), labels).backward()
    expected = one.weight - 0.1 * one.weight.grad
    torch.testing.assert_close(stages[0].layer[0].weight, expected)


def test_losses_of_a_strategy() -> None:
    joint = learners("joint", Pred(32))
    assert [type(each.loss).__name__ for each in joint] == ["Pred"] * 7 + ["Output"]
    alone = learners("backprop", Pred(32))
    assert all(not list(each.heads.parameters()) for each in alone)
    both = learners("glob+sim", Pred(32))
    assert [type(each.loss).__name__ for each in both] == ["Sim"] * 7 + ["Output"]
    assert both[-1].loss.scale == 1.0


# Whole runs


def network(activation: str = "leaky_relu") -> nn.Sequential:
    with torch.device("meta"):
        return vgg8b(
            3, SIDE, CLASSES, feature_multiplier=1 / 16, hidden_width=6, activation=activation
        )


def run_of(path: Path, model: nn.Sequential | None = None, **settings) -> GreedyTrainer:
    trainer = new_trainer(path, model or network(), **({"epochs": 1} | settings))
    trainer.fit(noise(96, CLASSES, 3, SIDE), noise(40, CLASSES, 3, SIDE))
    return trainer


def test_first_weights_do_not_depend_on_the_strategy_but_for_the_output_layer(tmp_path) -> None:
    """The weights before the first step, at a rate too small to change any of them."""
    tiny = {"learning_rate": 1e-30}
    with torch.device("meta"):
        convolution = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveMaxPool2d(2)]
        linear = [nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU()]
        model = nn.Sequential(*convolution, *linear, nn.Linear(6, CLASSES))
    encoders = {}
    for strategy in ("joint", "backprop", "glob+sim", "greedy"):
        run_of(tmp_path / strategy, model, strategy=strategy, **tiny)
        encoders[strategy] = [
            load_file(tmp_path / strategy / f"stage{n}/encoder.safetensors") for n in (1, 2, 3)
        ]
    for strategy, weights in encoders.items():
        for weight, expected in zip(weights[:-1], encoders["greedy"][:-1], strict=True):
            assert torch.equal(weight["layer.0.weight"], expected["layer.0.weight"])
        last = weights[-1]["layer.0.weight"]
        assert bool(last.abs().max() > 1e-20) == (strategy == "backprop")


@pytest.mark.parametrize("strategy", ["joint", "backprop", "glob+sim"])
def test_a_run_is_a_run_whatever_the_strategy(tmp_path, strategy) -> None:
    trainer = run_of(tmp_path / "run", strategy=strategy)
    run = trainer.run
    assert states(run, range(9)) == ["complete"] * 9
    assert not run.network_dir.exists()
    records = [run.record(n) for n in range(1, 9)]
    errors = [record.metrics.test_error_percent for record in records]
    assert errors[-1] is not None
    assert [error is None for error in errors[:-1]] == [strategy != "joint"] * 7
    assert all(record.images_per_second > 0 for record in records)
    assert all(record.choices.planned_peak_bytes > 0 for record in records)
    net = trainer.assemble()
    images, labels = noise(40, CLASSES, 3, SIDE).tensors
    wrong = int((net(images.float() / 255).argmax(dim=1) != labels).sum())
    assert 100 * wrong / 40 == pytest.approx(errors[-1], abs=5)  # in other batches
    before = [record.lineage for record in records]
    assert [record.lineage for record in trainer.train()] == before  # nothing is done again
    assert [record.lineage for record in trainer.train(retrain_from=1)] == before


@pytest.mark.parametrize(
    "settings",
    [{"optimizer_state": "host"}, {"optimizer": partial(torch.optim.SGD, lr=0.1)}],
    ids=["host", "sgd"],
)
def test_optimisers_that_wait_for_the_loss_can_be_planned_too(tmp_path, settings) -> None:
    trainer = run_of(tmp_path / "run", strategy="joint", **settings)
    assert trainer.run.record(8).choices.planned_peak_bytes > 0


def test_a_kill_while_the_makings_are_deleted_costs_nothing(tmp_path) -> None:
    trainer = run_of(tmp_path / "run", strategy="joint")
    before = [trainer.run.record(n).seconds for n in range(1, 9)]
    (tmp_path / "run/.network.old/training").mkdir(parents=True)
    again = run_of(tmp_path / "run", strategy="joint")
    assert [again.run.record(n).seconds for n in range(1, 9)] == before
    assert not (tmp_path / "run/.network.old").exists()


def test_evaluation_of_the_whole_network_is_within_the_budget_too(tmp_path) -> None:
    free = run_of(tmp_path / "free", strategy="backprop").run.record(8).choices
    tight = {"strategy": "backprop", "accumulate": 16, "memory_budget": "1300KiB"}
    small = run_of(tmp_path / "tight", **tight).run.record(8).choices
    assert small.planned_peak_bytes <= 1300 * 1024 < free.planned_peak_bytes
    assert small.write_batch < free.write_batch


def test_exact_micro_batches_train_in_less_memory_to_the_same_loss(tmp_path) -> None:
    by = {"strategy": "backprop"}
    whole = run_of(tmp_path / "whole", **by).run.record(8)
    exact = run_of(tmp_path / "exact", **by, accumulate=16, exact=True).run.record(8)
    assert exact.choices.planned_peak_bytes < 0.8 * whole.choices.planned_peak_bytes
    assert exact.metrics.train_loss == pytest.approx(whole.metrics.train_loss, rel=0.01)


def test_what_trains_all_stages_at_once_trains_none_alone(tmp_path) -> None:
    trainer = run_of(tmp_path / "run", strategy="joint")
    with pytest.raises(UserError, match="trains all stages at once, by joint: use `greedy train"):
        trainer.train_stage(2, again=True)
    with pytest.raises(UserError, match="give --retrain without a stage"):
        trainer.train(retrain_from=3)


def test_a_budget_that_the_whole_network_breaks_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="a step of the whole network takes .* is 100.0 KiB: train"):
        run_of(tmp_path / "run", strategy="joint", memory_budget="100KiB")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "joint", "epochs": [1] * 8}, "must be one number where .* is joint"),
        ({"strategy": "backprop", "learning_rate": [0.1] * 8}, "must be one number where"),
        ({"strategy": "joint", "accumulate": 2}, "must be 1 where training.strategy is joint"),
        ({"accumulate": 2}, "must be 1 where training.strategy is greedy"),
        ({"exact": True}, "must be false where training.strategy is greedy, whose gradients"),
        ({"strategy": "backprop", "exact": True}, "must be false where .* give the number of"),
        ({"strategy": "gready"}, "did you mean greedy"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        GreedyTrainer(network(), run_dir=tmp_path / "run", **settings)
