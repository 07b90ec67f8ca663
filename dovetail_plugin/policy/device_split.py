"""The device-split policy: what lives where, and how many tokens to draft each round, from what this machine can do.

Enters: configs before loading, then measurements and what each round brought. Leaves: a `DevicePlan`, then a
`RoundPlan` for each round (`rounds.py` has the rule), plain decoding among them. It times nothing and runs no model.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from .. import machine
from ..drafts.known_pairs import LOOKUP
from ..planning.device_plan import DevicePlan, parse_bytes
from ..planning.draft_config import load_draft_config
from ..planning.known_shapes import load_config
from ..planning.make_plan import make_plan
from ..tree import TreeBudget
from . import records
from .acceptance import AcceptanceCurve, prior
from .cost import CostModel, Shape
from .measurements import Measurements
from .on_off import Mode
from .rounds import PLAIN, Forecast, Outcome, RoundPlan
from .tree_rule import TreeJudge

LIMITS = TreeBudget(nodes=48, depth=10, top_k=8)
"""The largest tree that the policy asks for."""

USUAL_GAIN = 1.7
"""Rate of drafted rounds to plain ones that is taken for granted until a round has shown another."""

REFRESH = 4
"""Rounds that judge by the same tables of seconds."""


class DeviceSplitPolicy:
    """Plans where parts go, and chooses budgets from measurements; one object serves any number of generations.

    Args:
        vram_budget: of the GPU that the plan may use, as "4GiB" or bytes; None takes what is free on the first one, 0
            plans without a GPU.
        ram_budget: of the machine; None takes all that it has.
        limits: the largest tree to ask for.
        threads: "auto" measures which number of torch threads verifies fastest, up to the number that is set;
            "keep" leaves it alone.
        measured_in: directory for measurements, found again by later processes; None takes the user's cache
            directory (see `records.default_directory`).

    Raises:
        ValueError: `threads` is neither; a budget is no size.
    """

    def __init__(
        self,
        *,
        vram_budget: str | int | None = None,
        ram_budget: str | int | None = None,
        limits: TreeBudget = LIMITS,
        threads: str = "auto",
        measured_in: str | Path | None = None,
    ) -> None:
        if threads not in ("auto", "keep"):
            raise ValueError(
                f'threads must be "auto" or "keep", got {threads!r}; use torch.set_num_threads for others.'
            )
        self.vram_budget_bytes = machine.free_vram_bytes() if vram_budget is None else parse_bytes(vram_budget)
        self.ram_budget_bytes = machine.memory_bytes() if ram_budget is None else parse_bytes(ram_budget)
        self.limits, self.threads = limits, threads
        self.measured_in = Path(measured_in) if measured_in is not None else records.default_directory()
        self.costs: dict[str, CostModel] = {}
        self.modes: dict[tuple[str, float], Mode] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock: a copy of a draft brings a policy of its own, which knows what this one knew."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def plan(
        self, target: str | PretrainedConfig, draft: str | PretrainedConfig | None = None, **options: Any
    ) -> DevicePlan:
        """What goes where, within this policy's budgets, from configs alone: nothing is loaded.

        Args:
            target: a config, or what `load_config` takes: an id, a directory, the name of a known shape.
            draft: a config, what `load_draft_config` takes, or "lookup"; None plans for an untrained one of one block.
            options: `dtype`, `draft_dtype`, `context` and others of `make_plan`.

        Raises:
            ValueError: the target does not fit, with what would help; see `make_plan`.
        """
        target = load_config(target) if isinstance(target, str) else target
        draft = load_draft_config(draft) if isinstance(draft, str) and draft != LOOKUP else draft
        options.setdefault("gpu_supports_bf16", machine.gpu_supports_bf16())
        options.setdefault("max_nodes", self.limits.nodes)
        return make_plan(target, draft, vram_bytes=self.vram_budget_bytes, ram_bytes=self.ram_budget_bytes, **options)

    def rounds(
        self,
        key: str,
        *,
        temperature: float,
        shape: Callable[[], Shape | None] = lambda: None,
        calibration: dict[str, list[float]] | None = None,
    ) -> "AdaptiveRounds":
        """For one generation.

        Args:
            key: of target, draft and machine; what was learnt is remembered under it.
            temperature: 0 is greedy.
            shape: gives the target's, None if unknown; called once for a key, since counting parameters takes a while.
            calibration: of the draft's checkpoint; None if unknown.
        """
        with self._lock:
            mode = self.modes.setdefault(
                (key, round(temperature, 1)), Mode(AcceptanceCurve(prior(calibration, temperature)))
            )
        return AdaptiveRounds(self, key, mode, shape, self._lock)


@dataclass
class AdaptiveRounds:
    """Budgets of one generation, by the policy's rule. What it learns is the policy's."""

    policy: DeviceSplitPolicy
    key: str
    mode: Mode
    shape: Callable[[], Shape | None]
    lock: Any
    limits: TreeBudget = field(init=False)
    _tables: tuple[TreeBudget, np.ndarray, np.ndarray] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.limits = self.policy.limits

    @property
    def cost(self) -> CostModel:
        """Known after `prepare`."""
        return self.policy.costs[self.key]

    @property
    def drafting(self) -> bool:
        return self.mode.rest == 0

    def prepare(self, measure: Callable[[], Measurements]) -> Measurements:
        with self.lock:
            if self.key not in self.policy.costs:
                directory = self.policy.measured_in
                measured = records.load(self.key, directory)
                if measured is None:
                    measured = measure()
                    records.store(self.key, measured, directory)
                self.policy.costs[self.key] = CostModel(measured, self.shape())
            self.cost.last_nodes = None  # the prompt was read
            return self.cost.measured

    def next(self, context: int, bound: TreeBudget) -> RoundPlan:
        with self.lock:
            if not self.drafting or bound.nodes < 2:
                return RoundPlan(PLAIN)
            fresh = self._tables is None or self.cost.rounds % REFRESH == 0 or self._tables[0] != bound
            if fresh:
                verify_s = self.cost.verify_table(context, bound.nodes)
                self._tables = bound, verify_s, self.cost.level_table(bound.top_k)
            assert self._tables is not None
            switch = self.cost.switch_table(bound.nodes)
            judge = TreeJudge(
                bound, self._price(context), *self._tables[1:], self.mode.curve, self.mode.lookahead, switch
            )
            if fresh:
                self.mode.lookahead.refresh(self.mode.curve)
            return RoundPlan(bound, judge)

    def _price(self, context: int) -> float:
        """Tokens a second: of drafted rounds, or of plain ones if these are faster; at first what is usual."""
        plain_rate = 1.0 / self.cost.plain_s(context)
        return max(self.mode.rate(), plain_rate) if self.mode.seconds else USUAL_GAIN * plain_rate

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast:
        widths, tokens = (plan.judge.widths, plan.judge.expected) if plan.judge else (None, 1.0)
        with self.lock:
            return Forecast(self.cost.round(widths, nodes, context, tokens), tokens)

    def observe(self, outcome: Outcome, forecast: Forecast) -> None:
        assert forecast.cost is not None and forecast.tokens is not None
        mode, emitted = self.mode, len(outcome.acceptance.tokens)
        with self.lock:
            self.cost.observe(
                forecast.cost,
                outcome.seconds,
                nodes=len(outcome.tree),
                context=outcome.context,
                tokens=emitted,
                drafted=outcome.drafted,
            )
            if not outcome.drafted:
                mode.rest = max(mode.rest - 1, 0)
                return
            scores, accepted = outcome.nodes()
            mode.curve.observe(scores, accepted)
            seconds = min(sum(outcome.seconds.values()), 3 * forecast.cost.total_s)
            mode.count(emitted, 1.0 + float(mode.curve(scores).sum()), seconds)
            mode.judge(1.0 / self.cost.plain_s(outcome.context))
