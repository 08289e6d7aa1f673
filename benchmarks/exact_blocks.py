"""Measures the exact step of residual blocks against the plain step, everything computed again."""

import argparse
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import greedy
from greedy.memory.counting import Counter

SIDE, CLASSES = 16, 10


def shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


BLOCKS = {
    "BasicBlock": lambda: (64, BasicBlock(64, 64)),
    "BasicBlock, downsampling": lambda: (64, BasicBlock(64, 128, 2, shortcut(64, 128, 2))),
    "Bottleneck": lambda: (256, Bottleneck(256, 64)),
    "Bottleneck, downsampling": lambda: (256, Bottleneck(256, 128, 2, shortcut(256, 512, 2))),
}


def plain(module: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(module(x), y).backward()


def measured(run: Callable[[], None], module: nn.Module, repeats: int) -> tuple[float, int]:
    """Returns the least seconds of a step, and the bytes that it takes at most."""
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    with Counter() as counter:
        counter.add(module.parameters())
        run()
    return min(seconds), counter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, make in BLOCKS.items():
        torch.manual_seed(0)
        channels, block = make()
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(CLASSES))
        module = nn.Sequential(block, head)
        x = torch.randn(options.batch_size, channels, SIDE, SIDE)
        y = torch.randint(CLASSES, (options.batch_size,))
        module(x[:2])

        def exact(module: nn.Module = module, x: Tensor = x, y: Tensor = y) -> None:
            greedy.exact.step(module, F.cross_entropy, x, y, options.micro_batch)

        def whole(module: nn.Module = module, x: Tensor = x, y: Tensor = y) -> None:
            plain(module, x, y)

        whole_seconds, whole_bytes = measured(whole, module, options.repeats)
        exact_seconds, exact_bytes = measured(exact, module, options.repeats)
        rows.append(
            {
                "block": name,
                "plain_seconds": whole_seconds,
                "exact_seconds": exact_seconds,
                "ratio": exact_seconds / whole_seconds,
                "plain_bytes": whole_bytes,
                "exact_bytes": exact_bytes,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['block']:26} {row['ratio']:5.2f} times the plain step's time, "
            f"{row['exact_bytes'] / 2**20:6.1f} instead of {row['plain_bytes'] / 2**20:6.1f} MiB"
        )


if __name__ == "__main__":
    main()
