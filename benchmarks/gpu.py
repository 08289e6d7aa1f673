"""What only a GPU can show, the most important first: `make gpu`.

Every part is a chain of commands with a time limit of its own, and leaves a JSON file in the folder
of results as soon as it is over, so that what a cut finds has been written. The figures belong in
docs/results.md, with the name of the card. `--device cpu --little` tries the script without one.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
GREEDY = [sys.executable, "-m", "greedy.cli.main"]
TAIL = 3000  # characters of what a command printed that is kept where it is no JSON
LEAST_SECONDS = 20.0  # that a command after a cut one gets, for what there is to be said


@dataclass(frozen=True)
class Part:
    """Commands that belong together, one after the other within a time limit in seconds. Those
    ``after`` them run whatever became of them."""

    name: str
    seconds: float
    commands: list[list[str]]
    after: tuple[list[str], ...] = ()


@dataclass(frozen=True)
class Setting:
    """Where and on what the parts run; ``little`` is for trying the script."""

    runs: Path
    data_dir: Path
    cifar10: Path
    device: str
    little: bool
    epochs: int

    def training(self, run: str, recipe: str, *options: str) -> list[str]:
        """The command that trains a recipe into a run directory."""
        where = ["--device", self.device, "--run", str(self.runs / run)]
        small = ["--set", "model.feature_multiplier=0.0625"] if self.little else []
        return [*GREEDY, "train", "--recipe", recipe, *where, *options, *small]

    def told(self, run: str) -> tuple[list[str], ...]:
        """The commands that say what a run has come to."""
        at = ["--run", str(self.runs / run), "--json"]
        return ([*GREEDY, "status", *at], [*GREEDY, "evaluate", *at, "--device", self.device])

    def cifar(self, images: int) -> list[str]:
        """CIFAR-10, or so many of its images."""
        folder = self.cifar10 if images == 50_000 else self.cifar10.with_name(f"cifar10-{images}")
        return ["--data", f"folder:{folder}"]

    def fewer(self, images: int) -> list[list[str]]:
        """The command that makes such a part of it, unless it is there."""
        to = self.cifar10.with_name(f"cifar10-{images}")
        sizes = [f"--per-class={images // 10}", f"--test-per-class={images // 50}"]
        command = [*_script("stratified_folder"), str(self.cifar10), str(to), *sizes]
        return [] if to.exists() else [command]


def _script(name: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py")]


def parts(given: Setting) -> Iterator[Part]:
    """All of them, the most important first."""
    marked = [p for p in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in p.read_text()]
    yield Part(
        "tests", 90, [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, marked)]]
    )
    yield Part("memory", 90, [[*_script("memory"), "--json"]])
    yield Part("workspace", 30, [[*_script("workspace"), "--json"]])
    yield from _budgets(given)
    yield from _steps(given)
    yield from _trainings(given)
    yield from _race(given)


def _budgets(given: Setting) -> Iterator[Part]:
    """VGG11B(3x), whole, an epoch a stage, in no more memory than is named."""
    rows = 200 if given.little else 5000
    once = ["--set", "training.epochs=1", "--views", "1", *given.cifar(rows)]
    for precision, budget, *more in (
        ("float32", "768MiB"),
        ("bfloat16", "768MiB"),
        ("float32", "512MiB", "--optimizer-state", "host"),
    ):
        name = f"budget-{precision}-{budget}"
        how = ["--precision", precision, "--memory-budget", budget, *more]
        train = given.training(name, "cifar10/vgg11b-3x-predsim", *once, *how)
        yield Part(name, 90, [*given.fewer(rows), train], given.told(name))


def _steps(given: Setting) -> Iterator[Part]:
    """How fast steps are, eager, compiled and as CUDA graphs."""
    step = [*_script("stage_step"), "--json", "--device", given.device]
    step += ["--steps", "2", "--rounds", "1", "--rows", "8"] if given.little else ["--steps", "10"]
    narrow = ["--multiplier", "0.0625" if given.little else "1"]
    wide = ["--multiplier", "0.0625" if given.little else "3", "--network", "vgg11b"]
    plain = ["--compile", "off"]
    some = ["--compile", "on", "--stages", "1,2,4,6"]
    yield Part("step-vgg8b-graphs", 40, [[*step, *narrow, *plain, "--backprop"]])
    yield Part("step-vgg8b-eager", 40, [[*step, *narrow, *plain, "--no-graphs"]])
    yield Part("step-vgg8b-compiled", 60, [[*step, *narrow, *some]])
    yield Part("step-vgg11b-3x", 60, [[*step, *wide, *plain, "--backprop"]])


def _trainings(given: Setting) -> Iterator[Part]:
    """Trains for as many epochs as there is time for, the schedule scaled."""
    milestones = [round(share * given.epochs) for share in (0.5, 0.75, 0.89, 0.94)]
    steps = sorted({each for each in milestones if 0 < each < given.epochs})
    scaled = ["--set", f"training.epochs={given.epochs}", "--set", f"training.milestones={steps}"]
    fashion = ["--data-dir", str(given.data_dir)]
    for name, recipe, data in (
        ("fashion-mnist", "fashion-mnist/vgg8b-predsim", fashion),
        ("cifar10", "cifar10/vgg8b-predsim", given.cifar(200 if given.little else 50_000)),
    ):
        train = given.training(name, recipe, *scaled, *data)
        yield Part(name, 200, [train], given.told(name))


def _race(given: Setting) -> Iterator[Part]:
    """Greedy and back-propagation in micro-batches within the same budget."""
    rows = 200 if given.little else 10_000
    how = ["--memory-budget", "1GiB", *given.cifar(rows)]
    wide = [*how, "--set", "model.feature_multiplier=2"]
    recipe = "cifar10/vgg8b-predsim"
    for name, options in (
        ("race-greedy", ["--set", "training.epochs=4", "--set", "training.milestones=[]"]),
        (
            "race-backprop",
            [
                *("--set", "training.strategy=backprop", "--set", "training.accumulate=16"),
                *("--set", "training.epochs=30", "--set", "training.milestones=[]"),
            ],
        ),
    ):
        train = given.training(name, recipe, *wide, *options)
        curves = [*GREEDY, "status", "--run", str(given.runs / name), "--json"]
        yield Part(name, 60, [*given.fewer(rows), train], (curves,))


def run(part: Part, log: Path) -> dict[str, Any]:
    """What became of a part; what its commands said goes to a log too."""
    began = time.perf_counter()
    told = []
    for command in part.commands:
        left = part.seconds - (time.perf_counter() - began)
        told.append(_run(command, left, log))
        if told[-1]["status"] != 0:
            break
    told += [_run(command, LEAST_SECONDS, log) for command in part.after]
    return {"part": part.name, "seconds": round(time.perf_counter() - began, 1), "commands": told}


def _run(command: list[str], seconds: float, log: Path) -> dict[str, Any]:
    began = time.perf_counter()
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    with log.open("a", encoding="utf-8") as errors:
        errors.write(f"\n$ {shlex.join(command)}\n")
        errors.flush()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            try:
                said, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.terminate()  # a training writes a checkpoint
                try:
                    said, _ = process.communicate(timeout=LEAST_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    said, _ = process.communicate()
    found = {"command": shlex.join(command[1:]), "status": process.returncode}
    found["seconds"] = round(time.perf_counter() - began, 1)
    try:
        found["found"] = json.loads(said)
    except ValueError:
        found["said"] = said[-TAIL:]
        with log.open("a", encoding="utf-8") as whole:
            whole.write(said)
    return found


@click.command()
@click.option("--to", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--runs", type=click.Path(path_type=Path), help="Folder of the runs  [in --to].")
@click.option("--data-dir", type=click.Path(path_type=Path), default="data", help="Fashion-MNIST.")
@click.option("--cifar10", type=click.Path(path_type=Path), default="data/cifar10-jpeg")
@click.option("--device", default="cuda", show_default=True)
@click.option("--epochs", default=3, show_default=True, help="Of the two trainings.")
@click.option("--only", multiple=True, help="Names of parts  [default: all].")
@click.option("--little", is_flag=True, help="Try the script, on a CPU.")
def main(
    to: Path,
    runs: Path | None,
    data_dir: Path,
    cifar10: Path,
    device: str,
    epochs: int,
    only: tuple[str, ...],
    little: bool,
) -> None:
    """Run what only a GPU can show."""
    runs = runs or to / "runs"
    for folder in (to, runs):
        folder.mkdir(parents=True, exist_ok=True)
    runs, data_dir, cifar10 = runs.absolute(), data_dir.absolute(), cifar10.absolute()
    for part in parts(Setting(runs, data_dir, cifar10, device, little, epochs)):
        if only and part.name not in only:
            continue
        found = run(part, to / "log")
        (to / f"{part.name}.json").write_text(json.dumps(found, indent=1))
        states = ", ".join(str(each["status"]) for each in found["commands"])
        click.echo(f"{part.name}: {found['seconds']} s, status {states}")


if __name__ == "__main__":
    main()
