"""The losses of each training strategy."""

from greedy.losses.local import Glob, LocalLoss, Output, Sim


def stage_losses(strategy: str, loss: LocalLoss, stages: int) -> list[LocalLoss]:
    """Returns the loss of each stage of a network trained by ``strategy`` with the local loss
    ``loss``."""
    hidden, output = {
        "greedy": (loss, Output(loss.output_scale)),
        "joint": (loss, Output(loss.output_scale)),
        "backprop": (Glob(), Output()),
        "glob+sim": (Sim(), Output()),
    }[strategy]
    return [hidden] * (stages - 1) + [output]
