"""Measures this machine with the loaded models.

`measure` takes a target session and a drafter that have both read a prompt, and returns `Measurements`. The text does
not change, because all rows that a probe appends are dropped again. `cost.py` interprets the numbers.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from .. import machine
from ..drafts.base import Drafter
from ..targets.base import TargetSession
from ..tree import DraftTree, TreeBudget
from .measurements import Measurements
from .settings import PolicySettings


def measure(
    target: TargetSession,
    drafter: Drafter,
    *,
    token: int,
    context: int,
    limits: TreeBudget,
    vary_threads: bool,
    settings: PolicySettings,
) -> Measurements:
    """Time the target's passes, the draft's levels and the transfer between them.

    Args:
        target: session of the target, which has read a prompt.
        drafter: drafter that has read the same prompt.
        token: id of any token of the vocabulary; all passes run over it.
        context: number of tokens of the text.
        limits: the largest tree that a round may ask for.
        vary_threads: whether to choose the number of torch threads too. The chosen number stays set afterwards.
        settings: which row counts are timed, and for how long.
    """
    end_s = time.perf_counter() + settings.probe_limit_s
    text = "measuring this machine for this pair"
    with tqdm(desc=text, unit="pass", leave=False, delay=1.0, disable=_is_unwatched()) as progress:

        def verify(nodes: int) -> float:
            tree = _tree(token, nodes, limits.depth, branches=target.supports_tree)

            def run() -> float:
                start_s = time.perf_counter()
                try:
                    target.score(tree)
                    return time.perf_counter() - start_s
                finally:
                    target.keep([])  # also after a pass that failed

            progress.update()
            return _seconds(run, end_s, settings)

        verify_s: dict[int, float] = {}
        threads = processors = None
        if vary_threads:
            rows = min(8, limits.nodes)  # the size of a usual tree; with fewer rows, fewer threads are busy
            threads, processors, seconds = choose_threads(lambda: verify(rows), settings)
            if seconds is not None:
                verify_s[rows] = seconds
        for number, nodes in enumerate(dict.fromkeys((*settings.probe_nodes, limits.nodes))):
            if nodes <= limits.nodes and nodes not in verify_s and (number < 2 or time.perf_counter() < end_s):
                verify_s[nodes] = verify(nodes)
        draft_end_s = end_s + 0.5 * settings.probe_limit_s
        draft_s, level_s = _draft_seconds(drafter, limits, draft_end_s, settings, branches=target.supports_tree)
    transfer_s = _transfer_seconds(drafter.device, settings)
    return Measurements(verify_s, level_s, draft_s, transfer_s, context, threads, processors)


def _is_unwatched() -> bool | None:
    """Return whether nobody sees a progress bar: in a thread, as in servers. None has tqdm look for a terminal."""
    return None if threading.current_thread() is threading.main_thread() else True


def choose_threads(
    run: Callable[[], float], settings: PolicySettings
) -> tuple[int, tuple[int, ...] | None, float | None]:
    """Choose the number of torch threads, up to the current number, and the NUMA node that they are bound to.

    The choice stays set. All choices are tried in turns, twice if a turn is short, and the best time of each counts,
    because another process may slow down one turn. The current number is kept unless another choice is clearly faster,
    and while other threads generate too: what is fastest for one generation is not for several.

    Args:
        run: returns the seconds of a pass with the current threads.
        settings: number of turns, and how much faster another choice must be.

    Returns:
        The number of threads; the processors to bind them to, or None; and the seconds of a pass with them, or None if
        nothing was chosen.
    """
    most = torch.get_num_threads()
    nodes = machine.numa_nodes()
    choices: list[tuple[int, tuple[int, ...] | None]] = [
        (count, None) for count in sorted({most, max(3 * most // 4, 1), max(most // 2, 1)}, reverse=True)
    ]
    if len(nodes) > 1:
        choices += [(min(most, len(node)), tuple(node)) for node in nodes]
    undisturbed = machine.watch()
    if len(choices) == 1 or not undisturbed():
        return *choices[0], None
    seconds = dict.fromkeys(choices, math.inf)
    for _ in range(settings.thread_turns):
        start_s = time.perf_counter()
        for choice in choices:
            with machine.thread_count(None):
                machine.use(*choice)
                seconds[choice] = min(seconds[choice], run())
            if not undisturbed():  # another thread began to generate: the current number is kept
                return *choices[0], None
        if time.perf_counter() - start_s > settings.thread_turn_s:
            break
    best = min(choices, key=lambda choice: seconds[choice] * (1.0 if choice == choices[0] else settings.thread_gain))
    if not machine.use(*best):
        return *choices[0], None
    return *best, seconds[best]


def _tree(token: int, nodes: int, depth: int, *, branches: bool) -> DraftTree:
    """Build a tree in which all tokens are equal: a path of at most `depth` nodes with branches, or a chain."""
    parents = torch.arange(nodes, device="cpu") - 1
    line = min(nodes // 2, depth)
    if branches and nodes > 2:
        parents[line + 1 :] = torch.arange(nodes - line - 1, device="cpu") % line
    depths = torch.zeros(nodes, dtype=torch.int64, device="cpu")
    for node in range(1, nodes):
        depths[node] = depths[parents[node]] + 1
    return DraftTree(torch.full((nodes,), token, device="cpu"), parents, depths, torch.zeros(nodes, device="cpu"))


def _seconds(run: Callable[[], float], end_s: float, settings: PolicySettings) -> float:
    """Return the median seconds of `run` after a first, cold call. A slow `run` is called less often, at least once."""
    elapsed: list[float] = []
    for _ in range(settings.probe_repeats + 1):
        elapsed.append(run())
        if time.perf_counter() > end_s or (len(elapsed) > 1 and sum(elapsed) > settings.probe_enough_s):
            break
    return statistics.median(elapsed[1:] or elapsed)


class _Width:
    """A judge that asks for levels of a fixed width."""

    def __init__(self, width: int, nodes: int) -> None:
        self._width, self._nodes = width, nodes

    def width(self, scores: np.ndarray) -> int:  # noqa: ARG002
        return self._width

    def rows(self, scores: np.ndarray) -> int:  # noqa: ARG002
        return self._nodes


def _draft_seconds(
    drafter: Drafter, limits: TreeBudget, end_s: float, settings: PolicySettings, *, branches: bool
) -> tuple[float, dict[int, float]]:
    """Return the seconds of a tree with one level, accepted tokens included, and of one more level by row count."""
    drafter.catch_up()
    top_k = limits.top_k if branches else 1
    nodes = min(limits.nodes, 16)

    def grow(depth: int, width: int) -> float:
        def run() -> float:
            start_s = time.perf_counter()
            drafter.grow(TreeBudget(nodes, depth, top_k), _Width(width, nodes))
            return time.perf_counter() - start_s

        return _seconds(run, end_s, settings)

    base_s = grow(1, 1)
    widths = [width for width in settings.probe_widths if width <= top_k]
    level_s = {width: max(grow(3, width) - base_s, 1e-6) / 2 for width in widths}
    accepted = level_s[min(4, widths[-1])]  # a pass over accepted tokens takes as long as one over as many nodes
    return base_s + accepted, level_s


def _transfer_seconds(device: torch.device, settings: PolicySettings) -> float:
    """Return the seconds of a typical transfer from the CPU to `device`; 0 for the CPU itself."""
    if device.type == "cpu":
        return 0.0
    block = torch.empty(settings.probe_transfer_bytes, dtype=torch.uint8).pin_memory()

    def copy() -> float:
        start_s = time.perf_counter()
        block.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start_s

    return _seconds(copy, time.perf_counter() + 0.1, settings)
