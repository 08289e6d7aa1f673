"""The settings of a network given in Python, and the constructor that takes them."""

from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from small_training import network
from torch import nn

from greedy import GreedyTrainer, UserError
from greedy.build.python_recipe import FIELDS
from greedy.build.settings import TrainerSettings
from greedy.losses import Pred
from greedy.recipes import Recipe, load
from greedy.recipes.schema import SECTIONS


def as_given(schema: Any) -> Any:
    """Returns the type of a field's value as Python users give it: any sequence for a list."""
    if get_origin(schema) in (Union, UnionType):
        return Union[tuple(map(as_given, get_args(schema)))]  # noqa: UP007
    return Sequence[get_args(schema)] if get_origin(schema) is list else schema


def test_settings_have_the_names_and_types_of_the_schema() -> None:
    fields = {
        name: as_given(get_type_hints(SECTIONS[section])[field])
        for name, (section, field) in FIELDS.items()
    }
    assert get_type_hints(TrainerSettings) == fields | {"seed": get_type_hints(Recipe)["seed"]}


def test_a_trainer_of_a_recipe_is_made_by_the_constructor(tmp_path: Path) -> None:
    class Mine(GreedyTrainer):
        def __init__(self, model: nn.Sequential | None, **settings: Any) -> None:
            super().__init__(model, **settings)
            self.noted = True

    mine = Mine.from_recipe(load("demo"), tmp_path / "run", device="cpu")
    assert mine.noted
    assert mine.recipe.name == "demo"


def test_a_recipe_goes_with_neither_a_loss_nor_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out loss, epochs, or change the recipe"):
        GreedyTrainer(None, run_dir=tmp_path, recipe=load("demo"), loss=Pred(), epochs=3)


def test_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"setting.*epoch.*epochs"):
        GreedyTrainer(network(), run_dir=tmp_path, epoch=3)
