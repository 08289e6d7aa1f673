"""The memory that cuBLAS and cuDNN take from CUDA's allocator in addition to their tensors.

Convolutions are those of VGG11B(3x) on CIFAR-10 shapes: the forward pass, the gradient of the
weight and that of the input are measured separately, in micro-batches of several sizes. A slice of
a weight's gradient, which `greedy.models.lean` makes, is included. The memory plan adds these bytes
(`greedy/memory/choice.py`).
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.devices import pick_device, set_determinism
from greedy.base.precision import HALVES
from greedy.models.lean import add_weight_gradient, forward, input_gradient

MIB = 2**20
# Input and output channels, side
CONVOLUTIONS = ((3, 384, 32), (384, 384, 32), (384, 768, 32), (768, 768, 16), (1536, 1536, 8))


def extra(compute: Callable[[], object]) -> int:
    """Measures the most bytes in use during a computation, without those in use before and those of
    its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = compute()
    torch.cuda.synchronize()
    made = sum(t.numel() * t.element_size() for t in [result] if isinstance(t, Tensor))
    return max(0, torch.cuda.max_memory_allocated() - before - made)


def cublas() -> dict[str, int]:
    """Measures the bytes that stay in use after products in the thread of the forward pass, after
    products with a bias, and after gradients in the thread of the backward pass."""
    sizes = {}
    for precision in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn((512, 512), device="cuda", dtype=precision) for _ in range(2))
        bias = torch.zeros(512, device="cuda", dtype=precision)
        weight.requires_grad_()

        def remaining(compute: Callable[[], object]) -> int:
            before = torch.cuda.memory_allocated()
            compute()
            return torch.cuda.memory_allocated() - before

        name = str(precision).removeprefix("torch.")
        weight.grad = torch.zeros_like(weight)
        sizes[f"{name}, product"] = remaining(partial(torch.matmul, x, weight))
        sizes[f"{name}, linear"] = remaining(partial(F.linear, x, weight, bias))
        sizes[f"{name}, gradients"] = remaining((x @ weight).sum().backward)
    return sizes


@torch.no_grad()
def convolutions(rows: int, precision: str, *, channels_last: bool) -> Iterator[dict[str, Any]]:
    """Yields the extra MiB of each convolution."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = HALVES.get(precision, torch.float32)
    for inputs, outputs, side in CONVOLUTIONS:

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda").to(dtype, memory_format=layout)

        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, device="cuda", dtype=dtype)
        layer.weight.data = random(*layer.weight.shape)
        x, g = random(rows, inputs, side, side), random(rows, outputs, side, side)
        total = torch.zeros_like(layer.weight)
        passes: dict[str, Callable[[], object]] = {
            "forward": partial(forward, layer, x),
            "weight": partial(add_weight_gradient, layer, x, g, total),
            "input": partial(input_gradient, layer, x, g),
        }
        sizes = {f"{name}_mib": round(extra(run) / MIB, 1) for name, run in passes.items()}
        what = f"{inputs} to {outputs}, side {side}"
        yield (
            {"convolution": what, "rows": rows, "precision": precision}
            | sizes
            | {"channels_last": channels_last}
        )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--rows", default="1,8,32,128", show_default=True, help="Rows in a micro-batch.")
def main(as_json: bool, rows: str) -> None:
    """Measure the workspaces; needs a GPU."""
    device = pick_device("cuda")
    set_determinism(device, False)
    products = {name: round(size / MIB, 3) for name, size in cublas().items()}
    measured = [
        row
        for precision in ("float32", "bfloat16")
        for channels_last in (False, True)
        for count in map(int, rows.split(","))
        for row in convolutions(count, precision, channels_last=channels_last)
    ]
    if as_json:
        name = torch.cuda.get_device_name(device)
        click.echo(json.dumps({"device": name, "cublas_mib": products, "convolutions": measured}))
        return
    for name, size in products.items():
        click.echo(f"cuBLAS, {name}: {size:.2f} MiB")
    for row in measured:
        click.echo(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
