"""Results for people, in tables of at most 80 columns, and for programs, as JSON; and what is shown
while they are waited for."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from greedy.base.sizes import format_duration, format_size
from greedy.base.text import legible_json, shown


def percent(value: float | None) -> str:
    """An error in percent, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f} %"


def size(size_bytes: int | None) -> str:
    """A size on disk, or a dash where there is none."""
    return "-" if size_bytes is None else format_size(size_bytes)


def count(number: int) -> str:
    """A large number of things, shortened: ``42.5 M``."""
    value = float(number)
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit else str(number)
        value /= 1000
    return f"{value:.1f} E"


def duration(seconds: float | None) -> str:
    """A time to wait, or a dash where it is not known."""
    return "-" if seconds is None else format_duration(seconds)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Inside, a terminal shows what is waited for; it is gone afterwards."""
    console = Console(stderr=True)
    with console.status(what) if console.is_interactive else nullcontext():
        yield


def say(line: str, *, err: bool = False) -> None:
    """Prints a line, on standard error if that is asked for; names in it are shown as they are."""
    click.echo(shown(line), err=err)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> None:
    """Prints a table whose first ``left`` columns are texts and the others numbers. What is in it
    is data and never markup."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console(highlight=False).print(table)


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    click.echo(legible_json(document))
