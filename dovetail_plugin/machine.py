"""This machine: its name, its memory, its NUMA nodes, and threads for a block of work.

Enters: nothing but what the operating system says. Leaves: numbers and context managers. It knows no models.
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
"""Extensions of x86 that decide how fast a pass is."""


def cpu_name() -> str:
    """Model name and the vector extensions that matter for speed."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    have = vector_extensions()
    return f"{name} ({' '.join(flag for flag in VECTORS if flag in have)})"


def vector_extensions() -> set[str]:
    """Those of `VECTORS` that the CPU has; empty where the system does not tell."""
    return set(VECTORS) & set(_cpu_info("flags").split())


def _cpu_info(field: str) -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"{field}\s*:\s*(.+)", info)
    return found.group(1).strip() if found else ""


def cpus() -> list[int]:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def describe() -> dict[str, Any]:
    """For results and for keys of what was measured here."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; None where the operating system does not say."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def free_vram_bytes() -> int:
    """Free on the first GPU; 0 without one."""
    return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else 0


def gpu_supports_bf16() -> bool:
    """Whether the first GPU computes in bf16 itself (Ampere and later); True without a GPU, for plans."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(0)[0] >= 8


def numa_nodes(root: Path = Path("/sys/devices/system/node")) -> list[list[int]]:
    """Processors of every NUMA node that this process may use; one list where there are no nodes to tell apart."""
    usable = set(cpus())
    nodes = [_cpu_list(file.read_text()) & usable for file in sorted(root.glob("node[0-9]*/cpulist"))]
    return [sorted(node) for node in nodes if node] or [sorted(usable)]


def _cpu_list(text: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run the block with this many torch threads (ValueError below 1); None leaves them alone.

    What the block sets itself with `use` is undone, too.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
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
    """Run torch with this many threads, all of them kept on `processors`; None leaves them where they are.

    Threads that are started later inherit the binding. Call it inside `thread_count`, which undoes it.
    """
    if processors is not None:
        for thread in _threads():
            _bind(thread, set(processors))
    torch.set_num_threads(threads)


def _threads() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]
    except OSError:
        return [0]  # the calling one


def _affinity(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except (AttributeError, OSError):  # no such call on this system, or the thread has ended
        return set()


def _bind(thread: int, processors: set[int]) -> None:
    with contextlib.suppress(AttributeError, OSError):  # as above
        os.sched_setaffinity(thread, processors)
