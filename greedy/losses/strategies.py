"""Which losses a strategy has."""

from greedy.losses.local import Glob, LocalLoss, Output, Sim


def losses_of(strategy: str, loss: LocalLoss, stages: int) -> list[LocalLoss]:
    """The loss of each stage of a network whose local loss is ``loss``, by the strategy's name."""
    hidden, output = {
        "greedy": (loss, Output(loss.output_scale)),
        "joint": (loss, Output(loss.output_scale)),
        "backprop": (Glob(), Output()),
        "glob+sim": (Sim(), Output()),
    }[strategy]
    return [hidden] * (stages - 1) + [output]
