"""``greedy bench``: measures how fast this machine trains."""

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
    from greedy.recipes import Recipe
    from greedy.training.calibration import Calibration

DEFAULT = "demo"


@click.command(
    cls=fields.Command, epilog="Example: greedy bench --recipe cifar10/vgg8b-predsim --device cuda"
)
@options.recipe
@fields.settings
@options.device
@options.network
@options.images
@options.classes
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="How long to train each stage; at least two steps are made.",
)
@options.as_json
@options.debug
def bench(
    recipe_name: str | None,
    settings: tuple[str, ...],
    device: str,
    model: str | None,
    images: tuple[int, int] | None,
    classes: int | None,
    seconds: float,
    as_json: bool,
    **field_values: str | None,
) -> None:
    """Measure how fast this machine trains, so that `plan` can forecast times.

    Every stage of the recipe, by default of the demo, trains for some seconds on random data from a
    temporary store. Operations are those of the plain step, without recomputation; the peak is that
    of bfloat16 matrix products on the same threads; waiting is the share of a step that is spent
    waiting for its batch. The times of `plan` are best for a recipe that was itself measured.
    """
    from greedy.base.devices import device_name  # noqa: PLC0415
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.forecasts.bench import Bench, peak_flops  # noqa: PLC0415
    from greedy.forecasts.forecast import stated_data_facts  # noqa: PLC0415
    from greedy.recipes.loader import load_for_model  # noqa: PLC0415
    from greedy.training.calibration import Calibration  # noqa: PLC0415

    overrides = fields.overrides(settings, field_values)
    recipe = load_for_model(recipe_name or DEFAULT, model, overrides)
    network = load_network(recipe, model)
    data = stated_data_facts(recipe, images, classes)
    benchmark = Bench.of(recipe, device, network, fields.names_data(overrides), data)
    path = Calibration.path(benchmark.device.type)
    speeds: list[StageSpeed] = []
    with terminable(), _interruptible():
        _say(as_json, f"{recipe.name} on {device_name(benchmark.device)}: the peak")
        calibration = Calibration.begin(benchmark.device, peak_flops(benchmark.device))
        stages = benchmark.memory.network
        for number in range(1, len(stages) + 1):
            _say(as_json, f"stage {number}/{len(stages)} {stages.name(number)}")
            speeds.append(benchmark.measure(number, seconds))
            calibration = calibration.adding(speeds[-1].measured)
            calibration.write(path)
    if as_json:
        print_json(_document(recipe, calibration, speeds, path))
    else:
        _print(calibration, speeds, path)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns an interruption inside into a message that says which measurements are kept."""
    from greedy.base.errors import Interrupted  # noqa: PLC0415

    try:
        yield
    except KeyboardInterrupt as interruption:
        raise Interrupted(
            getattr(interruption, "signal", signal.SIGINT),
            "interrupted: `greedy plan` uses the stages measured so far, the same command "
            "measures all of them",
        ) from interruption


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        say(line)


def _document(
    recipe: "Recipe", calibration: "Calibration", speeds: Sequence["StageSpeed"], path: Path
) -> dict[str, object]:
    return {
        "recipe": recipe.name,
        "device": calibration.device,
        "threads": calibration.threads,
        "peak_gflops": calibration.peak_flops / 1e9,
        "stages": [
            {
                "stage": speed.stage,
                "name": speed.name,
                "precision": speed.measured.work.precision,
                "mode": speed.measured.work.mode,
                "images_per_second": speed.measured.rows_per_second,
                "share_of_peak": speed.measured.flops_per_second / calibration.peak_flops,
                "wait_share": speed.wait_share,
            }
            for speed in speeds
        ],
        "calibration": str(path),
    }


def _print(calibration: "Calibration", speeds: Sequence["StageSpeed"], path: Path) -> None:
    peak = calibration.peak_flops
    print_table(
        ("stage", "name", "precision", "mode", "images/s", "of peak", "waiting"),
        (
            (
                str(speed.stage),
                speed.name,
                speed.measured.work.precision,
                speed.measured.work.mode,
                _rate(speed.measured.rows_per_second),
                f"{speed.measured.flops_per_second / peak:.1%}",
                f"{speed.wait_share:.1%}",
            )
            for speed in speeds
        ),
        text_columns=4,
    )
    threads = "1 thread" if calibration.threads == 1 else f"{calibration.threads} threads"
    say(f"{calibration.device}, {threads}: at best {count(int(peak))}flop/s")
    say(f"kept in {path}, from which `greedy plan` forecasts times")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
