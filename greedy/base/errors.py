"""The errors of a run."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked for: one sentence saying what is wrong and what to do."""


class TrainingError(Exception):
    """A run that cannot go on, through nothing wrong in what was asked for; one sentence."""


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop; one sentence that says how it goes on.

    Attributes:
        signal: that told it.
    """

    def __init__(self, signal: int, sentence: str) -> None:
        super().__init__(sentence)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """What an error says, in a line that fits a sentence."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def lacking(what: str, packages: Iterable[str], extra: str) -> UserError:
    """The error that says ``what`` needs packages of an extra of ours that are not installed."""
    return UserError(
        f"{what} needs {' and '.join(packages)}: install with pip install '.[{extra}]' "
        f"in the checkout of greedy"
    )


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error that says ``name`` is no ``what``, with the nearest of the known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}choose from {', '.join(known)}")


def no_stage(number: int, count: int) -> UserError:
    """The error that says a network of ``count`` stages has no stage ``number``."""
    return UserError(f"there is no stage {number}: this network has stages 1 to {count}")
