"""``greedy doctor``: this machine and what ``auto`` would choose on it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.base.sizes import size
from greedy.cli import options
from greedy.cli.tables import print_json, print_table, say

if TYPE_CHECKING:
    from greedy.forecasts.doctor import Disk, Examination

PAGE_CACHE = {
    "dropped": "from the disk (posix_fadvise dropped the page cache)",
    "kept": "from memory: its file system keeps pages, so the disk is slower",
    "unknown": "perhaps from memory: whether the page cache was dropped is not known",
}


@click.command(epilog="Example: greedy doctor --json")
@options.as_json
@options.debug
def doctor(as_json: bool) -> None:
    """Show what this machine has and what every `auto` would choose on it.

    The disk is that of ./runs, or of the current directory: a temporary file of at most 256 MiB
    is written to it and read.
    """
    from greedy.forecasts.doctor import examine  # noqa: PLC0415

    runs = Path("runs")
    examination = examine(runs if runs.is_dir() else Path.cwd())
    if as_json:
        print_json(asdict(examination))
    else:
        _print(examination)


def _print(examination: "Examination") -> None:
    print_table(
        ("package", "version"),
        ((name, version or "not installed") for name, version in examination.versions.items()),
        text_columns=2,
    )
    click.echo(f"\non {examination.system}")
    print_table(
        ("device", "name", "memory", "free", "precisions"),
        (
            (
                device.type,
                device.name,
                size(device.total_bytes),
                size(device.free_bytes),
                "float32, bfloat16" if device.fast_bfloat16 else "float32, bfloat16 slowly",
            )
            for device in examination.devices
        ),
        text_columns=2,
    )
    memory = size(examination.memory_total_bytes)
    say(f"memory: {size(examination.memory_free_bytes)} of {memory} free")
    _print_disk(examination.disk)
    auto = examination.automatic
    click.echo("\nauto would choose in a run that began now")
    print_table(
        ("setting", "choice"),
        (
            ("--device", auto.device),
            ("--precision", auto.precision),
            ("--encoding", auto.encoding),
            ("--memory-budget", f"{size(auto.memory_budget_bytes)} of {auto.device}'s memory"),
            ("--disk-budget", size(auto.disk_budget_bytes)),
            ("--ram-budget", f"{size(auto.ram_budget_bytes)} to hold a store in memory"),
            ("threads", str(auto.threads)),
        ),
        text_columns=2,
    )


def _print_disk(disk: "Disk") -> None:
    say(f"disk of {disk.path}: {size(disk.free_bytes)} of {size(disk.total_bytes)} free")
    if disk.read_bytes_per_second is None:
        say("its rate could not be measured: no file can be written there")
    else:
        say(f"read at {size(int(disk.read_bytes_per_second))}/s {PAGE_CACHE[disk.page_cache]}")
