"""Measures this machine with the real models, in seconds.

Enters: a target that has read its prompt and a drafter that has, too. Leaves: `Measurements`; the text is as it was,
since every row that a probe appends is dropped again. What the numbers mean is `cost.py`'s business.
"""

import math
import statistics
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

NODES = (1, 8, 4, 16, 2, 32)
"""Rows of the passes that are timed, in this order, until time is up; the first two always."""

WIDTHS = (1, 2, 4, 8, 16)
"""Rows of the draft levels that are timed, as far as the budget goes."""

LIMIT_S = 5.0
"""Seconds that a probe may take; slower targets take what their first passes take."""

REPEATS = 5
"""Times that a quick pass is repeated."""


TURNS, QUICK_S = 2, 1.0
"""Times that all numbers of threads are tried, if a turn does not take longer than so many seconds."""


def measure(
    target: TargetSession,
    drafter: Drafter,
    *,
    token: int,
    context: int,
    limits: TreeBudget,
    vary_threads: bool,
    limit_s: float = LIMIT_S,
) -> Measurements:
    """Time the target's passes, the draft's levels and the way between them.

    Args:
        target, drafter: both have read the same prompt.
        token: of the vocabulary; what passes are run over.
        context: tokens of the text.
        limits: the largest tree that will be asked for.
        vary_threads: whether torch's threads decide the speed of passes: then their number is chosen, too, and
            stays in force when this returns.
    """
    end_s = time.perf_counter() + limit_s
    with tqdm(desc="measuring this machine, once", unit="pass", leave=False, delay=1.0) as progress:

        def verify(nodes: int) -> float:
            tree = _tree(token, nodes, limits.depth, branches=target.supports_tree)

            def run() -> float:
                start_s = time.perf_counter()
                try:
                    target.score(tree)
                    return time.perf_counter() - start_s
                finally:
                    target.keep([])  # of a pass that failed half-way, too

            progress.update()
            return _seconds(run, end_s)

        verify_s: dict[int, float] = {}
        threads = processors = None
        if vary_threads:
            rows = min(8, limits.nodes)  # about what trees have: fewer rows keep fewer threads busy
            threads, processors, seconds = choose_threads(lambda: verify(rows))
            if seconds is not None:
                verify_s[rows] = seconds
        for number, nodes in enumerate(dict.fromkeys((*NODES, limits.nodes))):
            if nodes <= limits.nodes and nodes not in verify_s and (number < 2 or time.perf_counter() < end_s):
                verify_s[nodes] = verify(nodes)
        draft_s, level_s = _draft_seconds(drafter, limits, end_s + 0.5 * limit_s, branches=target.supports_tree)
    transfer_s = _transfer_seconds(drafter.device)
    return Measurements(verify_s, level_s, draft_s, transfer_s, context, threads, processors)


def choose_threads(run: Callable[[], float]) -> tuple[int, tuple[int, ...] | None, float | None]:
    """The fastest number of torch threads, up to what is set, and the NUMA node to keep them on, if that helps.

    Leaves it in force. All are tried in turns, twice where that is quick, and the best of each counts: another process
    slows whoever runs beside it. A smaller number must win by five per cent.

    Args:
        run: seconds of a pass with what is set when it is called.

    Returns:
        threads, processors to keep them on or None, and seconds of a pass so; None if there was nothing to choose.
    """
    most = torch.get_num_threads()
    nodes = machine.numa_nodes()
    choices: list[tuple[int, tuple[int, ...] | None]] = [
        (count, None) for count in sorted({most, max(3 * most // 4, 1), max(most // 2, 1)}, reverse=True)
    ]
    if len(nodes) > 1:
        choices += [(min(most, len(node)), tuple(node)) for node in nodes]
    if len(choices) == 1:
        return *choices[0], None
    seconds = dict.fromkeys(choices, math.inf)
    for _ in range(TURNS):
        start_s = time.perf_counter()
        for choice in choices:
            with machine.thread_count(None):
                machine.use(*choice)
                seconds[choice] = min(seconds[choice], run())
        if time.perf_counter() - start_s > QUICK_S:
            break
    best = min(choices, key=lambda choice: seconds[choice] * (1.0 if choice == choices[0] else 1.05))
    machine.use(*best)
    return *best, seconds[best]


def _tree(token: int, nodes: int, depth: int, *, branches: bool) -> DraftTree:
    """A tree of equal tokens: a line of up to `depth` nodes below the root, the others beside them; or a chain."""
    parents = torch.arange(nodes) - 1
    line = min(nodes // 2, depth)
    if branches and nodes > 2:
        parents[line + 1 :] = torch.arange(nodes - line - 1) % line
    depths = torch.zeros(nodes, dtype=torch.int64)
    for node in range(1, nodes):
        depths[node] = depths[parents[node]] + 1
    return DraftTree(torch.full((nodes,), token), parents, depths, torch.zeros(nodes))


def _seconds(run: Callable[[], float], end_s: float) -> float:
    """Median of the seconds that `run` returns, warmed up; only once where it is slow or time is up."""
    elapsed: list[float] = []
    for _ in range(REPEATS + 1):
        elapsed.append(run())
        if time.perf_counter() > end_s or (len(elapsed) > 1 and sum(elapsed) > 0.25):
            break
    return statistics.median(elapsed[1:] or elapsed)


class _Width:
    """A judge that asks for levels of one width."""

    def __init__(self, width: int, nodes: int) -> None:
        self._width, self._nodes = width, nodes

    def width(self, scores: np.ndarray) -> int:  # noqa: ARG002
        return self._width

    def rows(self, scores: np.ndarray) -> int:  # noqa: ARG002
        return self._nodes


def _draft_seconds(
    drafter: Drafter, limits: TreeBudget, end_s: float, *, branches: bool
) -> tuple[float, dict[int, float]]:
    """Seconds of a tree of one level, with running what was accepted, and of one more level by its rows."""
    drafter.catch_up()
    top_k = limits.top_k if branches else 1
    nodes = min(limits.nodes, 16)

    def grow(depth: int, width: int) -> float:
        def run() -> float:
            start_s = time.perf_counter()
            drafter.grow(TreeBudget(nodes, depth, top_k), _Width(width, nodes))
            return time.perf_counter() - start_s

        return _seconds(run, end_s)

    base_s = grow(1, 1)
    widths = [width for width in WIDTHS if width <= top_k]
    level_s = {width: max(grow(3, width) - base_s, 1e-6) / 2 for width in widths}
    accepted = level_s[min(4, widths[-1])]  # a pass over some accepted rows is like one over as many nodes
    return base_s + accepted, level_s


def _transfer_seconds(device: torch.device) -> dict[int, float]:
    """Bytes -> seconds from the CPU to `device`."""
    if device.type == "cpu":
        return {0: 0.0}
    seconds = {}
    for size in (1 << 14, 1 << 20):
        block = torch.empty(size, dtype=torch.uint8).pin_memory()

        def copy(block: torch.Tensor = block) -> float:
            start_s = time.perf_counter()
            block.to(device, non_blocking=True)
            torch.cuda.synchronize(device)
            return time.perf_counter() - start_s

        seconds[size] = _seconds(copy, time.perf_counter() + 0.1)
    return seconds
