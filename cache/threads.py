"""Background threads that end with the block that started them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


@contextmanager
def background(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Gives a pool of threads. At the end of the ``with``, jobs that have not begun are dropped and
    the others waited for."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="greedy-cache")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Result]], depth: int
) -> Iterator[Result]:
    """Yields the results of ``jobs`` in order, computed by ``pool``, at most ``depth`` ahead."""
    pending: deque[Future[Result]] = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
