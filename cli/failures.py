"""Every failure as one sentence on standard error and an exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from greedy.base.errors import Interrupted, TrainingError, UserError, unknown
from greedy.base.text import shown

DEBUG = "greedy.debug"  # the key of the context's `meta` under which --debug is kept


class Failure(click.ClickException):
    """What cannot go on, as a sentence."""

    exit_code = 1


class Mistake(Failure):
    """What was asked for wrongly."""

    exit_code = 2


class Stopped(Failure):
    """Ctrl-C."""

    exit_code = 128 + signal.SIGINT


class Terminated(Failure):
    """SIGTERM."""

    exit_code = 128 + signal.SIGTERM


class HungUp(Failure):
    """The terminal was closed."""

    exit_code = 128 + signal.SIGHUP


BY_SIGNAL = {signal.SIGINT: Stopped, signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}


class Group(click.Group):
    """Commands whose failures are sentences, with near names for unknown ones."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.get_command(ctx, name) is not None or name.startswith("-")
        if not known and not ctx.resilient_parsing:  # a shell that completes wants no complaint
            raise unknown("command", name, self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise failure_of(error) from error

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"Error: {shown(_sentence(error))}", err=True)
            code = error.exit_code
        except click.Abort:
            code = Stopped.exit_code
        sys.exit(code)


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal stop a run as Ctrl-C does, and all say how to go on
    wherever they come."""
    from greedy.base.interrupts import SIGNALS, stop  # noqa: PLC0415

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def failure_of(error: BaseException) -> Failure:
    """An error that was caught, with its traceback printed where --debug asks for it."""
    if click.get_current_context().meta.get(DEBUG):
        traceback.print_exc()
    sentence = " ".join(str(error).split())
    match error:
        case Interrupted():
            return BY_SIGNAL[signal.Signals(error.signal)](sentence)
        case KeyboardInterrupt():
            return Stopped("interrupted, and nothing that was finished is lost")
        case MemoryError():
            return Failure(
                "there is not enough main memory for this: close other programs, or ask for less, "
                "such as smaller images or batches"
            )
        case OSError(strerror=str(reason), filename=path):
            from greedy.base.disk_space import remedy  # noqa: PLC0415

            named = f"{os.fsdecode(path)}: {reason}" if isinstance(path, str | bytes) else reason
            return Failure(f"{named}: {way}" if (way := remedy(error)) else named)
    if kind := _kind(error):
        return kind(sentence)
    return Failure(f"{type(error).__name__}: {sentence} (--debug shows where it comes from)")


def _kind(error: BaseException) -> type[Failure] | None:
    """Whose fault one of our own errors is; ``None`` for any other."""
    if isinstance(error, UserError | TrainingError):
        return Mistake if isinstance(error, UserError) else Failure

    # Here and not above: the store takes seconds to import.
    from greedy.cache import DamagedStore, StoreError  # noqa: PLC0415

    if isinstance(error, StoreError):
        return Failure if isinstance(error, DamagedStore) else Mistake
    return None


def _sentence(error: click.ClickException) -> str:
    sentence = error.format_message()
    if isinstance(error, click.NoSuchOption):
        sentence = f"there is no option {error.option_name}"
        if field := _recipe_field(error):
            sentence += f"; did you mean --set {field}=VALUE?"
        elif error.possibilities:
            sentence += f"; did you mean {error.possibilities[0]}?"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{sentence.rstrip('.')} (see `{error.ctx.command_path} --help`)"
    return sentence


def _recipe_field(error: click.NoSuchOption) -> str | None:
    """The field that an unknown option is called like, where --set could change it."""
    from greedy.recipes.schema import SECTIONS  # noqa: PLC0415

    name = error.option_name.lstrip("-").replace("-", "_")
    has_set = error.ctx is not None and any(p.name == "settings" for p in error.ctx.command.params)
    sections = (section for section, model in SECTIONS.items() if name in model.model_fields)
    section = next(sections, None) if has_set else None
    return f"{section}.{name}" if section else None
