"""Optimiser states that are divided over processes."""

import pytest
from ranked import together
from sharded_states import (
    KINDS,
    compare_with_undivided,
    count_numbers,
    new_optimizer,
    new_parameters,
)

from greedy.memory.fake import FakeRanks


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_states_are_those_of_an_undivided_one(kind: str) -> None:
    together(3, compare_with_undivided, kind)


def test_each_process_has_its_part_of_what_is_large() -> None:
    together(2, count_numbers)


def test_none_of_many_processes_is_left_without_a_part() -> None:
    for rank in range(100):
        optimizer = new_optimizer("adam", new_parameters(), FakeRanks(rank, 100))
        assert all(part.numel() for group in optimizer.param_groups for part in group["params"])
