"""How fast a CPU computes frozen stages, as stores are written and views are drawn.

The frozen stages of VGG8B, up to each of some of them, compute random images: with channels-last
maps, as many rows at a time as a store is written with; as before that, maps in torch's usual
layout, and as many rows as have 32 MiB of activations; and with each of the two changes alone. They
take turns in one process; the fastest of `--rounds` counts.

- `rows`: at a time.
- `ratio`: images a second over those of before; `layout_alone` and `rows_alone` likewise.
- `largest_difference`: of the outputs, over their largest value.
"""

import itertools
import json
import time
from typing import Any

import click
import torch
from torch import Tensor

from greedy.models import Stage, StageShapes, cut, shapes, vgg8b
from greedy.stores.channels_last import laid_out, takes_channels_last
from greedy.stores.source import Replayed
from greedy.stores.writing import write_batch

IMAGE = (3, 32, 32)


def timed(frozen: Replayed, images: Tensor) -> tuple[float, Tensor]:
    """Computes all images. Returns the seconds that it took, and the outputs."""
    start = time.perf_counter()
    outputs = frozen.outputs(images)
    return time.perf_counter() - start, outputs


def measure(
    stages: list[Stage], sizes: list[StageShapes], images: Tensor, precision: str, rounds: int
) -> dict[str, Any]:
    """Returns the entry of some frozen stages in the document to print."""
    numbers = [min(write_batch(shape, kind) for shape in sizes) for kind in ("cpu", "cuda")]
    layouts = [[takes_channels_last(stage, "cpu") for stage in stages], [False] * len(stages)]
    ways = [
        Replayed(laid_out(stages, layout), rows, precision)
        for layout, rows in itertools.product(layouts, numbers)
    ]
    results = [[timed(way, images) for way in ways] for _ in range(rounds)]
    now, layout_alone, rows_alone, before = (
        min(seconds for seconds, _ in column) for column in zip(*results, strict=True)
    )
    outputs, *_, as_before = (outputs for _, outputs in results[0])
    return {
        "stage": len(stages),
        "rows": numbers[0],
        "images_per_second": round(len(images) / now),
        "ratio": round(before / now, 2),
        "layout_alone": round(before / layout_alone, 2),
        "rows_alone": round(before / rows_alone, 2),
        "largest_difference": float((outputs - as_before).abs().max() / as_before.abs().max()),
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--multiplier", default=0.25, show_default=True, help="Of the network's width.")
@click.option("--precision", default="bfloat16", show_default=True)
@click.option("--stages", default="2,3,4,6", show_default=True, help="Last of the frozen stages.")
@click.option("--images", default=1024, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    as_json: bool, multiplier: float, precision: str, stages: str, images: int, rounds: int
) -> None:
    """Print how many times as fast frozen stages are as before."""
    torch.manual_seed(0)
    network = cut(vgg8b(*IMAGE[:2], 10, feature_multiplier=multiplier))
    network = [stage.eval().requires_grad_(False) for stage in network]
    sizes, values = shapes(network, IMAGE), torch.randn(images, *IMAGE)
    found = [
        measure(network[:last], sizes[:last], values, precision, rounds)
        for last in map(int, stages.split(","))
    ]
    if as_json:
        click.echo(json.dumps({"stages": found}))
        return
    for entry in found:
        click.echo(
            f"stages 1 to {entry['stage']}: {entry['images_per_second']:,} images/s, "
            f"{entry['ratio']} times as before (the layout alone {entry['layout_alone']}, "
            f"{entry['rows']} rows at a time alone {entry['rows_alone']})"
        )


if __name__ == "__main__":
    main()
