"""Milestones: the epochs after which the learning rate drops, scaled with the number of epochs."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Final, TypeAlias

Epochs: TypeAlias = int | list[int]
Milestones: TypeAlias = list[int] | list[list[int]]

PUBLISHED: Final = {
    400: [200, 300, 350, 375],
    200: [100, 150, 175, 188],
    100: [50, 75, 89, 94],
}


def default(epochs: int) -> list[int]:
    """Returns the published commands' milestones for 400, 200 and 100 epochs, else 1/2, 3/4, 7/8
    and 15/16 of the epochs, rounded."""
    return list(PUBLISHED.get(epochs) or _moved((8, 12, 14, 15), 16, epochs))


def explicit(milestones: Milestones | None, epochs: Epochs) -> Milestones:
    """Returns the milestones in full: the default for None, one list a stage where ``epochs`` has
    one entry a stage. Raises ``ValueError`` when they do not fit the epochs."""
    if milestones is None:
        return [default(e) for e in epochs] if isinstance(epochs, list) else default(epochs)
    stages = _stages(milestones, epochs)
    lists = _lists(milestones, stages or 1)
    for drops, end in zip(lists, _entries(epochs, len(lists)), strict=True):
        if any(a >= b for a, b in pairwise([0, *drops, end])):
            raise ValueError(f"rise without repeats, from at least 1 to less than {end}")
    return lists if stages else milestones


def rescale(milestones: Milestones, old: Epochs, new: Epochs) -> Milestones:
    """Returns milestones m written for ``old`` epochs as floor(m · new / old + 0.5), without
    duplicates and those that have no effect. Raises ``ValueError`` when the numbers of stages
    disagree."""
    stages = _stages(milestones, old, new)
    lists = _lists(milestones, stages or 1)
    ends = zip(_entries(old, len(lists)), _entries(new, len(lists)), strict=True)
    moved = [_moved(drops, *end) for drops, end in zip(lists, ends, strict=True)]
    return moved if stages else moved[0]


def _moved(milestones: Iterable[int], old: int, new: int) -> list[int]:
    # floor(m · new / old + 0.5) in integers, exact where floats round
    moved = {(2 * m * new + old) // (2 * old) for m in milestones}
    return sorted(m for m in moved if 0 < m < new)


def _stages(milestones: Milestones, *epochs: Epochs) -> int:
    """Returns the number of stages that all lists with one entry a stage have, 0 without such a
    list."""
    lengths = {len(e) for e in epochs if isinstance(e, list)}
    if any(isinstance(m, list) for m in milestones):
        lengths.add(len(milestones))
    if len(lengths) > 1:
        raise ValueError("have one list for each entry of training.epochs")
    return max(lengths, default=0)


def _lists(milestones: Milestones, stages: int) -> list[list[int]]:
    shared = [m for m in milestones if isinstance(m, int)]
    return [m for m in milestones if isinstance(m, list)] or [shared] * stages


def _entries(epochs: Epochs, stages: int) -> list[int]:
    return epochs if isinstance(epochs, list) else [epochs] * stages
