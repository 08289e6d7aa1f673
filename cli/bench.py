"""``greedy bench``: how fast this machine trains."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.cli import fields, options
from greedy.cli.failures import terminable
from greedy.cli.tables import count, print_json, print_table, say

if TYPE_CHECKING:
    from greedy.forecasts.bench import StageSpeed
    from greedy.forecasts.calibration import Calibration
    from greedy.recipes import Recipe

DEFAULT = "demo"


@click.command(
    cls=fields.Command, epilog="Example: greedy bench --recipe cifar10/vgg8b-predsim --device cuda"
)
@options.recipe
@fields.settings
@options.device
@options.model
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="How long to train each stage: two steps at least.",
)
@options.as_json
@options.debug
def bench(
    recipe: str | None,
    settings: tuple[str, ...],
    device: str,
    model: str | None,
    seconds: float,
    as_json: bool,
    **field_values: str | None,
) -> None:
    """Measure how fast this machine trains, so that `plan` can tell times.

    Every stage of the recipe, by default of the demo, trains for some seconds on random data from a
    temporary store. Operations are those of the plain step, never recomputation; the peak is that
    of bfloat16 matrix products on the same threads; waiting is the share of a step between asking
    for a batch and having it. `plan` knows times best for a recipe that was itself measured.
    """
    from greedy.base.devices import device_name  # noqa: PLC0415
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.forecasts.bench import Bench, peak_flops  # noqa: PLC0415
    from greedy.forecasts.calibration import Calibration  # noqa: PLC0415
    from greedy.recipes import load  # noqa: PLC0415

    overrides = fields.overrides(settings, field_values)
    wanted = load(recipe or DEFAULT, overrides)
    network = load_network(wanted.model, model)
    bench = Bench.of(wanted, device, network, fields.names_data(overrides))
    path = Calibration.path(bench.device.type)
    found: list[StageSpeed] = []
    with terminable(), _interruptible():
        _say(as_json, f"{wanted.name} on {device_name(bench.device)}: the peak")
        calibration = Calibration.begin(bench.device, peak_flops(bench.device))
        for number in range(1, len(bench.memory.stages) + 1):
            _say(as_json, f"stage {number}/{len(bench.memory.stages)} {bench.name(number)}")
            found.append(bench.measure(number, seconds))
            calibration = calibration.adding(found[-1].measured)
            calibration.write(path)
    if as_json:
        print_json(_document(wanted, calibration, found, path))
    else:
        _print(calibration, found, path)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, an interruption tells what is left of the measurements."""
    from greedy.base.errors import Interrupted  # noqa: PLC0415

    try:
        yield
    except KeyboardInterrupt as stopped:
        raise Interrupted(
            getattr(stopped, "signal", signal.SIGINT),
            "interrupted: `greedy plan` knows the stages measured so far, the same command "
            "measures all of them",
        ) from stopped


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        say(line)


def _document(
    recipe: "Recipe", calibration: "Calibration", found: Sequence["StageSpeed"], path: Path
) -> dict[str, object]:
    return {
        "recipe": recipe.name,
        "device": calibration.device,
        "threads": calibration.threads,
        "peak_gflops": calibration.peak_flops / 1e9,
        "stages": [
            {
                "stage": each.stage,
                "name": each.name,
                "precision": each.measured.work.precision,
                "mode": each.measured.work.mode,
                "images_per_second": each.measured.rows_per_second,
                "share_of_peak": each.measured.flops_per_second / calibration.peak_flops,
                "wait_share": each.wait_share,
            }
            for each in found
        ],
        "calibration": str(path),
    }


def _print(calibration: "Calibration", found: Sequence["StageSpeed"], path: Path) -> None:
    peak = calibration.peak_flops
    print_table(
        ("stage", "name", "precision", "mode", "images/s", "of peak", "waiting"),
        (
            (
                str(each.stage),
                each.name,
                each.measured.work.precision,
                each.measured.work.mode,
                _rate(each.measured.rows_per_second),
                f"{each.measured.flops_per_second / peak:.1%}",
                f"{each.wait_share:.1%}",
            )
            for each in found
        ),
        left=4,
    )
    threads = "1 thread" if calibration.threads == 1 else f"{calibration.threads} threads"
    say(f"{calibration.device}, {threads}: at best {count(int(peak))}flop/s")
    say(f"kept in {path}, from which `greedy plan` tells times")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
