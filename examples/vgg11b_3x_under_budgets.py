"""Plan VGG11B(3x), 91 million parameters, under several budgets of GPU memory.

Nothing is trained, and neither data nor a GPU are needed: memory is counted on tensors without
contents. Fewer bytes mean smaller micro-batches and more passes, of the same exact gradients.

    python examples/vgg11b_3x_under_budgets.py 4GiB 2GiB 1GiB 768MiB 512MiB
"""

from collections import Counter
from pathlib import Path

import click

from greedy import RunDirectory, UserError
from greedy.base.sizes import format_size
from greedy.forecasts.forecast import data_facts, forecast
from greedy.forecasts.machine import machine
from greedy.recipes import load

RECIPE = "cifar10/vgg11b-3x-predsim"
LINE = "{:>8}  {:>10}  {:>12}  {}"


@click.command()
@click.argument("budgets", nargs=-1)
def main(budgets: tuple[str, ...]) -> None:
    print(f"{RECIPE}, a step on a GPU in float32:")
    print(LINE.format("budget", "peak", "micro-batch", "stages in each memory mode"))
    for budget in budgets or ("4GiB", "2GiB", "1GiB", "768MiB", "512MiB"):
        recipe = load(
            RECIPE,
            [f"memory.budget={budget}", "training.precision=float32", "store.disk_budget=1TB"],
        )
        run = RunDirectory.create(Path("runs/planned"), recipe)  # nothing is written
        try:
            found = forecast(run, data_facts(run), machine(recipe, "cuda"))
        except UserError as error:
            print(f"{budget:>8}  does not fit: {error}")
            continue
        rows = min(each.micro_batch for each in found.stages)
        modes = Counter(each.mode for each in found.stages)
        peak = format_size(found.peak_memory_bytes)
        listed = ", ".join(f"{mode} {count}" for mode, count in modes.items())
        print(LINE.format(budget, peak, f"from {rows}", listed))
    print(f"all at once by back-propagation: {format_size(found.baselines['backprop'])}")


if __name__ == "__main__":
    main()
