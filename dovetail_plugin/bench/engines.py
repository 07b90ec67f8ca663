"""Compares engines that run the same weights: the cost of a pass over N rows, and tokens/s without and with a draft.

Takes loaded targets with a draft each, and returns an `EnginesResult` that prints as tables and as one JSON line.
Engines take turns pass by pass and prompt by prompt, so a slow period of the machine affects all of them alike. Passes
are compared with floors: what this machine needs to read the weights, and for the multiply-adds of the rows. How
targets are loaded is left to the caller.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from .provenance import provenance
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


@dataclass(frozen=True)
class Floors:
    """Milliseconds that a pass takes at least.

    Attributes:
        memory_ms: to read the weights once, whatever the number of rows.
        arithmetic_ms: by the number of rows; None where the engine's instructions are not known.
    """

    memory_ms: float
    arithmetic_ms: dict[int, float] | None

    def ms(self, rows: int) -> float:
        """Return the higher one of the two floors."""
        return max(self.memory_ms, self.arithmetic_ms[rows] if self.arithmetic_ms else 0.0)

    def limit(self, rows: int) -> str:
        """Return the name of the higher one: "memory" or "arithmetic"."""
        return "memory" if self.ms(rows) == self.memory_ms else "arithmetic"


@dataclass(frozen=True)
class Passes:
    """Median milliseconds of passes, by engine and by number of rows.

    Attributes:
        pass_ms: whole passes.
        kernels_ms: the products of the CPU kernels in these passes, for engines that use them.
        other_ms: the rest of the same passes: attention, norms, quantizing activations, Python.
    """

    pass_ms: dict[str, dict[int, float]]
    kernels_ms: dict[str, dict[int, float]]
    other_ms: dict[str, dict[int, float]]


@dataclass
class EnginesResult:
    """Figures of all engines.

    Attributes:
        context: tokens in the cache before each timed pass.
        parameters: number of parameters of the target.
        multiply_adds: of a row, in the linear layers.
        roofline: limits of this machine; None without the library of CPU kernels.
        passes: times of passes. "torch" is transformers alone.
        floors: by engine, for those whose weights are known.
        texts: by engine: speeds of whole generations. All but "torch" and those without drafts.
        plain_tokens_per_s: by engine without drafts: its median speed.
        settings: what was measured.
    """

    context: int
    parameters: int
    multiply_adds: int
    roofline: Roofline | None
    passes: Passes
    floors: dict[str, Floors]
    texts: dict[str, BenchResult]
    plain_tokens_per_s: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def differences(self) -> int:
        """Number of texts with a draft that differ from plain ones other than at a tie."""
        return sum(text.differences for text in self.texts.values())

    def table(self) -> str:
        """The result as Markdown tables whose columns are aligned."""
        parts = [] if self.roofline is None else [self.roofline.lines()]
        parts += [
            aligned(rows) for rows in (self._passes(), self._floors(), self._others(), self._speeds()) if rows[1:]
        ]
        return "\n\n".join(parts)

    def json_line(self) -> str:
        """All figures with command, versions and machine, as one line of JSON."""
        return json.dumps(asdict(self) | provenance())

    def _passes(self) -> list[list[str]]:
        rows, pass_ms = self._row_counts(), self.passes.pass_ms
        most = 8 if 8 in rows else rows[-1]
        lines = [[f"ms per pass, {self.context} tokens of context", *(f"N={n}" for n in rows), f"V({most})/V(1)"]]
        for name, ms in pass_ms.items():
            lines.append([name, *(f"{ms[n]:.1f}" for n in rows), f"{ms[most] / ms[rows[0]]:.2f}"])
        return lines

    def _floors(self) -> list[list[str]]:
        rows = self._row_counts()
        lines = [["times the floor (m: memory, a: arithmetic)", *(f"N={n}" for n in rows), "memory floor, ms"]]
        for name, floors in self.floors.items():
            times = (f"{self.passes.pass_ms[name][n] / floors.ms(n):.2f} {floors.limit(n)[0]}" for n in rows)
            lines.append([name, *times, f"{floors.memory_ms:.1f}"])
        return lines

    def _others(self) -> list[list[str]]:
        rows = self._row_counts()
        lines = [["ms of a pass outside of the kernels", *(f"N={n}" for n in rows)]]
        return lines + [[name, *(f"{ms[n]:.1f}" for n in rows)] for name, ms in self.passes.other_ms.items()]

    def _speeds(self) -> list[list[str]]:
        columns = ["engine", "budget", "plain tokens/s", "draft tokens/s", "ratio to own plain", "ratio to torch plain"]
        lines = [[*columns, "acceptance length", "draft ms", "verify ms", "accept ms", "texts"]]
        first = next(iter(self.texts.values())).plain_tokens_per_s
        for name, text in self.texts.items():
            phases = (f"{text.phase_ms_per_round[phase]:.1f}" for phase in ("draft", "verify", "accept"))
            speeds = f"{text.plain_tokens_per_s:.1f}", f"{text.draft_tokens_per_s:.1f}"
            ratios = f"{text.ratio:.2f}", f"{text.draft_tokens_per_s / first:.2f}", f"{text.acceptance_length:.2f}"
            lines.append([name, str(text.settings["budget"]), *speeds, *ratios, *phases, text.about_texts()])
        for name, speed in self.plain_tokens_per_s.items():
            lines.append([name, "-", f"{speed:.1f}", "-", "-", f"{speed / first:.2f}", *"-----"])
        return lines

    def _row_counts(self) -> list[int]:
        return list(next(iter(self.passes.pass_ms.values())))


def aligned(rows: list[list[str]]) -> str:
    """Return rows of cells, the first one with the titles, as a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


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
