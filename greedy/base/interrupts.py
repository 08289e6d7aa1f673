"""Signals that ask a run to stop: it stops where it can be resumed."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from greedy.base.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal by stopping at once: for code that loses nothing by it."""
    raise Interrupted(number, "interrupted: the same command resumes where this one stopped")


class PostponedSignals:
    """Context manager that delays SIGINT, SIGTERM and SIGHUP: the first one only sets
    ``requested``, and stops at the end of the block if that did not; the second stops at once. A
    user's handlers stay, as do signals outside the main thread.

    Attributes:
        requested: the number of the signal that came, or ``None``.
    """

    requested: int | None = None

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            replaceable = (signal.SIG_DFL, signal.default_int_handler, stop)
            self._before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) in replaceable}
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
        if error is None and self.requested is not None:  # too late for those inside to see it
            stop(self.requested, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            stop(number, frame)
        self.requested = number
