"""Compares engines that run the same weights: the cost of a pass over N rows, and tokens/s without and with a draft.

Takes loaded targets with a draft each, and returns an `EnginesResult`.
Engines take turns pass by pass and prompt by prompt, so a slow period of the machine affects all of them alike. Passes
are compared with floors: what this machine needs to read the weights, and for the multiply-adds of the rows. How
targets are loaded is left to the caller.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..compat import CACHE, DynamicCache
from ..drafts.base import Draft
from ..kernels.library import Library
from ..kernels.linear import PackedLinear
from ..targets.base import TargetSession
from ..targets.engine import engine_of
from ..tree import DraftTree, TreeBudget
from .compare import BenchResult, Comparison, Run
from .engines_result import EnginesResult, Floors, Passes
from .roofline import Roofline, kernel_time, measure

ROWS = (1, 2, 4, 8, 16, 32)
"""Row counts whose passes are timed."""

CONTEXT = 128
"""Tokens in the cache before each timed pass, by default."""

TimedPass = Callable[[int], float]
"""Runs a pass over this many rows behind the context and returns its seconds."""


@dataclass
class Contender:
    """One engine in the comparison.

    Attributes:
        name: names the engine in the tables.
        target: the target on this engine.
        draft: a draft for this target only.
        budget: fixed budget of all rounds. None leaves it to the policy.
        weight_bytes: bytes of its linear layers' weights; None if they are not known.
        kind: kind of its weights; names the instructions of its arithmetic floor. None without such a floor.
    """

    name: str
    target: Any
    draft: Draft
    budget: TreeBudget | None
    weight_bytes: int | None
    kind: str | None


class PlainEngine(Protocol):
    """An engine without drafts.

    Attributes:
        name: names the engine in the tables.
        weight_bytes: bytes of its linear layers' weights.
    """

    name: str
    weight_bytes: int

    def pass_behind(self, ids: Tensor) -> TimedPass:
        """Return timed passes behind `ids` (1, T) int64."""

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Run:
        """Generate greedily from a prompt (1, T) int64."""


# --- the comparison ----------------------------------------------------------------------------------


def compare_engines(
    contenders: Sequence[Contender],
    stock: Any,
    prompts: Sequence[Tensor],
    options: dict[str, Any],
    *,
    kernels: Library | None,
    others: Sequence[PlainEngine] = (),
    context: int = CONTEXT,
    repeats: int = 9,
    row_counts: Sequence[int] = ROWS,
    seed: int = 0,
    measure_limits: Callable[[Library], Roofline] = measure,
) -> EnginesResult:
    """Measure the limits of the machine, the passes of all engines, and their speeds.

    Args:
        contenders: at least one. The first one runs `stock` in torch.
        stock: the target in torch.
        prompts: at least one, each (1, T) int64.
        options: keyword arguments of `generate`.
        kernels: the library of CPU kernels, or None where it is missing.
        others: engines without drafts.
        context: tokens in the cache before each timed pass.
        repeats: timed passes of each engine for each number of rows.
        row_counts: numbers of rows, in ascending order.
        seed: for sampling; see `Comparison`.
        measure_limits: measures the machine, before and after the passes. The higher limits count.

    Raises:
        InputError: there is not enough free memory to measure the read bandwidth.
    """
    limits = None if kernels is None else measure_limits(kernels)
    passes = time_passes(contenders, stock, kernels, others, context=context, repeats=repeats, row_counts=row_counts)
    if kernels is not None and limits is not None:
        limits = limits.best_of(measure_limits(kernels))
    texts, plain = speeds(contenders, others, prompts, options, seed=seed)
    multiply_adds = linear_numbers(stock)
    floors = {} if limits is None else floors_of(contenders, multiply_adds, limits, row_counts)
    if limits is not None:
        floors |= {one.name: Floors(limits.memory_ms(one.weight_bytes), None) for one in others}
    return EnginesResult(context, stock.num_parameters(), multiply_adds, limits, passes, floors, texts, plain)


def linear_numbers(model: nn.Module) -> int:
    """Return the number of weights in the linear layers of a model, which is its multiply-adds of a row.

    The experts of MoE models are not counted, packed or not: a pass reads those that its rows choose.
    """
    return sum(module.weight.numel() for module in _linear_layers(model))


def linear_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that `linear_numbers` counts, packed or not."""
    layers = _linear_layers(model)
    return sum(
        (one.weight if getattr(one, "packed_weight", None) is None else one.packed_weight).nbytes for one in layers
    )


def _linear_layers(model: nn.Module) -> list[Any]:
    of_experts = [module for module in model.modules() if "expert" in type(module).__name__.lower()]
    experts = {one for module in of_experts for one in module.modules()}
    return [one for one in model.modules() if isinstance(one, nn.Linear | PackedLinear) and one not in experts]


def floors_of(
    contenders: Sequence[Contender], multiply_adds: int, limits: Roofline, row_counts: Sequence[int]
) -> dict[str, Floors]:
    """Return the floors of all engines whose weights are known; `multiply_adds` is for one row."""
    floors = {}
    for contender in contenders:
        if contender.weight_bytes is None:
            continue
        arithmetic = {rows: limits.arithmetic_ms(rows * multiply_adds, contender.kind) for rows in row_counts}
        known = {rows: ms for rows, ms in arithmetic.items() if ms is not None}
        floors[contender.name] = Floors(limits.memory_ms(contender.weight_bytes), known or None)
    return floors


# --- passes ------------------------------------------------------------------------------------------


def stock_pass(model: Any, ids: Tensor) -> TimedPass:
    """Return timed passes behind `ids` (1, T) with transformers' own cache."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, **{CACHE: cache})

    def timed(rows: int) -> float:
        with torch.inference_mode():
            start_s = time.perf_counter()
            model(input_ids=tokens_of(model.config, rows, 5)[None], use_cache=True, **{CACHE: cache})
            seconds = time.perf_counter() - start_s
            cache.crop(-rows)
        return seconds

    return timed


def session_pass(session: TargetSession, config: Any, ids: Tensor) -> TimedPass:
    """Return timed passes behind `ids` (1, T) in a session of a target, which verifies chains."""
    session.prefill(ids, None)

    def timed(rows: int) -> float:
        tree = DraftTree.chain(tokens_of(config, rows, 5).tolist())
        start_s = time.perf_counter()
        session.score(tree)
        seconds = time.perf_counter() - start_s
        session.keep([0])
        return seconds

    return timed


def tokens_of(config: Any, count: int, first: int) -> Tensor:
    """Return (count,) int64 tokens of the vocabulary, most of them different."""
    return torch.arange(first, first + count) % config.get_text_config(decoder=True).vocab_size


def time_passes(
    contenders: Sequence[Contender],
    stock: Any,
    kernels: Library | None,
    others: Sequence[PlainEngine] = (),
    *,
    context: int,
    repeats: int,
    row_counts: Sequence[int],
) -> Passes:
    """Time the passes of all engines in turns; see `compare_engines` for the arguments."""
    ids = tokens_of(stock.config, context, 5)[None]
    whole: dict[tuple[str, int], list[float]] = defaultdict(list)
    inside: dict[tuple[str, int], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        passes = {"torch": stock_pass(stock, ids)}
        for contender in contenders:
            engine = engine_of(contender.target)
            session = stack.enter_context(engine.session(engine.cache(None), max_nodes=max(row_counts)))
            passes[contender.name] = session_pass(session, contender.target.config, ids)
        passes |= {one.name: one.pass_behind(ids) for one in others}
        own = stack.enter_context(kernel_time(kernels))
        for repeat in tqdm(range(repeats + 1), desc="passes", unit="turn"):
            for name, timed in passes.items():
                for rows in row_counts:
                    before = own.seconds
                    seconds = timed(rows)
                    if repeat:  # the first turn warms up
                        whole[name, rows].append(1e3 * seconds)
                        inside[name, rows].append(1e3 * (own.seconds - before))
    using = [name for name in passes if any(inside[name, rows][0] for rows in row_counts)]
    rest = {key: [a - b for a, b in zip(whole[key], inside[key], strict=True)] for key in whole}
    return Passes(_medians(whole, passes), _medians(inside, using), _medians(rest, using))


def _medians(measured: dict[tuple[str, int], list[float]], names: Iterable[str]) -> dict[str, dict[int, float]]:
    return {
        name: {rows: statistics.median(values) for (one, rows), values in measured.items() if one == name}
        for name in names
    }


# --- texts -------------------------------------------------------------------------------------------


def speeds(
    contenders: Sequence[Contender],
    others: Sequence[PlainEngine],
    prompts: Sequence[Tensor],
    options: dict[str, Any],
    *,
    seed: int = 0,
) -> tuple[dict[str, BenchResult], dict[str, float]]:
    """Generate all prompts (1, T) on all engines, in turns, without and with the draft.

    Returns:
        The figures of the contenders, and the median tokens/s of the engines without drafts.
    """
    plain: dict[str, list[float]] = {one.name: [] for one in others}
    comparisons = {one.name: Comparison(one.target, one.draft, options, seed=seed) for one in contenders}
    for contender in contenders:
        contender.draft.budget = contender.budget
        comparisons[contender.name].warm_up(prompts[0])
    for input_ids in tqdm(prompts, desc="texts", unit="prompt"):
        for comparison in comparisons.values():
            comparison.add(input_ids)
        for one in others:
            plain[one.name].append(one.generate(input_ids, options["max_new_tokens"]).tokens_per_s)
    texts = {one.name: comparisons[one.name].result(budget=str(one.budget or "policy")) for one in contenders}
    return texts, {name: statistics.median(values) for name, values in plain.items()}
