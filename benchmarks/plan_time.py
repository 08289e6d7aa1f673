"""The times that `greedy plan` forecasts, compared with those that training takes.

Measures the machine as `greedy bench` does, plans a recipe, trains it in a temporary directory, and
prints for each stage and for all of them the planned time over the time taken. Nothing is saved,
and measurements of `greedy bench` stay as they are.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from greedy.data import load_dataset
from greedy.forecasts.bench import Bench, peak_flops
from greedy.forecasts.forecast import data_facts, forecast
from greedy.forecasts.machine import machine
from greedy.recipes import load
from greedy.runs.directory import RunDirectory
from greedy.trainer import GreedyTrainer
from greedy.training.calibration import Calibration


def calibrated(bench: Bench, seconds: float) -> Calibration:
    """Returns a calibration from measuring every stage, without earlier measurements."""
    known = Calibration.begin(bench.device, peak_flops(bench.device))
    known = known.model_copy(update={"measured": []})
    for number in range(1, len(bench.memory.network) + 1):
        known = known.adding(bench.measure(number, seconds).measured)
    return known


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--recipe", default="demo", show_default=True, help="The recipe to plan and train.")
@click.option("--measured", help="The recipe to measure  [default: the same].")
@click.option("--epochs", default=2, show_default=True, help="Epochs of every stage.")
@click.option("--seconds", default=3.0, show_default=True, help="Time to measure each stage.")
@click.option("--device", default="auto", show_default=True)
@click.option("--set", "settings", multiple=True, help="As for `greedy train`.")
def main(
    as_json: bool,
    recipe: str,
    measured: str | None,
    epochs: int,
    seconds: float,
    device: str,
    settings: tuple[str, ...],
) -> None:
    """Print planned times over times taken."""
    wanted = load(recipe, [f"training.epochs={epochs}", *settings])
    benched = load(measured, settings) if measured else wanted
    calibration = calibrated(Bench.of(benched, device), seconds)
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory.create(Path(directory) / "run", wanted)
        planned = forecast(
            run, data_facts(run), machine(wanted, device), calibration=calibration
        ).stages
        trainer = GreedyTrainer.from_recipe(wanted, run.path, device=device)
        trainer.prepare(load_dataset(wanted.data.name))
        taken = trainer.train()
    rows: list[dict[str, Any]] = [
        {"stage": plan.stage, "name": plan.name, "planned": plan.seconds, "taken": record.seconds}
        for plan, record in zip(planned, taken, strict=True)
    ]
    assert all(row["planned"] is not None for row in rows)
    whole = {key: sum(row[key] for row in rows) for key in ("planned", "taken")}
    rows.append({"stage": None, "name": "in all", **whole})
    rows = [row | {"ratio": round(row["planned"] / row["taken"], 3)} for row in rows]
    if as_json:
        click.echo(json.dumps({"recipe": wanted.name, "epochs": epochs, "rows": rows}))
        return
    for row in rows:
        click.echo(
            f"{row['stage'] or ''} {row['name']}: planned {row['planned']:.1f} s, taken "
            f"{row['taken']:.1f} s, ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
