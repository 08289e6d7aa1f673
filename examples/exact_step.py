"""Train a residual network end to end, with batches of 256 images of which 32 are in memory.

Batch norms and the loss see all 256 images. Adding up the gradients of eight micro-batches would
give other gradients, since each batch norm would then see 32 images.

    python examples/exact_step.py
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greedy

ROWS, MICRO_BATCH = 256, 32


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


def main() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = nn.Sequential(stem, Residual(8), head)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    samples = greedy.data.load_dataset("fashion-mnist-sample").train
    pixels, numbers = samples.read(np.arange(ROWS))
    images, labels = torch.from_numpy(pixels).float() / 255, torch.from_numpy(numbers).long()
    for step in range(5):
        optimizer.zero_grad()
        loss = greedy.exact.step(model, F.cross_entropy, images, labels, MICRO_BATCH)
        optimizer.step()
        print(f"step {step + 1}: loss {float(loss):.3f}")


if __name__ == "__main__":
    main()
