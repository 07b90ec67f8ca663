"""Measures the limits of this machine, and the time that the CPU kernels take inside of a pass.

A pass over N rows cannot be faster than reading its weights once, nor than N multiply-adds for each weight. The library
of kernels measures both limits in seconds: memory that does not fit the caches is read in torch's threads, and the
kernels' instructions run on registers. This module does not know models.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import machine
from ..errors import InputError
from ..kernels.library import MIXES, Library
from ..kernels.packing import memory_for

LEAST_BUFFER = 256 << 20
"""Bytes that are read at least, so that opening the threads' region takes no share of the time."""

TASKS = 16
"""Tasks of the first measurement of a mix; their number is doubled until they take long enough."""

MIX_OF = {"int8": "int8", "int4": "int4", "q4_k": "int4", "q6_k": "int8", "float": "float"}
"""Kind of packed weights -> the mix that its kernel uses. Other kinds have no known limit of arithmetic."""


@dataclass(frozen=True)
class Roofline:
    """Limits of this machine, with torch's threads.

    Attributes:
        read_bytes_per_s: fastest reading of memory.
        multiply_adds_per_s: set of instructions -> mix of instructions -> multiply-adds.
        instructions: set that the kernels use.
        buffer_bytes: size of the memory that was read.
    """

    read_bytes_per_s: float
    multiply_adds_per_s: dict[str, dict[str, float]]
    instructions: str
    buffer_bytes: int

    def memory_ms(self, weight_bytes: int) -> float:
        """Return the milliseconds in which so many bytes can be read."""
        return 1e3 * weight_bytes / self.read_bytes_per_s

    def arithmetic_ms(self, multiply_adds: int, kind: str | None) -> float | None:
        """Return the milliseconds of so many multiply-adds with weights of a kind; None for an unknown kind."""
        mix = MIX_OF.get(kind or "")
        return None if mix is None else 1e3 * multiply_adds / self.multiply_adds_per_s[self.instructions][mix]

    def best_of(self, other: "Roofline") -> "Roofline":
        """Return the higher one of each limit, of two measurements of one machine."""
        peaks = {
            name: {mix: max(speed, other.multiply_adds_per_s[name][mix]) for mix, speed in by_mix.items()}
            for name, by_mix in self.multiply_adds_per_s.items()
        }
        fastest = max(self.read_bytes_per_s, other.read_bytes_per_s)
        return Roofline(fastest, peaks, self.instructions, self.buffer_bytes)

    def lines(self) -> str:
        """Return the limits as a sentence for each, for people."""
        text = [f"read bandwidth: {self.read_bytes_per_s / 1e9:.1f} GB/s"]
        for name, by_mix in self.multiply_adds_per_s.items():
            speeds = ", ".join(f"{mix} {speed / 1e9:.0f}" for mix, speed in by_mix.items())
            used = " (in use)" if name == self.instructions else ""
            text.append(f"billions of multiply-adds/s, {name}{used}: {speeds}")
        return "\n".join(text)


def buffer_bytes() -> int:
    """Return the size of the memory that `measure` reads: twice the last cache of this machine, or `LEAST_BUFFER`."""
    return max(LEAST_BUFFER, 2 * machine.last_cache_bytes())


def measure(kernels: Library, *, seconds: float = 0.2, size: int | None = None) -> Roofline:
    """Measure the limits of this machine.

    Args:
        kernels: the loaded library.
        seconds: how long each limit is measured at least; the fastest part of that time counts.
        size: bytes of memory to read; default: `buffer_bytes`.

    Raises:
        InputError: there is not enough free memory for the buffer.
    """
    size, free = size or buffer_bytes(), machine.available_bytes()
    if free is not None and size > free:
        raise InputError(
            f"measuring the read bandwidth takes a buffer of {size} bytes, and {free} bytes of memory are free. "
            "Close other programs."
        )
    buffer = memory_for(size).fill_(1)  # written, because untouched pages are not in memory
    read_s = _fastest(lambda: kernels.read(buffer), seconds)
    peaks = {name: {mix: _peak(kernels, mix, name, seconds) for mix in MIXES} for name in kernels.available}
    return Roofline(size / read_s, peaks, kernels.instructions, size)


def _fastest(work: Callable[[], Any], seconds: float) -> float:
    """Return the least seconds of a call, over at least three of them."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start_s)
    return min(taken)


def _peak(kernels: Library, mix: str, instructions: str, seconds: float) -> float:
    """Return multiply-adds per second: the best of ten parts that take `seconds` together."""
    tasks, done, taken_s = TASKS // 2, 0, 0.0
    while taken_s < seconds / 10:
        tasks *= 2
        start_s = time.perf_counter()
        done = kernels.multiply(mix, instructions, tasks)
        taken_s = time.perf_counter() - start_s
    return done / _fastest(lambda: kernels.multiply(mix, instructions, tasks), seconds)


# --- the kernels' own time ---------------------------------------------------------------------------


@dataclass
class KernelTime:
    """Seconds of all products with packed weights since the measurement began. Quantizing activations is not in it."""

    seconds: float = 0.0

    def of(self, product: Callable[..., int]) -> Callable[..., int]:
        """Return the function with its time added to `seconds`."""

        def timed(*arguments: Any) -> int:
            start_s = time.perf_counter()
            failed = product(*arguments)
            self.seconds += time.perf_counter() - start_s
            return failed

        return timed


@contextmanager
def kernel_time(kernels: Library | None) -> Iterator[KernelTime]:
    """Measure the time of the products that all threads start in the block.

    Args:
        kernels: the loaded library; None measures nothing.
    """
    measured = KernelTime()
    if kernels is None:
        yield measured
        return
    products = {name: getattr(kernels, name) for name in kernels.products}
    for name, product in products.items():
        setattr(kernels, name, measured.of(product))
    try:
        yield measured
    finally:
        for name, product in products.items():
            setattr(kernels, name, product)
