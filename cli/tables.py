"""Output: lines, tables of at most 80 columns, JSON for programs, and signs of work in progress."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from greedy.base.text import legible_json, shown


def count(number: int) -> str:
    """Writes a large number in short: ``42.5 M``."""
    value = float(number)
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit else str(number)
        value /= 1000
    return f"{value:.1f} E"


@contextmanager
def waiting(activity: str) -> Iterator[None]:
    """Shows an activity on a terminal until it ends."""
    console = Console(stderr=True)
    with console.status(activity) if console.is_interactive else nullcontext():
        yield


def say(line: str, *, err: bool = False) -> None:
    """Prints a line, with ``err`` on standard error; a terminal shows it without obeying it."""
    click.echo(shown(line), err=err)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> None:
    """Prints a table whose first ``text_columns`` columns are texts and the others numbers. Cells
    are printed as they are, never read as markup."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console(highlight=False).print(table)


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    click.echo(legible_json(document))
