"""Several processes, each with a share of the batch, get the gradients of the whole batch."""

import pytest
from ranked import together
from shared_steps import (
    SPLITS,
    compare_stages,
    compare_strategies,
    compare_unusual,
    watch_gradients,
)


@pytest.mark.parametrize("split", SPLITS)
def test_every_mode_has_the_gradients_of_the_whole_batch(split: str) -> None:
    together(3 if split in ("three", "one-without") else 2, compare_stages, split)


@pytest.mark.parametrize("split", ["uneven", "mixed", "three"])
def test_every_strategy_takes_the_step_of_the_whole_batch(split: str) -> None:
    together(3 if split == "three" else 2, compare_strategies, split)


def test_gradients_travel_while_others_are_computed() -> None:
    together(2, watch_gradients)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_gradients_that_autograd_still_uses_are_those_of_the_whole_batch(rows: int) -> None:
    together(2, compare_unusual, rows)
