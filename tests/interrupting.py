"""Reporters that interrupt a training."""

import signal
from collections.abc import Callable

from greedy import Reporter


def interrupt() -> None:
    """Does to the process what Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


class StopAfter(Reporter):
    """Interrupts the process after a number of batches, or does something else then."""

    def __init__(self, batches: int = 1, how: Callable[[], None] = interrupt) -> None:
        self.left, self.how = batches, how

    def batch_finished(self, rows: int) -> None:
        self.left -= 1
        if not self.left:
            self.how()


class Listener(Reporter):
    """Records which stages train; interrupts the first batch of one of them."""

    def __init__(self, interrupted: int | None = None) -> None:
        self.trained: list[int] = []
        self.interrupted = interrupted

    def stage_started(self, number: int, *rest: object) -> None:
        self.trained.append(number)

    def batch_finished(self, rows: int) -> None:
        if self.trained[-1] == self.interrupted:
            interrupt()
