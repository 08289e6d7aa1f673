"""The losses of each training strategy."""

from collections.abc import Sequence
from dataclasses import replace

from greedy.losses.auxiliary import later_stages
from greedy.losses.local import Glob, LocalLoss, Output, Pred, PredSim, Sim
from greedy.losses.prediction import PLAIN, CrossEntropy
from greedy.models import Shape
from greedy.recipes.auxiliary import downstream_layers


def stage_losses(
    strategy: str,
    loss: LocalLoss,
    hidden: Sequence[Shape],
    cross_entropy: CrossEntropy = PLAIN,
) -> list[LocalLoss]:
    """Returns the loss of each stage of a network trained by ``strategy`` with the local loss
    ``loss``.

    Args:
        hidden: the shape of a row of each stage's activation, the output layer's included.
        cross_entropy: that of the output layer, and of this package's prediction losses.
    """
    if isinstance(loss, Pred | PredSim) and loss.cross_entropy != cross_entropy:
        loss = replace(loss, cross_entropy=cross_entropy)
    local, scale = {
        "greedy": (loss, loss.output_scale),
        "joint": (loss, loss.output_scale),
        "backprop": (Glob(), 1.0),
        "glob+sim": (Sim(), 1.0),
    }[strategy]
    before_output = [_of_stage(local, number, hidden) for number in range(1, len(hidden))]
    return [*before_output, Output(scale, cross_entropy)]


def _of_stage(loss: LocalLoss, number: int, hidden: Sequence[Shape]) -> LocalLoss:
    """Returns the loss of a stage, whose prediction head may stand for later stages."""
    if not isinstance(loss, Pred | PredSim) or loss.auxiliary == "none":
        return loss
    numbers = later_stages(number, len(hidden) - 1, downstream_layers(loss.auxiliary))
    return replace(loss, later=tuple(hidden[later - 1] for later in numbers))
