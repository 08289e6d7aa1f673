"""Train a network of your own: any nn.Sequential, cut before each convolution or linear layer.

Prints the stages it was cut into and how well each does as an early exit, by its own local
classifier.

    python examples/own_network.py --run runs/own-network
"""

from pathlib import Path

import click
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import greedy
from greedy.results.exits import evaluate_exits


def network() -> nn.Sequential:
    """Returns a network with strides in place of pooling, GELU, and two layers that train as one
    stage."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Sequential(  # a Sequential inside is one stage
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.GELU(),
        ),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(288, 10),
    )


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default="runs/own-network")
@click.option("--epochs", default=5, show_default=True, help="Of each stage.")
def main(run: Path, epochs: int) -> None:
    torch.manual_seed(0)  # the first weights are the network's own
    model, loss = network(), greedy.losses.PredSim(pool_target=1024)
    trainer = greedy.GreedyTrainer(
        model, run_dir=run, loss=loss, epochs=epochs, batch_size=64, learning_rate=5e-3
    )
    trainer.fit(*map_style("fashion-mnist-sample"))
    for exit in evaluate_exits(trainer.run, loss, model, "test", trainer.device).exits:
        print(
            f"stage {exit.stage}, {exit.name:14s} test error {exit.error_percent:4.1f} %, "
            f"{exit.parameters:7,} parameters, {exit.operations:10,} multiply-adds"
        )


def map_style(name: str) -> list[TensorDataset]:
    """Returns a data set as PyTorch has them, given its name."""
    data = greedy.data.load_dataset(name)
    arrays = (split.read(np.arange(len(split))) for split in (data.train, data.test))
    return [TensorDataset(*map(torch.from_numpy, each)) for each in arrays]


if __name__ == "__main__":
    main()
