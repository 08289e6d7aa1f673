"""Train with a local loss of your own: the supervised contrastive loss.

It draws samples of a class together and others apart (Khosla et al., "Supervised Contrastive
Learning", 2020, equation 2), and trains a local classifier beside it, for early exits. Compared
with the paper's loss on the same small network.

    python examples/own_loss.py --run runs/own-loss
"""

from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import greedy
from greedy.losses import Features, LocalHeads, PredictionHead, SimilarityHead, prediction_loss


@dataclass(frozen=True)
class Contrastive:
    """A local loss is these three: a factor on the output layer's, the heads, and the loss."""

    temperature: float = 0.2
    output_scale: float = 1.0

    def heads(self, shape: tuple[int, ...], num_classes: int) -> LocalHeads:
        """Makes the heads of a stage whose activation h has this shape a row."""
        return LocalHeads(SimilarityHead(shape), PredictionHead(shape, num_classes, 1024))

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        """Computes the loss of features z (B, F), logits p (B, classes), one-hot labels y."""
        z = F.normalize(features.z, dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        near = (z @ z.T / self.temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
        alike = (y @ y.T).bool() & ~itself
        # A sample that is alone of its class in the batch has none to be near to.
        own = near.masked_fill(~alike, 0).sum(dim=1) / alike.sum(dim=1).clamp(min=1)
        return prediction_loss(features.p, y) - own.mean()


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default="runs/own-loss")
@click.option("--epochs", default=5, show_default=True, help="Of each stage.")
def main(run: Path, epochs: int) -> None:
    data = greedy.data.load_dataset("fashion-mnist-sample")
    for name, loss in (
        ("contrastive", Contrastive()),
        ("predsim", greedy.losses.PredSim(pool_target=1024)),
    ):
        torch.manual_seed(0)
        model = greedy.models.mlp(in_channels=1, image_size=28, hidden_layers=2, hidden_width=256)
        trainer = greedy.GreedyTrainer(
            model, run_dir=run / name, loss=loss, epochs=epochs, batch_size=64, learning_rate=1e-3
        )
        trainer.prepare(data)
        errors = [each.metrics.test_error_percent for each in trainer.train()]
        print(f"{name:12s} test error of each stage: {', '.join(f'{e:.1f}' for e in errors)} %")


if __name__ == "__main__":
    main()
