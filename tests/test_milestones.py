"""The epochs at which the learning rate drops, by default and when the number of epochs changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedy import recipes
from greedy.base.errors import UserError
from greedy.recipes import milestones

PUBLISHED = {
    400: [200, 300, 350, 375],
    200: [100, 150, 175, 188],
    100: [50, 75, 89, 94],
}

Write = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        *PUBLISHED.items(),
        (1, []),
        (2, [1]),
        (5, [3, 4]),
        (16, [8, 12, 14, 15]),
        (50, [25, 38, 44, 47]),
        ([400, 20], [[200, 300, 350, 375], [10, 15, 18, 19]]),
    ],
)
def test_milestones_by_default(epochs: int | list[int], expected: list[int]) -> None:
    recipe = recipes.load("cifar10/vgg8b-predsim", [f"training.epochs={epochs}"])
    assert recipe.training.milestones == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.epochs=40"], [5, 10, 30]),
        (["training.epochs=10"], [1, 3, 8]),  # 1.25, 2.5 and 7.5
        (["training.epochs=4"], [1, 3]),  # 0.5, 1 and 3
        (["training.epochs=[40, 20]"], [[5, 10, 30], [3, 5, 15]]),
        (["training.epochs=40", "training.milestones=[39]"], [39]),
        (["training.milestones=[]"], []),
        (["training.milestones=[[1], [2, 3]]"], [[1], [2, 3]]),
        (["training.learning_rate=0.1"], [10, 20, 60]),
    ],
)
def test_milestones_follow_changed_epochs(
    overrides: list[str], expected: list[int], write: Write
) -> None:
    path = write(
        "long.toml", 'extends = "demo"\n[training]\nepochs = 80\nmilestones = [10, 20, 60]\n'
    )
    assert recipes.load(path, overrides).training.milestones == expected


def test_milestones_follow_epochs_through_each_layer(write: Write) -> None:
    write("a.toml", 'extends = "demo"\n[training]\nepochs = 10\nmilestones = [5]\n')
    write("b.toml", 'extends = "a.toml"\n[training]\nepochs = [20, 40]\n')
    path = write("c.toml", 'extends = "b.toml"\n[training]\nepochs = [20, 20]\n')
    assert recipes.load(path).training.milestones == [[10], [10]]
    assert recipes.load(path, ["training.epochs=40"]).training.milestones == [[20], [20]]
    with pytest.raises(UserError, match="training.milestones must have one list"):
        recipes.load(path, ["training.epochs=[1, 2, 3]"])


@pytest.mark.parametrize(
    ("overrides", "scale", "epochs", "drops"),
    [
        ([], 1, 400, [200, 300, 350, 375]),
        ([], 0.1, 40, [20, 30, 35, 38]),
        ([], 0.001, 1, []),
        ([], 2, 800, [400, 600, 700, 750]),
        (["training.epochs=10"], 0.25, 3, [2]),
        (["training.epochs=10", "training.milestones=[4, 8]"], 0.5, 5, [2, 4]),
        (["training.epochs=[10, 4]"], 0.5, [5, 2], [[3, 4], [1]]),
    ],
)
def test_scaled_epochs_are_changed_epochs(
    overrides: list[str], scale: float, epochs: milestones.Epochs, drops: milestones.Milestones
) -> None:
    recipe = recipes.load("cifar10/vgg8b-predsim", overrides, epochs_scale=scale)
    assert (recipe.training.epochs, recipe.training.milestones) == (epochs, drops)


@pytest.mark.parametrize("scale", [0, -0.1, float("nan"), float("inf")])
def test_epochs_are_scaled_by_a_positive_number(scale: float) -> None:
    with pytest.raises(UserError, match=f"epochs cannot be multiplied by {scale:g}"):
        recipes.load("demo", epochs_scale=scale)


def test_a_resolved_recipe_keeps_its_milestones(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(recipes.to_toml(recipes.load("mnist/mlp-pred")))
    assert recipes.load(path, ["training.epochs=400"]).training.milestones == [200, 300, 356, 376]


@settings(deadline=None)
@given(epochs=st.integers(1, 2000))
def test_default_milestones_lie_within_the_epochs(epochs: int) -> None:
    assert_proper(milestones.default(epochs), epochs)


@settings(deadline=None)
@given(data=st.data(), old=st.integers(1, 500), new=st.integers(1, 500))
def test_moved_milestones_lie_within_the_epochs(data: st.DataObject, old: int, new: int) -> None:
    drops = sorted(data.draw(st.sets(st.integers(1, max(1, old - 1)), max_size=6)))
    moved = [m for m in milestones.rescale(drops, old, new) if isinstance(m, int)]
    assert_proper(moved, new)
    exact = [m * new / old for m in drops]
    assert all(any(abs(m - x) <= 0.5 for x in exact) for m in moved)
    assert all(any(abs(m - x) <= 0.5 for m in [0, *moved, new]) for x in exact)


def assert_proper(drops: list[int], epochs: int) -> None:
    assert drops == sorted(set(drops))
    assert all(0 < m < epochs for m in drops)
