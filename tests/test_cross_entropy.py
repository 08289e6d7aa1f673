"""The cross-entropy with smoothed labels and weighted classes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_training import CLASSES, TEST, TRAIN, files, new_trainer, same, weights
from torch import nn

from greedy import UserError
from greedy.losses import Pred, PredSim, Sim
from greedy.losses.prediction import CrossEntropy
from greedy.losses.strategies import stage_losses
from greedy.recipes import load
from greedy.recipes.identity import recipe_digest

WEIGHTS = (0.5, 2.0, 1.0)
BOTH = {"label_smoothing": 0.1, "class_weights": WEIGHTS}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_it_is_torchs(smoothing, class_weights) -> None:
    p = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0])
    tensor = None if class_weights is None else torch.tensor(class_weights).double()
    expected = nn.CrossEntropyLoss(tensor, label_smoothing=smoothing)(p, labels)
    ours = CrossEntropy(smoothing, class_weights)(p, F.one_hot(labels).double())
    torch.testing.assert_close(ours, expected)
    slopes = [torch.autograd.grad(loss, p)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("strategy", ["greedy", "joint", "backprop", "glob+sim"])
def test_all_strategies_have_it_where_they_have_a_cross_entropy(strategy: str) -> None:
    entropy = CrossEntropy(**BOTH)
    first, output = stage_losses(strategy, PredSim(), [(4,), (3,)], entropy)
    assert output.cross_entropy == entropy
    assert first == {
        "greedy": PredSim(cross_entropy=entropy),
        "joint": PredSim(cross_entropy=entropy),
        "backprop": first,
        "glob+sim": Sim(),
    }.get(strategy)


def test_balanced_weights_are_inverse_to_the_training_rows(tmp_path: Path) -> None:
    counts = torch.bincount(TRAIN.tensors[1], minlength=CLASSES)
    listed = [len(TRAIN) / CLASSES / int(count) for count in counts]
    for name, value in (("balanced", "balanced"), ("listed", listed), ("equal", None)):
        new_trainer(tmp_path / name, class_weights=value).fit(TRAIN, TEST)
    for stage in (1, 3):
        balanced, equal = weights(tmp_path / "balanced", stage), weights(tmp_path / "equal", stage)
        assert same(balanced, weights(tmp_path / "listed", stage))
        assert not same(balanced, equal)


def test_back_propagation_trains_with_it(tmp_path: Path) -> None:
    new_trainer(tmp_path, loss=Pred(), strategy="backprop", **BOTH).fit(TRAIN, TEST)
    lines = (tmp_path / "stage3/history.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "has 2 entries and the data have 3 classes: give one a"),
        ({"class_weights": [1.0, -2.0, 1.0]}, "be balanced or a list of numbers above 0"),
        ({"loss": PredSim(cross_entropy=CrossEntropy(0.1))}, "give label_smoothing and class_w"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", **settings).fit(TRAIN, TEST)
    assert not files(tmp_path)


def test_a_recipe_with_it_is_another() -> None:
    others = [
        load("demo", [f"loss.{each}"]) for each in ("label_smoothing=0", "label_smoothing=0.1")
    ]
    digests = [recipe_digest(each) for each in (load("demo"), *others)]
    assert digests[0] == digests[1] != digests[2]
