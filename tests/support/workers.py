"""Threads that run what a test gives them, one step after the other, so that a test decides the order of all steps."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

LONGEST_S = 120.0
"""Seconds after which a step counts as hanging. No test waits that long."""

Value = TypeVar("Value")


class Worker:
    """One thread. Calling it runs a function there and returns its result."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, function: Callable[..., Value], *args: object) -> Value:
        return self.start(function, *args)()

    def start(self, function: Callable[..., Value], *args: object) -> Callable[[], Value]:
        """Start a function in the thread, and return what waits for its result."""
        future = self._pool.submit(function, *args)
        return lambda: future.result(timeout=LONGEST_S)


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """Yield this many threads, which end with the block."""
    with ExitStack() as stack:
        yield [Worker(stack.enter_context(ThreadPoolExecutor(max_workers=1))) for _ in range(count)]


def in_new_thread(function: Callable[[], Value]) -> Value:
    """Run a function in a thread that is born for it."""
    with workers(1) as (worker,):
        return worker(function)
