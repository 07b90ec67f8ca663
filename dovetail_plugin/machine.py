"""Facts about this machine (CPU, memory, NUMA nodes), and control of torch's threads.

All facts come from the operating system and from torch. This module does not know models.
"""

import contextlib
import os
import platform
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    """Return the processors that this process may use, in ascending order; bindings by `use` do not count."""
    with _lock:
        bound = _binding
    if bound is not None:
        return sorted(bound.before.get(threading.get_native_id(), bound.own))
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


def last_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache of the first processor; 0 if the system does not report it.

    Args:
        root: directory in which the system lists the caches of the processor.
    """
    found = (re.fullmatch(r"(\d+)([KM])\s*", file.read_text()) for file in root.glob("index*/size"))
    return max((int(size[1]) << {"K": 10, "M": 20}[size[2]] for size in found if size), default=0)


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


# --- threads ---------------------------------------------------------------------------------------

_lock = threading.RLock()  # guards the names below, and changes of numbers of threads
_open: dict[object, int] = {}  # open blocks of `thread_count`, with the thread of each
_overlaps = 0  # how often a block was opened while another thread had one open
_binding: "_Binding | None" = None  # what `use` has bound all threads to


@dataclass(frozen=True)
class _Binding:
    """All threads of the process bound to some processors.

    Attributes:
        processors: where they run.
        before: thread -> its processors before.
        own: processors of the calling thread before, also for threads that were born since.
    """

    processors: set[int]
    before: dict[int, set[int]]
    own: set[int]


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run the block with `threads` torch threads, and restore number and processors of the threads afterwards.

    This also undoes calls of `use` in the block. Any number of threads may have blocks open, which may end in any
    order. The number belongs to the calling thread: other threads keep theirs, and those born in the meantime get the
    number that they would get without the block. Bindings of processors are undone as soon as another thread opens a
    block.

    Args:
        threads: 1 or more; None does not change the number.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}. Use None to leave the number unchanged.")
    block, thread = object(), threading.get_ident()
    bound = before = None
    try:
        with _lock:
            before = torch.get_num_threads()
            bound = _enter(block, thread)
            if threads is not None:
                _set_own_number(threads)
        yield
    finally:
        with _lock:
            _open.pop(block, None)
            if _binding is not None and _binding.processors != bound:
                _bind_all(bound)
            if before is not None and thread == threading.get_ident():  # a generator may be closed by another thread
                _set_own_number(before)


def alone() -> bool:
    """Return whether no other thread has a block of `thread_count` open."""
    with _lock:
        return all(thread == threading.get_ident() for thread in _open.values())


def watch() -> Callable[[], bool]:
    """Return a function that says whether the calling thread has been `alone` from now on."""
    with _lock:
        was_alone, overlaps = alone(), _overlaps
    return lambda: was_alone and _overlaps == overlaps


@contextmanager
def holding_back_others() -> Iterator[bool]:
    """Yield whether the calling thread is `alone`, and let no other thread open or end a block before the end of this.

    For single steps that must not meet the work of other threads. They take milliseconds, and nobody waits if the
    thread is not alone and does nothing.
    """
    with _lock:
        yield alone()


def use(threads: int, processors: tuple[int, ...] | None = None) -> bool:
    """Set the number of torch threads of the calling thread, and the processors that all threads run on.

    Threads that start later inherit the processors. Call this inside of `thread_count`, which undoes it. Nothing
    happens while other threads have such a block open: a choice for one generation does not suit several.

    Args:
        threads: 1 or more.
        processors: where all threads of this process may run; None does not change that.

    Returns:
        Whether number and processors were set.
    """
    with _lock:
        if not alone():
            return False
        if processors is not None:
            _bind_all(set(processors))
        _set_own_number(threads)
        return True


def _enter(block: object, thread: int) -> set[int] | None:
    """Note an open block, and return the processors that all threads are bound to, or None."""
    global _overlaps
    crowded = not alone()
    _open[block] = thread
    if crowded:
        _overlaps += 1
        _bind_all(None)
    return None if _binding is None else _binding.processors


def _set_own_number(threads: int) -> None:
    """Set the number of torch threads of the calling thread only.

    `torch.set_num_threads` sets it for the calling thread and for all threads that use torch for the first time later.
    A helper thread, which knows what such threads get, puts that back. If no thread can be started, the number stays.
    """
    if torch.get_num_threads() == threads:
        return
    known, changed = threading.Event(), threading.Event()

    def keep() -> None:
        number = torch.get_num_threads()
        known.set()
        changed.wait()
        torch.set_num_threads(number)

    helper = threading.Thread(target=keep, daemon=True, name="dovetail-thread-number")
    try:
        helper.start()
    except RuntimeError:  # there are too many threads, or the interpreter is ending
        return
    try:
        known.wait()
        torch.set_num_threads(threads)
    finally:
        changed.set()
        helper.join()


def _bind_all(processors: set[int] | None) -> None:
    """Bind all threads of the process to `processors`; None puts back what was before the first binding."""
    global _binding
    if processors is not None:
        now = _binding or _Binding(set(), {thread: _affinity(thread) for thread in _threads()}, _affinity(0))
        _binding = replace(now, processors=processors)
        for thread in _threads():
            _bind(thread, processors)
        return
    if _binding is None:
        return
    undone, changed = _binding, True
    while changed:  # once more, because a thread that was still bound may have started another
        changed = False
        for thread in _threads():
            before = undone.before.get(thread, undone.own)
            if _affinity(thread) == undone.processors != before:
                _bind(thread, before)
                changed |= _affinity(thread) == before
    _binding = None


def _forget_other_threads() -> None:
    """Start anew in a forked process, which has none of the other threads and perhaps a lock that one of them held."""
    global _lock
    _lock = threading.RLock()
    for block, thread in list(_open.items()):
        if thread != threading.get_ident():
            del _open[block]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


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
