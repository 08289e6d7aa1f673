"""Every failure as one sentence on standard error and an exit code."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from greedy.base.errors import Interrupted, TrainingError, UserError, unknown
from greedy.base.text import shown

DEBUG = "greedy.debug"  # the key of --debug in the context's `meta`


class Failure(click.ClickException):
    """A failure of something that was asked for rightly, as one sentence."""

    exit_code = 1


class Mistake(Failure):
    """A mistake in what was asked for, as one sentence."""

    exit_code = 2


class Stopped(Failure):
    """A stop by Ctrl-C."""

    exit_code = 128 + signal.SIGINT


class Terminated(Failure):
    """A stop by SIGTERM."""

    exit_code = 128 + signal.SIGTERM


class HungUp(Failure):
    """A stop because the terminal was closed."""

    exit_code = 128 + signal.SIGHUP


BY_SIGNAL = {signal.SIGINT: Stopped, signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}


class Group(click.Group):
    """A group of commands that reports failures as sentences and suggests known commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.get_command(ctx, name) is not None or name.startswith("-")
        if not known and not ctx.resilient_parsing:  # no message while a shell completes
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
            sentence = shown(_sentence(error))
            who = f" in process {os.environ['RANK']}" if follows() else ""
            if _has_to_speak(sentence):
                click.echo(f"Error{who}: {sentence}", err=True)
            code = error.exit_code
        except click.Abort:
            code = Stopped.exit_code
        sys.exit(code)


def follows() -> bool:
    """Returns whether torchrun started this process with others of which another one leads."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def _has_to_speak(sentence: str) -> bool:
    """Returns whether no other process of those that train together has said why this one ends."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from greedy.base.ranks import WAITING, Ranks  # noqa: PLC0415

    ranks = Ranks.joined()
    if follows() and ranks.size == 1:  # all fail alike before they meet, and torchrun ends this one
        time.sleep(WAITING)
    return ranks.fail(sentence)


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal stop a run inside as Ctrl-C does, with a message that says
    how to resume it."""
    from greedy.base.interrupts import SIGNALS, stop  # noqa: PLC0415

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def failure_of(error: BaseException) -> Failure:
    """Turns an error into the failure to report; prints its traceback if --debug was given."""
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
            return Failure(f"{named}: {advice}" if (advice := remedy(error)) else named)
    if failure := _failure_type(error):
        return failure(sentence)
    return Failure(f"{type(error).__name__}: {sentence} (--debug shows where it comes from)")


def _failure_type(error: BaseException) -> type[Failure] | None:
    """Returns the kind of failure that one of our own errors is, ``None`` for other errors."""
    if isinstance(error, UserError | TrainingError):
        return Mistake if isinstance(error, UserError) else Failure

    # Not imported above, since it takes seconds.
    from greedy.cache import DamagedStore, StoreError, UnreachableStore  # noqa: PLC0415

    if isinstance(error, StoreError):
        return Failure if isinstance(error, DamagedStore | UnreachableStore) else Mistake
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
    """Returns the recipe field with the name of an unknown option, if the command has --set."""
    from greedy.recipes.schema import SECTIONS  # noqa: PLC0415

    name = error.option_name.lstrip("-").replace("-", "_")
    has_set = error.ctx is not None and any(p.name == "settings" for p in error.ctx.command.params)
    sections = (section for section, model in SECTIONS.items() if name in model.model_fields)
    section = next(sections, None) if has_set else None
    return f"{section}.{name}" if section else None
