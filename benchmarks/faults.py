"""Faults that small runs have to survive: kills, flipped bits, full disks. Also measures the time
that checkpoints take.

Stages train from rings of views: runs are also killed inside the exchange of a view, bits of a
view that is being drawn are flipped, and disks are filled while one is drawn.

Every fault strikes a real process with real files. A run that ends is compared with one without
faults: weights, stores, histories and records, except for fields about time, memory and bytes
written. Full disks are tmpfs in a separate mount namespace (`unshare -Urm`).
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from greedy import recipes
from greedy.cli.main import cli
from greedy.trainer import GreedyTrainer
from greedy.training.checkpoint import Checkpoints

RECIPE = """
[data]
name = "fashion-mnist-sample"
augmentation = "jitter2"
[model]
network = "mlp"
hidden_layers = 2
hidden_width = 16
dropout = 0.1
[loss]
name = "predsim"
[training]
epochs = 3
batch_size = 128
learning_rate = 0.002
precision = "float32"
checkpoint_minutes = 0.001
[store]
views = 2
reuse = 2
"""
FORK = multiprocessing.get_context("fork")
TMPFS_BYTES = 64 * 2**20
EXCHANGES = 2  # in a run, of a view of stage 1 and one of stage 2
MOMENTS = 7  # in an exchange, see `is_moment`


class Ended(NamedTuple):
    """The exit code of a command and everything that it printed."""

    code: int
    output: str


def start(log: Path, *arguments: object, moment: int = 0) -> Any:
    """Starts a `greedy` command in a new process, which writes its output to a file. It is killed
    at the ``moment``-th moment of its exchanges of views, if that is not 0."""
    process = FORK.Process(target=_command, args=(log, list(map(str, arguments)), moment))
    process.start()
    return process


def run(log: Path, *arguments: object) -> Ended:
    """Runs a `greedy` command to its end."""
    process = start(log, *arguments)
    process.join()
    return Ended(process.exitcode, log.read_text())


def is_moment(event: str, arguments: tuple) -> bool:
    """Returns whether an event of Python's audit hooks is a moment of an exchange of a view: a
    directory of views or a record in use is about to be renamed, or a directory to be deleted."""
    if event not in ("os.rename", "shutil.rmtree"):
        return False
    last = Path(os.fsdecode(arguments[event == "os.rename"]))
    if last.name == "stage.json":
        return last.exists()
    names = {Path(os.fsdecode(name)).name for name in arguments[: 1 + (event == "os.rename")]}
    return any(name.startswith((".train.", ".view.")) for name in names)


def _kill_at(moment: int) -> None:
    left = moment

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if is_moment(event, arguments):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_in_exchange(log: Path, *arguments: object, moment: int) -> None:
    """Runs a `greedy` command until it is killed at the ``moment``-th moment of its exchanges."""
    process = start(log, *arguments, moment=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def _command(log: Path, arguments: list[str], moment: int) -> None:
    if moment:
        _kill_at(moment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        cli(arguments)


def outcome(directory: Path) -> dict[str, Any]:
    """Returns the contents of a run's files by their paths, without fields that may differ."""
    contents: dict[str, Any] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        if path.name == "stage.json":
            document = json.loads(path.read_bytes())
            free = {"seconds", "images_per_second", "peak_memory_bytes", "digest"}
            free |= {"written_before", "versions"}
            contents[name] = {k: v for k, v in document.items() if k not in free}
            contents[name]["files"] = sorted(document["files"])
            contents[name]["store"] = {**(document["store"] or {}), "bytes_written": 0}
        elif path.name == "history.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            free = {"seconds", "images_per_second", "waiting_percent"}
            contents[name] = [{k: v for k, v in x.items() if k not in free} for x in lines]
        elif name not in ("run.toml", "plan.json", ".lock", ".lock.json"):
            contents[name] = path.read_bytes()
    return contents


def kills(count: int, folder: Path, recipe: Path, expected: dict, seconds: float) -> dict:
    """Kills runs at a random moment, every other one inside an exchange of a view, then gives the
    same command again. Returns how many runs were killed and how many ended as if nothing had
    happened."""
    choose, identical = random.Random(1), 0
    for number in range(count):
        place, log = folder / f"killed{number}", folder / "log"
        command = ("train", "--recipe", recipe, "--run", place)
        if number % 2:
            kill_in_exchange(log, *command, moment=choose.randint(1, EXCHANGES * MOMENTS))
        else:
            process = start(log, *command)
            time.sleep(choose.uniform(0, seconds))
            process.kill()
            process.join()
        ended = run(log, *command)
        identical += ended.code == 0 and outcome(place) == expected
        shutil.rmtree(place)
    return {"kills": count, "identical": identical}


def flips(count: int, folder: Path, recipe: Path, expected: dict) -> dict:
    """Flips single bits in files of a run whose last stage is half trained, every other one in the
    view that is drawn for it. Returns how many flips were detected, did not matter, or changed the
    result without a message."""
    choose, place, log = random.Random(2), folder / "half", folder / "log"
    # All of the view is drawn, and none of it is exchanged.
    command = ("train", "--recipe", recipe, "--run", place)
    kill_in_exchange(log, *command, moment=(EXCHANGES - 1) * MOMENTS + 1)
    counts = {"detected": 0, "harmless": 0, "silent": 0}
    for number in range(count):
        copy = folder / "flipped"
        shutil.copytree(place, copy)
        pattern = "stage*/activations.zarr/.view.*/**/*" if number % 2 else "**/*"
        files = sorted(p for p in copy.glob(pattern) if p.is_file() and p.stat().st_size)
        path = choose.choice(files)
        data = bytearray(path.read_bytes())
        bit = choose.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        verified = run(log, "cache", "verify", copy)
        trained = run(log, "train", "--run", copy)
        refused = trained.code in (1, 2) and "Error: " in trained.output
        clean = "Traceback" not in verified.output + trained.output
        if clean and (verified.code == 1 or refused):
            kind = "detected"
        elif clean and trained.code == 0 and outcome(copy) == expected:
            kind = "harmless"
        else:
            kind = "silent"
            where = f"{path.relative_to(copy)}, bit {bit}: {trained.output[-300:]}"
            click.echo(f"not survived: {where}", err=True)
        counts[kind] += 1
        shutil.rmtree(copy)
    return {"flips": count, **counts}


def disk_full(count: int, folder: Path, recipe: Path, expected: dict) -> dict:
    """Trains runs on a disk that is too small, or that another process fills at a random moment,
    then makes room and gives the same command again. Returns how many runs there were, how many
    stopped with a clear message, and how many then ended as if nothing had happened."""
    choose, disk, log = random.Random(3), folder / "disk", folder / "log"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
    needed = sum(len(v) for v in expected.values() if isinstance(v, bytes))
    clean = continued = 0
    for number in range(count):
        place, filler = disk / "run", disk / "filler"
        small = number % 2 == 0
        size = choose.randrange(needed) if small else TMPFS_BYTES
        _resize(disk, max(size, 2**16))
        command = ("train", "--recipe", recipe, "--run", place)
        process = start(log, *command)
        if not small:
            stage = choose.randint(1, 3)
            drawn = number % 4 == 3 and stage < 3  # a view of its store, or the stage trains
            pattern = f"stage{stage}/" + ("*/.view.*" if drawn else "training")
            _wait_for(place, pattern, process)
            time.sleep(choose.uniform(0, 0.2))
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while process.is_alive():
                    with contextlib.suppress(OSError):
                        file.write(bytes(2**20))
                        continue
                    time.sleep(0.001)
                    file.write(bytes(1))
        process.join()
        text = log.read_text()
        last = text.splitlines()[-1] if text else ""
        explained = last.startswith("Error: ") and "free" in last and str(disk) in last
        clean += process.exitcode == 1 and explained and "Traceback" not in text
        if not explained:
            click.echo(f"no clean stop: {process.exitcode} {text[-500:]}", err=True)
        filler.unlink(missing_ok=True)
        _resize(disk, TMPFS_BYTES)
        continued += run(log, *command).code == 0 and outcome(place) == expected
        shutil.rmtree(place, ignore_errors=True)
    subprocess.run(["umount", disk], check=True)
    return {"disk_full": count, "clean_stops": clean, "continued": continued}


def _wait_for(place: Path, pattern: str, process: Any) -> None:
    while not any(place.glob(pattern)) and process.is_alive():
        time.sleep(0.002)


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def checkpoint_overhead(folder: Path) -> float:
    """Measures the share of its time that a run of recipe `demo`, with fewer epochs, spends on
    checkpoints at the default interval, those at the end of each epoch included."""
    spent, save = [], Checkpoints.save

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        save(*arguments)
        spent.append(time.perf_counter() - began)

    changes = ["training.epochs=1", "training.precision=float32"]
    trainer = GreedyTrainer.from_recipe(
        recipes.load("demo", changes), folder / "demo", device="cpu"
    )
    from greedy.data import load_dataset  # noqa: PLC0415

    trainer.prepare(load_dataset("fashion-mnist-sample", None, False, None))
    Checkpoints.save = timed  # type: ignore[method-assign, assignment]
    try:
        records = trainer.train()
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
    return sum(spent) / sum(record.seconds for record in records)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--kills", "killed", default=100, show_default=True, help="Runs to kill.")
@click.option("--flips", "flipped", default=200, show_default=True, help="Bits to flip.")
@click.option("--disk-full", "full", default=20, show_default=True, help="Disks to fill.")
@click.option("--overhead/--no-overhead", default=True, help="Measure the time of checkpoints.")
@click.option("--inside", is_flag=True, hidden=True)
def main(as_json: bool, killed: int, flipped: int, full: int, overhead: bool, inside: bool) -> None:
    """Strike small runs and print how many end as if nothing had happened."""
    if full and not inside:
        again = [sys.executable, *sys.argv, "--inside"]
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--mount", *again])
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        recipe = folder / "small.toml"
        recipe.write_text(RECIPE)
        began = time.perf_counter()
        ended = run(folder / "log", "train", "--recipe", recipe, "--run", folder / "whole")
        seconds = time.perf_counter() - began
        assert ended.code == 0, ended.output
        expected = outcome(folder / "whole")
        results: dict[str, Any] = {}
        if killed:
            results |= kills(killed, folder, recipe, expected, seconds)
        if flipped:
            results |= flips(flipped, folder, recipe, expected)
        if full:
            results |= disk_full(full, folder, recipe, expected)
        if overhead:
            results["checkpoint_overhead"] = round(checkpoint_overhead(folder), 4)
    if as_json:
        click.echo(json.dumps(results))
        return
    for name, value in results.items():
        click.echo(f"{name}: {value}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
