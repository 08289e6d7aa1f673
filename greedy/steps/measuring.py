"""Mean loss and errors of stages over batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from greedy.base.ranks import Ranks
from greedy.base.relay import Relay
from greedy.losses import Features
from greedy.steps.step import Learner
from greedy.stores.source import Batch


@dataclass
class Totals:
    """Sums over rows. They stay on the device, so that no step waits for them, and are float32,
    the widest type on MPS.

    Attributes:
        rows: number of rows.
        loss: sum of their losses.
        wrong: number of rows classified wrongly, ``None`` without a local classifier.
    """

    rows: int = 0
    loss: Tensor | float = 0.0
    wrong: Tensor | None = None

    def add(self, loss: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Adds a batch: its mean loss, its logits (B, classes) or ``None``, its labels (B,)."""
        self.rows += len(labels)
        self.loss = self.loss + loss.float() * len(labels)
        if logits is not None:
            wrong = (logits.argmax(dim=1) != labels).sum()
            self.wrong = wrong if self.wrong is None else self.wrong + wrong

    def over(self, ranks: Ranks) -> "Totals":
        """Returns the sums over the rows of all processes."""
        wrong = 0 if self.wrong is None else int(self.wrong)
        own = [self.rows, float(self.loss), wrong, self.wrong is not None]
        ranks.add(sums := torch.tensor(own, dtype=torch.float64))
        rows, loss, all_wrong, known = sums.tolist()
        return Totals(int(rows), loss, torch.tensor(int(all_wrong)) if known else None)

    @property
    def mean_loss(self) -> float:
        """The mean loss of a row."""
        return float(self.loss) / self.rows

    @property
    def error_percent(self) -> float | None:
        """The share of rows classified wrongly, or ``None`` without a local classifier."""
        return None if self.wrong is None else 100 * int(self.wrong) / self.rows


@torch.no_grad()
def measure(
    learners: Sequence[Learner], batches: Iterable[Batch], relay: Relay | None = None
) -> list[Totals]:
    """Computes losses and errors of consecutive stages in evaluation mode (running statistics, no
    dropout).

    Args:
        learners: the stages; each takes the output of the one before.
        batches: batches of the first stage's inputs.
        relay: takes the last stage's outputs, if other processes have later stages.

    Returns:
        The sums of each stage over all batches.
    """
    for learner in learners:
        learner.eval()
    totals = [Totals() for _ in learners]
    ends = relay is None or relay.is_last
    for batch in batches:
        stage_batch = batch
        for learner, total in zip(learners, totals, strict=True):
            onward = not (ends and learner is learners[-1])
            features, outputs = _pass(learner, stage_batch, onward=onward)
            loss = learner.loss(features, learner.targets(batch))
            total.add(loss, learner.heads.logits(features), batch.labels)
            if outputs is not None:
                stage_batch = Batch(batch.labels, outputs.__getitem__)
        if relay is not None and outputs is not None:
            relay.send(outputs, training=False)
    return totals


def _pass(learner: Learner, batch: Batch, *, onward: bool) -> tuple[Features, Tensor | None]:
    """Computes a batch's features, a micro-batch at a time, and with ``onward`` the stage's output,
    else ``None``."""
    parts, outputs = [], []
    for rows in learner.slices(len(batch.labels)):
        h = learner.hidden(batch.inputs(rows))
        parts.append(learner.local(h))
        if onward:
            outputs.append(learner.stage.pool(h))
    whole: Any = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
    return Features(*whole), torch.cat(outputs) if onward else None
