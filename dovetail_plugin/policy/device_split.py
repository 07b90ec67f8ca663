"""The device-split policy: which part runs on which device, and how many tokens to draft in each round.

Before loading, `DeviceSplitPolicy.plan` turns two configs into a `DevicePlan`. During a generation, an
`AdaptivePlanner` turns measurements and the records of finished rounds into a `RoundPlan` for the next one, which can
be plain decoding. The module measures no time and runs no model.
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

UNMEASURED = TreeBudget(nodes=8, depth=4, top_k=4)
"""The largest tree of a call that has no time to measure the machine. It is small, so that a round cannot cost much."""


class DeviceSplitPolicy:
    """Decides where parts run and how large the tree of each round is.

    One policy can serve many generations, also at the same time. They learn from each other's rounds.

    Args:
        vram_budget: GPU memory that a plan may use, as text ("4GiB") or in bytes. None uses the memory that is free on
            the first GPU; 0 plans without a GPU.
        ram_budget: main memory that a plan may use, as text or in bytes. None uses all memory of the machine.
        limits: the largest tree that a round may draft.
        threads: "auto" measures which number of torch threads verifies fastest, up to the current number. "keep" leaves
            the number unchanged.
        measured_in: directory in which measurements are kept for later processes. None uses the directory that
            `DOVETAIL_CACHE` names, or `dovetail` beside the cache of the hub.
        settings: constants of the policy; None uses the defaults.

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
                f'threads must be "auto" or "keep", got {threads!r}. Set another number with torch.set_num_threads.'
            )
        self.vram_budget_bytes = machine.free_vram_bytes() if vram_budget is None else parse_bytes(vram_budget)
        self.ram_budget_bytes = machine.memory_bytes() if ram_budget is None else parse_bytes(ram_budget)
        self.limits, self.threads, self.settings = limits, threads, settings or PolicySettings()
        self.measured_in = Path(measured_in) if measured_in is not None else records.default_directory()
        self._start_anew()

    def _start_anew(self) -> None:
        """Make what generations of this process share: measurements, a lock, and the keys that one is measuring."""
        self.costs: dict[str, CostModel] = {}
        self.switches: dict[tuple[str, float], DraftingSwitch] = {}
        self._lock = threading.RLock()
        self._measuring: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what generations of this process share, so that copies of a draft do not depend on what it did."""
        shared = ("costs", "switches", "_lock", "_measuring")
        return {name: value for name, value in vars(self).items() if name not in shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_anew()

    def plan(
        self, target: str | PretrainedConfig, draft: str | PretrainedConfig | None = None, **options: Any
    ) -> DevicePlan:
        """Plan which part goes to which device, within the budgets of this policy. Only configs are read.

        Args:
            target: config of the target, or a hub id, directory or name of a known shape (see `load_config`).
            draft: config of the draft, its hub id or directory, or "lookup". None plans for an untrained draft with one
                block.
            options: arguments of `make_plan`, for example `dtype`, `draft_dtype` and `context`.

        Returns:
            The plan, which `planning.apply.apply_plan` applies to a loaded pair.

        Raises:
            ValueError: the target does not fit. The message says what would help. See `make_plan` for other reasons.
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
            key: identifies target, draft and machine. The policy remembers what it learns under this key.
            temperature: temperature of sampling; 0 is greedy decoding.
            shape: returns the sizes of the target, or None if they are unknown. Called once for each key, because it
                takes a while.
            calibration: acceptance rates from the draft's checkpoint; None if it has none.
        """
        with self._lock:
            place = (key, round(temperature, 1))
            if place not in self.switches:
                curve = AcceptanceCurve(prior(calibration, temperature, self.settings), self.settings)
                self.switches[place] = DraftingSwitch(curve, self.settings)
            return AdaptivePlanner(self, key, self.switches[place], shape, self._lock, self._measuring)


@dataclass
class AdaptivePlanner:
    """Plans the rounds of one generation by the rule of the policy, which keeps all that is learned.

    The rule uses one exchange rate: a second is worth as many tokens as generation currently makes in a second. A level
    is drafted and a row is verified if it is expected to bring more tokens than its seconds are worth. In the long run
    such rounds maximize tokens per second (Dinkelbach's method for ratios, with the running rate as its estimate).

    Attributes:
        policy: keeps measurements and everything learned.
        key: identifies target, draft and machine.
        switch: decides whether rounds draft; contains the acceptance curve.
        shape: returns the sizes of the target, or None.
        lock: guards the policy, which several threads may share. It is not held while anything is measured.
        measuring: keys that a thread is measuring for this policy.
        limits: the largest tree of any round.
        unmeasured: whether rounds draft without measurements, because there was no time for them.
    """

    policy: DeviceSplitPolicy
    key: str
    switch: DraftingSwitch
    shape: Callable[[], Shape | None]
    lock: Any
    measuring: set[str]
    limits: TreeBudget = field(init=False)
    unmeasured: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.limits = self.policy.limits

    @property
    def cost(self) -> CostModel:
        """The latency model. It exists when a `prepare` has returned measurements, in whatever thread."""
        return self.policy.costs[self.key]

    @property
    def drafting(self) -> bool:
        """Whether the next round will draft. It will not while drafting rests."""
        return self.switch.rest == 0

    def prepare(self, measure: Measure | None) -> Measurements | None:
        """Return the measurements of this machine, and make them if neither this process nor an earlier one has.

        While another thread makes them, this generation does not wait: it gets None, and its rounds are plain until
        they are there. Without `measure` they draft small trees (`UNMEASURED`).
        Measurements that other generations have disturbed are not stored for later processes.
        """
        policy = self.policy
        with self.lock:
            if self.key in policy.costs:
                self.cost.last_nodes = None  # the pass over the prompt came in between
                return self.cost.measured
            if self.key in self.measuring:
                return None
            self.measuring.add(self.key)
        try:
            measured = records.load(self.key, policy.measured_in)
            if measured is None:
                if measure is None:
                    self.unmeasured = True
                    return None
                undisturbed = machine.watch()
                measured = measure(policy.settings)
                if undisturbed():
                    records.store(self.key, measured, policy.measured_in)
            cost = CostModel(measured, self.shape(), policy.settings)
            with self.lock:
                policy.costs[self.key] = cost
            return measured
        finally:
            with self.lock:
                self.measuring.discard(self.key)

    def plan(self, context: int, bound: TreeBudget) -> RoundPlan:
        """Plan a tree within `bound` that a `TreeJudge` shapes.

        The round is plain while drafting rests, and while another thread measures this machine. Without measurements
        the tree has no judge.
        """
        with self.lock:
            measured = self.key in self.policy.costs
            if not (measured or self.unmeasured) or not self.drafting or bound.nodes < 2:
                return RoundPlan(PLAIN)
            if not measured:
                return RoundPlan(bound.within(UNMEASURED))
            cost, switch = self.cost, self.switch
            if switch.since % self.policy.settings.refit_every == 0:
                switch.lookahead.refresh(switch.curve)
            verify_s = cost.verify_table(context, bound.nodes) * cost.changed_table(bound.nodes)
            levels_s = cost.level_table(bound.top_k)
            return RoundPlan(
                bound, TreeJudge(bound, self._price(context), verify_s, levels_s, switch.curve, switch.lookahead)
            )

    def _price(self, context: int) -> float:
        """Return the tokens that a second is worth: the rate of drafted rounds, or of plain ones if they are faster.

        Before the first drafted round, a usual gain over plain rounds is assumed.
        """
        plain_rate = 1.0 / self.cost.plain_s(context)
        if not self.switch.seconds:
            return self.policy.settings.usual_gain * plain_rate
        return max(self.switch.rate(), plain_rate)

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast | None:
        """Forecast a round with the latency model and the tokens that the judge expects; None before there is one."""
        widths, tokens = (plan.judge.widths, plan.judge.expected) if plan.judge else (None, 1.0)
        with self.lock:
            if self.key not in self.policy.costs:
                return None
            return self.cost.forecast(widths, nodes, context, tokens)

    def observe(self, round_: Round, tree: DraftTree, path: list[int], forecast: Forecast | None) -> None:
        """Correct the latency model, the acceptance curve and the running rate with a finished round."""
        if forecast is None:  # there was no latency model yet
            return
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
