"""The stages that each of several processes trains."""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise

from greedy.base.errors import UserError
from greedy.models.division import balanced
from greedy.models.stages import Stage


def parts_of_stages(
    stages: Sequence[Stage], operations: Callable[[int], int], processes: int
) -> list[range]:
    """Returns the positions of the consecutive stages that each process trains. The one with the
    most operations has as few as possible.

    Args:
        stages: the stages of the network, in order.
        operations: returns those of a step of the stage with a number.
        processes: their number.

    Raises:
        UserError: there are fewer stages than processes, or stages of two processes share weights.
    """
    if processes > len(stages):
        raise UserError(
            f"{processes} processes cannot each train some of {len(stages)} stages: start at most "
            f"{len(stages)}"
        )
    sizes = balanced([operations(stage.number) for stage in stages], processes)
    parts = [range(*edges) for edges in pairwise([0, *accumulate(sizes)])]
    owners: dict[int, int] = {}
    for process, part in enumerate(parts):
        for stage in stages[part.start : part.stop]:
            for tensor in chain(stage.parameters(), stage.buffers()):
                if owners.setdefault(id(tensor), process) != process:
                    raise UserError(
                        f"stage {stage.number} shares weights with one that another process would "
                        f"train: leave out --parallel stages"
                    )
    return parts
