"""All measurements that need a GPU, the most important first: `make gpu`.

Every part is a chain of commands with its own time limit, and writes a JSON file into the folder of
results as soon as it ends, so that nothing is lost if a later part is cut short. The figures belong
in docs/results.md, with the name of the card. `--device cpu --little` tries the script without a
GPU.
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

from greedy.base.devices import pick_device
from greedy.base.errors import UserError

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
GREEDY = [sys.executable, "-m", "greedy.cli.main"]
TAIL = 3000  # characters of a command's output that are kept if it is not JSON
LEAST_SECONDS = 20.0  # for each command after the others, even if these took too long


@dataclass(frozen=True)
class Part:
    """Commands that belong together.

    Attributes:
        name: the name of the part and of its files.
        seconds: the time limit of ``commands`` together.
        commands: commands that run one after the other, until one fails.
        after: commands that run after them in any case.
    """

    name: str
    seconds: float
    commands: list[list[str]]
    after: tuple[list[str], ...] = ()


@dataclass(frozen=True)
class Setting:
    """The settings of all parts.

    Attributes:
        runs: the folder of the run directories.
        data_dir: the folder with Fashion-MNIST.
        cifar10: the image folder with CIFAR-10.
        device: ``cuda``, or another device to try the script.
        little: whether everything is made small, to try the script.
        epochs: number of epochs of the two trainings.
    """

    runs: Path
    data_dir: Path
    cifar10: Path
    device: str
    little: bool
    epochs: int

    def training(self, run: str, recipe: str, *options: str) -> list[str]:
        """Returns the command that trains a recipe into a run directory."""
        where = ["--device", self.device, "--run", str(self.runs / run)]
        small = ["--set", "model.feature_multiplier=0.0625"] if self.little else []
        return [*GREEDY, "train", "--recipe", recipe, *where, *options, *small]

    def results(self, run: str) -> tuple[list[str], ...]:
        """Returns the commands that print the results of a run."""
        at = ["--run", str(self.runs / run), "--json"]
        return ([*GREEDY, "status", *at], [*GREEDY, "evaluate", *at, "--device", self.device])

    def cifar(self, images: int) -> list[str]:
        """Returns the options for CIFAR-10, or for ``images`` of its training images."""
        folder = self.cifar10 if images == 50_000 else self.cifar10.with_name(f"cifar10-{images}")
        return ["--data", f"folder:{folder}"]

    def make_cifar(self, images: int) -> list[list[str]]:
        """Returns the command that makes the folder with ``images`` training images of CIFAR-10, if
        it does not exist."""
        to = self.cifar10.with_name(f"cifar10-{images}")
        sizes = [f"--per-class={images // 10}", f"--test-per-class={images // 50}"]
        command = [*_script("stratified_folder"), str(self.cifar10), str(to), *sizes]
        return [] if to.exists() else [command]


def _script(name: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py")]


def parts(given: Setting) -> Iterator[Part]:
    """Yields all parts, the most important first."""
    marked = [p for p in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in p.read_text()]
    yield Part(
        "tests", 240, [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, marked)]]
    )
    yield Part("memory", 90, [[*_script("memory"), "--json"]])
    yield Part("workspace", 30, [[*_script("workspace"), "--json"]])
    yield from _budgets(given)
    yield from _steps(given)
    yield from _trainings(given)
    yield from _race(given)


def _budgets(given: Setting) -> Iterator[Part]:
    """Yields trainings of VGG11B(3x) within memory budgets, one epoch for each stage."""
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
        yield Part(name, 90, [*given.make_cifar(rows), train], given.results(name))


def _steps(given: Setting) -> Iterator[Part]:
    """Yields measurements of the time of steps: eager, compiled, and as CUDA graphs."""
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
    """Yields two trainings with few epochs, their schedules scaled."""
    milestones = [round(share * given.epochs) for share in (0.5, 0.75, 0.89, 0.94)]
    steps = sorted({epoch for epoch in milestones if 0 < epoch < given.epochs})
    scaled = ["--set", f"training.epochs={given.epochs}", "--set", f"training.milestones={steps}"]
    fashion = ["--data-dir", str(given.data_dir)]
    for name, recipe, data in (
        ("fashion-mnist", "fashion-mnist/vgg8b-predsim", fashion),
        ("cifar10", "cifar10/vgg8b-predsim", given.cifar(200 if given.little else 50_000)),
    ):
        train = given.training(name, recipe, *scaled, *data)
        yield Part(name, 200, [train], given.results(name))


def _race(given: Setting) -> Iterator[Part]:
    """Yields trainings within the same memory budget: greedy, and by back-propagation in
    micro-batches."""
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
        yield Part(name, 60, [*given.make_cifar(rows), train], (curves,))


def run(part: Part, log: Path) -> dict[str, Any]:
    """Runs a part and returns its document. What its commands print goes to a log too."""
    began = time.perf_counter()
    results = []
    for command in part.commands:
        left = part.seconds - (time.perf_counter() - began)
        results.append(_run(command, left, log))
        if results[-1]["status"] != 0:
            break
    results += [_run(command, LEAST_SECONDS, log) for command in part.after]
    seconds = round(time.perf_counter() - began, 1)
    return {"part": part.name, "seconds": seconds, "commands": results}


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
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.terminate()  # a training writes a checkpoint
                try:
                    output, _ = process.communicate(timeout=LEAST_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    output, _ = process.communicate()
    result = {"command": shlex.join(command[1:]), "status": process.returncode}
    result["seconds"] = round(time.perf_counter() - began, 1)
    try:
        result["found"] = json.loads(output)
    except ValueError:
        result["said"] = output[-TAIL:]
        with log.open("a", encoding="utf-8") as whole:
            whole.write(output)
    return result


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
    """Run all measurements that need a GPU."""
    try:
        pick_device(device)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    runs = runs or to / "runs"
    for folder in (to, runs):
        folder.mkdir(parents=True, exist_ok=True)
    runs, data_dir, cifar10 = runs.absolute(), data_dir.absolute(), cifar10.absolute()
    for part in parts(Setting(runs, data_dir, cifar10, device, little, epochs)):
        if only and part.name not in only:
            continue
        result = run(part, to / "log")
        (to / f"{part.name}.json").write_text(json.dumps(result, indent=1))
        states = ", ".join(str(command["status"]) for command in result["commands"])
        click.echo(f"{part.name}: {result['seconds']} s, status {states}")


if __name__ == "__main__":
    main()
