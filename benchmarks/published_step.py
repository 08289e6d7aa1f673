"""The published training step, written plainly, for comparison with the steps of this project.

It trains all layers of a network in one pass, each by its predsim loss and its Adam, before the
next layer gets its output: in float32, NCHW, eager. It uses nothing of this project, so that no
change in the project makes it faster or slower.

As a program it prints the images a second of VGG8B on CIFAR-10 shapes.
"""

import json
import math
import statistics
import time
from itertools import pairwise

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NETWORKS = {
    "vgg8b": (128, 256, "M", 256, 512, "M", 512, "M", 512, "M"),
    "vgg11b": (128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M"),
}
BETA, POOL_TARGET, DROPOUT, RATE = 0.99, 2048, 0.2, 5e-4


def similarity(x: Tensor) -> Tensor:
    """Computes the correlation (B, B) of every pair of rows of (B, F), or of the standard
    deviations of the feature maps of (B, C, H, W)."""
    if x.dim() == 4:
        x = x.flatten(2).std(dim=2) if x.shape[1] > 3 and x.shape[2] > 1 else x.flatten(1)
    centred = x - x.mean(dim=1, keepdim=True)
    unit = centred / (centred.norm(dim=1, keepdim=True) + 1e-8)
    return (unit @ unit.T).clamp(-1, 1)


class Layer(nn.Module):
    """A hidden layer with its local heads and its optimiser; ``side`` is the height of its input, 0
    for a linear layer."""

    def __init__(self, inputs: int, outputs: int, side: int, classes: int, *, pool: bool) -> None:
        super().__init__()
        self.side, self.pool = side, pool
        width = outputs
        if side:
            self.encoder: nn.Module = nn.Conv2d(inputs, outputs, 3, padding=1)
            self.norm: nn.Module = nn.BatchNorm2d(outputs)
            self.dropout: nn.Module = nn.Dropout2d(DROPOUT)
            self.similarity: nn.Module = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            kernel = [1, 1]
            while outputs * math.ceil(side / kernel[0]) * math.ceil(side / kernel[1]) > POOL_TARGET:
                kernel[kernel[0] > kernel[1]] *= 2
            sides = [math.ceil(side / k) for k in kernel]
            padding = [k * (n - side // k) // 2 for k, n in zip(kernel, sides, strict=True)]
            self.average = nn.AvgPool2d((kernel[0], kernel[1]), padding=(padding[0], padding[1]))
            width = outputs * sides[0] * sides[1]
        else:
            self.encoder, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)
            self.dropout = nn.Dropout(DROPOUT)
            self.similarity = nn.Linear(outputs, outputs, bias=False)
        self.classifier = nn.Linear(width, classes)
        nn.init.zeros_(self.classifier.weight)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=RATE)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the input of the next layer."""
        out = self.dropout(F.leaky_relu(self.norm(self.encoder(x)), 0.01))
        return F.max_pool2d(out, 2) if self.pool else out

    def step(self, x: Tensor, labels: Tensor, onehot: Tensor) -> Tensor:
        """Trains on the output of the layer before. Returns the input of the next one."""
        h = F.leaky_relu(self.norm(self.encoder(x)), 0.01)
        p = self.classifier((self.average(h) if self.side else h).flatten(1))
        l_sim = F.mse_loss(similarity(self.similarity(h)), similarity(onehot))
        loss = (1 - BETA) * F.cross_entropy(p, labels) + BETA * l_sim
        out = self.dropout(h)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        out = out.detach()
        return F.max_pool2d(out, 2) if self.pool else out


class Output(nn.Module):
    """The last layer, trained by cross-entropy."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(inputs, classes)
        nn.init.zeros_(self.classifier.weight)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=RATE)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        logits: Tensor = self.classifier(x)
        return logits

    def step(self, x: Tensor, labels: Tensor, onehot: Tensor) -> Tensor:
        """Trains on the output of the layer before. Returns the logits."""
        p = self.classifier(x)
        loss = (1 - BETA) * F.cross_entropy(p, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return p.detach()


class Published:
    """A network that is trained as published, on torch's default device."""

    def __init__(
        self, multiplier: float, network: str = "vgg8b", side: int = 32, classes: int = 10
    ) -> None:
        self.classes = classes
        self.layers: list[Layer | Output] = []
        channels = 3
        plan = [*NETWORKS[network], ""]
        for entry, following in pairwise(plan):
            if isinstance(entry, int):
                outputs = int(entry * multiplier)
                pool = following == "M"
                self.layers.append(Layer(channels, outputs, side, classes, pool=pool))
                channels = outputs
                side //= 1 + pool
        self.layers.append(Layer(channels * side**2, 1024, 0, classes, pool=False))
        self.layers.append(Output(1024, classes))

    def step(self, images: Tensor, labels: Tensor) -> list[float]:
        """Trains every layer on a batch. Returns the seconds that each layer took."""
        onehot = F.one_hot(labels, self.classes).float()
        x, seconds = images, []
        for layer in self.layers:
            start = time.perf_counter()
            x = x if isinstance(layer, Layer) and layer.side else x.flatten(1)
            x = layer.step(x, labels, onehot)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds


class EndToEnd(Published):
    """A network of the same layers without local heads, trained by back-propagation with one
    optimiser."""

    def __init__(self, multiplier: float, network: str = "vgg8b") -> None:
        super().__init__(multiplier, network)
        parameters: list[nn.Parameter] = []
        for layer in self.layers:
            if isinstance(layer, Layer):
                parameters += [*layer.encoder.parameters(), *layer.norm.parameters()]
                del layer.similarity, layer.classifier
            else:
                parameters += layer.parameters()
            del layer.optimizer
        self.optimizer = torch.optim.Adam(parameters, lr=RATE)

    def whole_step(self, images: Tensor, labels: Tensor) -> float:
        """Trains on a batch. Returns the seconds that it took."""
        start = time.perf_counter()
        x = images
        for layer in self.layers:
            x = layer.forward(x if isinstance(layer, Layer) and layer.side else x.flatten(1))
        self.optimizer.zero_grad()
        F.cross_entropy(x, labels).backward()
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def batch(rows: int, side: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Returns random images and labels of CIFAR-10's shape, on torch's default device."""
    return torch.randn(rows, 3, side, side), torch.randint(classes, (rows,))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--rows", default=128, show_default=True, help="Rows in a batch.")
@click.option("--steps", default=3, show_default=True, help="Steps to time, after one more.")
@click.option("--multipliers", default="0.25,0.5,1", show_default=True, help="Factors on channels.")
def main(as_json: bool, rows: int, steps: int, multipliers: str) -> None:
    """Time the published step of VGG8B."""
    rates = {}
    for multiplier in multipliers.split(","):
        network = Published(float(multiplier))
        times = [sum(network.step(*batch(rows))) for _ in range(steps + 1)][1:]
        rates[multiplier] = round(rows / statistics.median(times), 2)
    if as_json:
        click.echo(json.dumps({"images_per_second": rates, "threads": torch.get_num_threads()}))
    else:
        for multiplier, rate in rates.items():
            click.echo(f"VGG8B({multiplier}x): {rate:,.1f} images/s")


if __name__ == "__main__":
    main()
