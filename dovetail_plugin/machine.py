"""Facts about this machine (CPU, memory, NUMA nodes), and control of torch's threads.

All facts come from the operating system and from torch. This module does not know models.
"""

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VECTORS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Vector extensions of x86 CPUs that affect the speed of a forward pass."""


def cpu_name() -> str:
    """Return the name of the CPU, followed by its extensions among `VECTORS`."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    have = vector_extensions()
    return f"{name} ({' '.join(flag for flag in VECTORS if flag in have)})"


def vector_extensions() -> set[str]:
    """Return the extensions among `VECTORS` that the CPU has; empty if the system does not report them."""
    return set(VECTORS) & set(_cpu_info("flags").split())


def _cpu_info(field: str) -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"{field}\s*:\s*(.+)", info)
    return found.group(1).strip() if found else ""


def cpus() -> list[int]:
    """Return the processors that this process may use, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def describe() -> dict[str, Any]:
    """Return CPU, cores, threads and GPU, for benchmark results and for keys of stored measurements."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def available_bytes() -> int | None:
    """Return the memory that can be allocated without swapping; None if the system does not report it."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None


def memory_bytes() -> int | None:
    """Return the size of the physical memory; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def free_vram_bytes() -> int:
    """Return the free memory of the first GPU; 0 without a GPU."""
    return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else 0


def gpu_supports_bf16() -> bool:
    """Return whether the first GPU has bf16 arithmetic (Ampere and later); True without a GPU, for plans."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(0)[0] >= 8


def numa_nodes(root: Path = Path("/sys/devices/system/node")) -> list[list[int]]:
    """Return the processors of each NUMA node that this process may use.

    Args:
        root: directory in which the system lists its nodes.

    Returns:
        One list per node; a single list if the system lists no nodes.
    """
    usable = set(cpus())
    nodes = [_cpu_list(file.read_text()) & usable for file in sorted(root.glob("node[0-9]*/cpulist"))]
    return [sorted(node) for node in nodes if node] or [sorted(usable)]


def _cpu_list(text: str) -> set[int]:
    """Parse a list of processors: "0-3,8" gives {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run the block with `threads` torch threads, and restore number and processors of the threads afterwards.

    This also undoes calls of `use` in the block.

    Args:
        threads: 1 or more; None does not change the number.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}. Use None to leave the number unchanged.")
    before = torch.get_num_threads()
    own, bound = _affinity(0), {thread: _affinity(thread) for thread in _threads()}
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for thread in _threads():
            if _affinity(thread) != bound.get(thread, own):
                _bind(thread, bound.get(thread, own))


def use(threads: int, processors: tuple[int, ...] | None = None) -> None:
    """Set the number of torch threads, and the processors that they run on.

    Threads that start later inherit the processors. Call this inside of `thread_count`, which undoes it.

    Args:
        threads: 1 or more.
        processors: where all threads of this process may run; None does not change that.
    """
    if processors is not None:
        for thread in _threads():
            _bind(thread, set(processors))
    torch.set_num_threads(threads)


def _threads() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]
    except OSError:
        return [0]  # the calling thread


def _affinity(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except (AttributeError, OSError):  # the system has no such call, or the thread has ended
        return set()


def _bind(thread: int, processors: set[int]) -> None:
    with contextlib.suppress(AttributeError, OSError):  # as in `_affinity`
        os.sched_setaffinity(thread, processors)
