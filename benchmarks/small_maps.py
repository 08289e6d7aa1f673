"""3x3 convolutions of small maps: oneDNN's against matrix products over unfolded maps.

Times the forward pass of a bfloat16 convolution that keeps the number of channels, with both of
its gradients, as torch computes it and as `greedy.steps.unfolded` does, in interleaved rounds of
one process. `ratios` are torch's time over that of the products, for each number of channels and
side of the maps: above 1 the products are faster.
"""

import json
import statistics
import time
from contextlib import nullcontext

import click
import torch
from torch import Tensor, nn

from greedy.base.devices import device_name
from greedy.base.precision import autocast
from greedy.base.torch_private import has_amx
from greedy.steps import unfolded
from greedy.steps.unfolded import Unfolded

SIDES = (1, 2, 3, 4, 5, 6, 8)
CHANNELS = (64, 128, 256, 512)


def seconds(layer: nn.Module, x: Tensor, *, products: bool) -> float:
    """Returns the time of a forward and a backward pass."""
    start = time.perf_counter()
    with autocast("cpu", "bfloat16"), Unfolded() if products else nullcontext():
        out = layer(x)
    out.backward(torch.ones_like(out))
    return time.perf_counter() - start


def ratio(channels: int, side: int, rows: int, rounds: int) -> float:
    """Returns torch's time over that of matrix products, both medians of the rounds."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    x = torch.randn(rows, channels, side, side, requires_grad=True)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + 1):  # the first is not counted
        for products, found in times.items():
            found.append(seconds(layer, x, products=products))
    medians = {products: statistics.median(found[1:]) for products, found in times.items()}
    return medians[False] / medians[True]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--rows", default=128, show_default=True, help="Maps in a batch.")
@click.option("--rounds", default=7, show_default=True)
def main(as_json: bool, rows: int, rounds: int) -> None:
    """Compare convolutions with matrix products."""
    # Also where a run would not unfold.
    unfolded.SIDE, unfolded.CHANNELS = max(SIDES), min(CHANNELS)
    ratios = {
        channels: {side: ratio(channels, side, rows, rounds) for side in SIDES}
        for channels in CHANNELS
    }
    document = {
        "device": device_name(torch.device("cpu")),
        "amx": has_amx(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "ratios": {
            str(channels): {str(side): round(value, 2) for side, value in found.items()}
            for channels, found in ratios.items()
        },
    }
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo(f"channels  {'  '.join(f'{side}x{side}' for side in SIDES)}")
    for channels, found in ratios.items():
        click.echo(f"{channels:>8}  {'  '.join(f'{value:3.1f}' for value in found.values())}")


if __name__ == "__main__":
    main()
