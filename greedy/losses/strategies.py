"""The losses of each training strategy."""

from dataclasses import replace

from greedy.losses.local import Glob, LocalLoss, Output, Pred, PredSim, Sim
from greedy.losses.prediction import PLAIN, CrossEntropy


def stage_losses(
    strategy: str, loss: LocalLoss, stages: int, cross_entropy: CrossEntropy = PLAIN
) -> list[LocalLoss]:
    """Returns the loss of each stage of a network trained by ``strategy`` with the local loss
    ``loss``. ``cross_entropy`` is that of the output layer, and of this package's prediction
    losses."""
    if isinstance(loss, Pred | PredSim) and loss.cross_entropy != cross_entropy:
        loss = replace(loss, cross_entropy=cross_entropy)
    hidden, scale = {
        "greedy": (loss, loss.output_scale),
        "joint": (loss, loss.output_scale),
        "backprop": (Glob(), 1.0),
        "glob+sim": (Sim(), 1.0),
    }[strategy]
    output = Output(scale, cross_entropy)
    return [hidden] * (stages - 1) + [output]
