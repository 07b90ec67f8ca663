"""Threads that run what a test gives them, one step after the other, so that a test decides the order of all steps."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

LONGEST_S = 30.0
"""Seconds after which a step counts as hanging and fails. No test that passes waits for them."""

Value = TypeVar("Value")


class Worker:
    """One thread. Calling it runs a function there and returns its result. One that hangs ends with the process."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, function: Callable[..., Value], *args: object) -> Value:
        return self.start(function, *args)()

    def start(self, function: Callable[..., Value], *args: object) -> Callable[[], Value]:
        """Start a function in the thread, and return what waits for its result."""
        future: Future[Value] = Future()
        self._steps.put((future, lambda: function(*args)))
        return lambda: future.result(timeout=LONGEST_S)

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            future, function = step
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del step, future, function  # what they hold lives as long as the test says

    def end(self) -> None:
        """End the thread after its last step."""
        self._steps.put(None)
        self._thread.join(timeout=LONGEST_S)


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """Yield this many threads, which end with the block."""
    made = [Worker() for _ in range(count)]
    try:
        yield made
    finally:
        for worker in made:
            worker.end()


def in_new_thread(function: Callable[[], Value]) -> Value:
    """Run a function in a thread that is born for it."""
    with workers(1) as (worker,):
        return worker(function)
