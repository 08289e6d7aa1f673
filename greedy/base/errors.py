"""The errors of a run, and sentences that several modules say."""

from collections.abc import Iterable

from greedy.base.text import did_you_mean


class UserError(Exception):
    """A mistake in the user's request: one sentence saying what is wrong and what to do."""


class TrainingError(Exception):
    """A run that cannot continue although the request was right; one sentence."""


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop; one sentence that says how to resume it.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, signal: int, sentence: str) -> None:
        super().__init__(sentence)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def missing_packages(feature: str, packages: Iterable[str], extra: str) -> UserError:
    """Returns the error that ``feature`` needs packages, and names the extra that installs them."""
    return UserError(
        f"{feature} needs {' and '.join(packages)}: install with pip install '.[{extra}]' "
        f"in the checkout of greedy"
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error that ``name`` is no ``kind``, with the nearest of the known names."""
    known = list(known)
    hint = did_you_mean(name, known, most=3)
    return UserError(f"unknown {kind} {name!r}: {hint}{hint and ' '}choose from {', '.join(known)}")


def no_stage(number: int, count: int) -> UserError:
    """Returns the error that a network of ``count`` stages has no stage ``number``."""
    return UserError(f"there is no stage {number}: this network has stages 1 to {count}")
