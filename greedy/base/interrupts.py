"""Signals that ask a run to stop: it stops where it can go on later."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from greedy.base.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(number: int, frame: FrameType | None) -> None:
    """A handler that stops at once: for the times when nothing is lost by it."""
    raise Interrupted(number, "interrupted: the same command goes on where this one stopped")


class Postponed:
    """Context manager in which SIGINT, SIGTERM and SIGHUP wait until ``requested`` is looked at;
    the second one does not. Handlers that are the user's own stay, as do those of other threads.

    Attributes:
        requested: the signal that came, or ``None``.
    """

    requested: int | None = None

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIG_DFL, signal.default_int_handler, stop)
            self._before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) in ours}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            stop(number, frame)
        self.requested = number
