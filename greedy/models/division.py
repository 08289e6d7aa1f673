"""Dividing a network's layers among a number of stages, or stages that begin at named modules."""

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import accumulate, pairwise

from torch import nn

from greedy.base.errors import UserError
from greedy.models.shapes import shapes
from greedy.models.stages import Shape, cut, layers_of


def division(network: nn.Sequential, stages: int | Sequence[str], image: Shape) -> list[int]:
    """Returns the number of layers of each stage but the output layer, which is one, for ``cut``.

    Args:
        network: the network.
        stages: how many, with the output layer, of about as many operations each; or the names of
            the modules at which stages begin, as ``named_modules`` has them.
        image: the shape (C, H, W) of an image.

    Raises:
        UserError: the network has fewer layers, or no stage can begin at a name.
    """
    _, layers = layers_of(network)
    paths = [layer.path for layer in layers]
    if not isinstance(stages, int):
        begins = sorted({0, len(paths) - 1, *(_begin(name, network, paths) for name in stages)})
        return [end - begin for begin, end in pairwise(begins)]
    if not 2 <= stages <= len(paths):
        raise UserError(
            f"model.stages is {stages} and the network has {len(paths)} layers and blocks, the "
            f"output layer among them: give 2 to {len(paths)}"
        )
    operations = [shape.operations for shape in shapes(cut(network), image)]
    return balanced(operations[:-1], stages - 1)


def balanced(operations: Sequence[int], groups: int) -> list[int]:
    """Returns the sizes of ``groups`` groups of consecutive layers, of which the largest has as few
    operations as possible."""
    total = [0, *accumulate(operations)]
    # For each number of first layers: the most operations of a group, and the groups' ends.
    best = [(sum_, [end]) for end, sum_ in enumerate(total)]
    for count in range(2, groups + 1):
        best = [
            min(
                (
                    (max(best[begin][0], total[end] - total[begin]), [*best[begin][1], end])
                    for begin in range(count - 1, end)
                ),
                default=(total[-1] + 1, []),
            )
            for end in range(len(total))
        ]
    return [end - begin for begin, end in pairwise([0, *best[-1][1]])]


def _begin(name: str, network: nn.Sequential, paths: Sequence[str]) -> int:
    """Returns the layer that is the module ``name`` or the first in it."""
    for index, path in enumerate(paths):
        if path == name or path.startswith(f"{name}."):
            return index
    if block := next((path for path in paths if name.startswith(f"{path}.")), None):
        raise UserError(
            f"no stage can begin at {name}, which is in {block}, and that stays whole: begin it at "
            f"{block}"
        )
    near = get_close_matches(name, paths, n=3) or [*paths[:3], "…"]
    raise UserError(
        f"no stage can begin at {name}, which is no layer or block of the network: choose among "
        f"{', '.join(near)}"
    )
