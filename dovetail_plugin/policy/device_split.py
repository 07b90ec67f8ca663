"""The device-split policy: which part runs on which device, and how many tokens to draft each round.

Enters: configs before loading, then measurements and the record of each round. Leaves: a `DevicePlan`, then a
`RoundPlan` for each round, which may be plain decoding. It times nothing and runs no model.
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
from ..report import Round
from ..tree import DraftTree, TreeBudget
from . import records
from .acceptance import AcceptanceCurve, prior
from .cost import CostModel, Forecast, Shape
from .measurements import Measurements
from .on_off import DraftingSwitch
from .planner import PLAIN, Measure, RoundPlan
from .settings import PolicySettings
from .tree_rule import TreeJudge

LIMITS = TreeBudget(nodes=48, depth=10, top_k=8)
"""The largest tree that the policy asks for."""


class DeviceSplitPolicy:
    """Plans where parts go, and chooses budgets from measurements; one object serves any number of generations.

    Args:
        vram_budget: GPU memory that the plan may use, as "4GiB" or bytes; None takes what is free on the first GPU, 0
            plans without a GPU.
        ram_budget: main memory that the plan may use; None takes all of it.
        limits: the largest tree of any round.
        threads: "auto" measures which number of torch threads verifies fastest, up to the number that is set;
            "keep" leaves it unchanged.
        measured_in: directory for measurements, which later processes read; None takes the user's cache directory
            (see `records.default_directory`).
        settings: constants of the policy; None takes the defaults.

    Raises:
        ValueError: `threads` is neither "auto" nor "keep", or a budget is not a valid size.
    """

    def __init__(
        self,
        *,
        vram_budget: str | int | None = None,
        ram_budget: str | int | None = None,
        limits: TreeBudget = LIMITS,
        threads: str = "auto",
        measured_in: str | Path | None = None,
        settings: PolicySettings | None = None,
    ) -> None:
        if threads not in ("auto", "keep"):
            raise ValueError(
                f'threads must be "auto" or "keep", got {threads!r}; use torch.set_num_threads for others.'
            )
        self.vram_budget_bytes = machine.free_vram_bytes() if vram_budget is None else parse_bytes(vram_budget)
        self.ram_budget_bytes = machine.memory_bytes() if ram_budget is None else parse_bytes(ram_budget)
        self.limits, self.threads, self.settings = limits, threads, settings or PolicySettings()
        self.measured_in = Path(measured_in) if measured_in is not None else records.default_directory()
        self.costs: dict[str, CostModel] = {}
        self.switches: dict[tuple[str, float], DraftingSwitch] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock: a copied draft has a copied policy, with everything learned so far."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def plan(
        self, target: str | PretrainedConfig, draft: str | PretrainedConfig | None = None, **options: Any
    ) -> DevicePlan:
        """Plan which part goes to which device, within this policy's budgets. Only configs are read.

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

    def planner(
        self,
        key: str,
        *,
        temperature: float,
        shape: Callable[[], Shape | None] = lambda: None,
        calibration: dict[str, list[float]] | None = None,
    ) -> "AdaptivePlanner":
        """Return the planner of one generation.

        Args:
            key: names target, draft and machine; what is learned is remembered under it.
            temperature: 0 is greedy.
            shape: returns the target's sizes, None if unknown; called once for a key, because it takes a while.
            calibration: of the draft's checkpoint; None if unknown.
        """
        with self._lock:
            place = (key, round(temperature, 1))
            if place not in self.switches:
                curve = AcceptanceCurve(prior(calibration, temperature, self.settings), self.settings)
                self.switches[place] = DraftingSwitch(curve, self.settings)
            return AdaptivePlanner(self, key, self.switches[place], shape, self._lock)


@dataclass
class AdaptivePlanner:
    """Plans the rounds of one generation by the policy's rule; what it learns belongs to the policy.

    The rule is one exchange rate: the tokens that a second is worth, which is the rate that generation reaches now. A
    level is drafted and a row is verified if the tokens that it is expected to bring are worth more than the seconds
    that it is expected to take. Rounds chosen like this maximize tokens over seconds in the long run (Dinkelbach's
    method for ratios, with the running rate as its estimate).

    Attributes:
        policy: keeps what is learned.
        key: names target, draft and machine.
        switch: whether drafting is on, and what is known of it.
        shape: returns sizes of the target.
        lock: guards the policy, which threads may share.
        limits: the largest tree.
    """

    policy: DeviceSplitPolicy
    key: str
    switch: DraftingSwitch
    shape: Callable[[], Shape | None]
    lock: Any
    limits: TreeBudget = field(init=False)

    def __post_init__(self) -> None:
        self.limits = self.policy.limits

    @property
    def cost(self) -> CostModel:
        """The latency model; exists after `prepare`."""
        return self.policy.costs[self.key]

    @property
    def drafting(self) -> bool:
        """See `RoundPlanner.drafting`."""
        return self.switch.rest == 0

    def prepare(self, measure: Measure) -> Measurements:
        """Measure this machine, unless this process or an earlier one has done so."""
        policy = self.policy
        with self.lock:
            if self.key not in policy.costs:
                measured = records.load(self.key, policy.measured_in)
                if measured is None:
                    measured = measure(policy.settings)
                    records.store(self.key, measured, policy.measured_in)
                policy.costs[self.key] = CostModel(measured, self.shape(), policy.settings)
            self.cost.last_nodes = None  # the prompt's pass came in between
            return self.cost.measured

    def plan(self, context: int, bound: TreeBudget) -> RoundPlan:
        """Let a `TreeJudge` decide within `bound`, or draft nothing while drafting rests."""
        with self.lock:
            if not self.drafting or bound.nodes < 2:
                return RoundPlan(PLAIN)
            cost, switch = self.cost, self.switch
            if switch.since % self.policy.settings.refit_every == 0:
                switch.lookahead.refresh(switch.curve)
            verify_s = cost.verify_table(context, bound.nodes) * cost.changed_table(bound.nodes)
            levels_s = cost.level_table(bound.top_k)
            return RoundPlan(
                bound, TreeJudge(bound, self._price(context), verify_s, levels_s, switch.curve, switch.lookahead)
            )

    def _price(self, context: int) -> float:
        """Tokens per second of drafted rounds, or of plain ones if these are faster; at first what is usual."""
        plain_rate = 1.0 / self.cost.plain_s(context)
        if not self.switch.seconds:
            return self.policy.settings.usual_gain * plain_rate
        return max(self.switch.rate(), plain_rate)

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast:
        """Forecast by the latency model and the judge's acceptance."""
        widths, tokens = (plan.judge.widths, plan.judge.expected) if plan.judge else (None, 1.0)
        with self.lock:
            return self.cost.forecast(widths, nodes, context, tokens)

    def observe(self, round_: Round, tree: DraftTree, path: list[int], forecast: Forecast | None) -> None:
        """Correct the latency model, the acceptance curve and the running rate."""
        assert forecast is not None
        switch = self.switch
        with self.lock:
            self.cost.observe(round_, forecast)
            if round_.widths is None:
                switch.rest = max(switch.rest - 1, 0)
                return
            accepted = np.zeros(len(tree), dtype=bool)
            accepted[path] = True
            scores = tree.scores.numpy()[1:]
            switch.curve.observe(scores, accepted[1:])
            seconds = min(round_.total_s, self.policy.settings.slowest * forecast.total_s)
            switch.count(round_.emitted, 1.0 + float(switch.curve(scores).sum()), seconds)
            switch.judge(1.0 / self.cost.plain_s(round_.context))
