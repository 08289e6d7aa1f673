"""The stages that each of several processes trains, and what stages share."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise

from greedy.base.errors import UserError
from greedy.base.torch_private import BATCH_NORMS
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
    if found := sharing([stages[part.start : part.stop] for part in parts]):
        raise UserError(
            f"stage {found[1].number} shares weights with one that another process would train: "
            f"leave out --parallel stages"
        )
    return parts


def sharing(groups: Iterable[Iterable[Stage]]) -> tuple[Stage, Stage] | None:
    """Returns the first two stages, of different groups, that share weights or the running
    statistics of a batch norm, if there are any. Constants may be shared."""
    owners: dict[int, tuple[int, Stage]] = {}
    for number, group in enumerate(groups):
        for stage in group:
            norms = (module for module in stage.modules() if isinstance(module, BATCH_NORMS))
            weights = (p for p in stage.parameters() if p.requires_grad)
            for tensor in (*weights, *(buffer for norm in norms for buffer in norm.buffers())):
                owner, first = owners.setdefault(id(tensor), (number, stage))
                if owner != number:
                    return first, stage
    return None
