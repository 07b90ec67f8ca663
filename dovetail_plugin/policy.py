"""The device-split policy: how many tokens to draft, decided every round from what this machine was measured to do.

Enters: measurements, the draft's probabilities while a tree grows, what was accepted. Leaves: a `TreeBudget` and a
`TreeJudge` for each round, or none, which is plain decoding. It times nothing itself and runs no model.

The rule behind every decision is one exchange rate: `price`, the tokens a second is worth, which is the rate that
generation reaches now. A level is drafted, a row is verified, if the tokens it is expected to bring are worth more
than the seconds it is expected to take. Rounds chosen so maximise tokens over seconds in the long run (Dinkelbach's
method for ratios, with the running rate as its estimate).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import records
from .acceptance import AcceptanceCurve, prior
from .cost import CostModel, Measurements, RoundCost, Shape
from .tree import DraftTree, TreeBudget
from .verify import Acceptance

PLAIN = TreeBudget(nodes=1, depth=1, top_k=1)
"""The budget of plain decoding."""

LIMITS = TreeBudget(nodes=48, depth=10, top_k=8)
"""The largest tree that the policy asks for."""

REMEMBER = 0.96
"""What a round leaves of the weight of those before it in the running rate: some 25 rounds count."""

FIRST_TRIAL, TRIAL = 5, 2
"""Drafted rounds before drafting may be switched off: at first, and when it is tried again."""

FIRST_REST, LONGEST_REST = 16, 2048
"""Plain rounds before drafting is tried again; doubled each time that it does not pay."""


@dataclass(frozen=True)
class Outcome:
    """What a round did.

    tree: on the CPU. context: tokens of the text before it. drafted: whether a tree was grown.
    seconds: by phase, "other" included.
    """

    tree: DraftTree
    acceptance: Acceptance
    context: int
    drafted: bool
    seconds: dict[str, float]

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the drafted nodes: log-probabilities (N - 1,) float32, and which were accepted (N - 1,) bool."""
        accepted = np.zeros(len(self.tree), dtype=bool)
        accepted[self.acceptance.path] = True
        return self.tree.scores.numpy()[1:], accepted[1:]


@dataclass
class Mode:
    """What is known about drafting for one target at one temperature.

    growth: tokens that a further level brings, for each token that its frontier is expected to bring.
    tokens, seconds: of drafted rounds, older ones counting less. trial: drafted rounds until they are judged.
    rest: plain rounds until the next trial. interval: how long the next rest will be.
    """

    curve: AcceptanceCurve
    growth: float = 0.6
    tokens: float = 0.0
    seconds: float = 0.0
    trial: int = FIRST_TRIAL
    rest: int = 0
    interval: int = FIRST_REST

    def rate(self) -> float:
        """Tokens a second of drafted rounds."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, tokens: float, seconds: float) -> None:
        """Add a drafted round."""
        self.tokens = REMEMBER * self.tokens + tokens
        self.seconds = REMEMBER * self.seconds + seconds

    def judge(self, plain_rate: float) -> None:
        """After a drafted round: go on, or rest when plain decoding is faster."""
        self.trial -= 1
        if self.trial > 0:
            return
        if self.rate() >= plain_rate:
            self.interval = FIRST_REST
            return
        self.rest, self.interval = self.interval, min(2 * self.interval, LONGEST_REST)
        self.trial = TRIAL
        weight = TRIAL * (1 / plain_rate) / self.seconds  # the next trial weighs as much as all that was before
        self.tokens, self.seconds = self.tokens * weight, self.seconds * weight


class TreeJudge:
    """Decides while one tree grows: how wide the next level is, and how many nodes are verified.

    Args:
        budget: bounds.
        price: tokens that a second is worth.
        verify_s: (budget.nodes,) seconds of passes over 1, 2, ... rows.
        level_s: (budget.top_k + 1,) seconds of a further draft level over 0, 1, ... rows.
        mode: its curve turns the draft's probabilities into acceptance; its growth is kept up to date.

    Attributes:
        widths: rows of the levels drafted after the first. expected: tokens that the tree is expected to give.
    """

    def __init__(self, budget: TreeBudget, price: float, verify_s: np.ndarray, level_s: np.ndarray, mode: Mode) -> None:
        self._budget, self._mode = budget, mode
        self._node_costs = price * (verify_s - verify_s[0])  # in tokens, of 0, 1, ... drafted nodes
        self._level_costs = price * level_s
        self._node_price = float(self._node_costs[-1]) / max(len(verify_s) - 1, 1)
        self._frontier = 0.0  # tokens that the rows run last were expected to bring
        self.widths: list[int] = []
        self.expected = 1.0

    def width(self, scores: np.ndarray) -> int:
        """Rows of the level below these candidates, the likeliest first; 0 stops.

        A row is expected to bring `growth` times what it brings itself, the cost of verifying included.

        Args:
            scores: (M,) cumulative log-probabilities of all candidates of the last level.
        """
        likely = np.sort(self._mode.curve(scores))[::-1][: self._budget.top_k]
        if self._frontier:
            brought = float(np.maximum(likely - self._node_price, 0.0).sum())
            self._mode.growth += 0.05 * (min(brought / self._frontier, 2.0) - self._mode.growth)
        worth = np.concatenate([[0.0], self._mode.growth * likely.cumsum()]) - self._level_costs[: len(likely) + 1]
        width = int(worth.argmax())
        if width:
            self.widths.append(width)
            self._frontier = float(likely[:width].sum())
        return width

    def rows(self, scores: np.ndarray) -> int:
        """Nodes to verify, the root included.

        Args:
            scores: (M,) cumulative log-probabilities of all candidates of the tree.
        """
        likely = np.sort(self._mode.curve(scores))[::-1][: self._budget.nodes - 1]
        brought = np.concatenate([[0.0], likely.cumsum()])
        nodes = int((brought - self._node_costs[: len(brought)]).argmax())
        self.expected = 1.0 + float(brought[nodes])
        return nodes + 1


@dataclass(frozen=True)
class RoundPlan:
    """What a round may draft, and who decides within that; no judge drafts all of it."""

    budget: TreeBudget
    judge: TreeJudge | None = None


@dataclass(frozen=True)
class Forecast:
    """What was expected of a round: seconds and tokens; None where nobody forecasts."""

    cost: RoundCost | None = None
    tokens: float | None = None


class Rounds(Protocol):
    """The budgets of one generation, as the loop asks for them."""

    limits: TreeBudget

    @property
    def drafting(self) -> bool:
        """Whether the next round will draft."""

    def prepare(self, measure: Callable[[], Measurements]) -> Measurements | None:
        """Before the first round: have the machine measured if that is needed. Returns what is known of it."""

    def next(self, context: int, bound: TreeBudget) -> RoundPlan:
        """What the next round may draft: within `bound`, behind `context` tokens."""

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast:
        """What is expected of a round whose tree is grown."""

    def observe(self, outcome: Outcome, forecast: Forecast) -> None:
        """Learn from a round."""


class FixedRounds:
    """The same budget every round."""

    def __init__(self, budget: TreeBudget) -> None:
        self.limits, self.drafting = budget, budget.nodes > 1

    def prepare(self, measure: Callable[[], Measurements]) -> None:
        """Nothing is measured."""

    def next(self, context: int, bound: TreeBudget) -> RoundPlan:  # noqa: ARG002
        """All of it."""
        return RoundPlan(bound)

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast:  # noqa: ARG002
        """Nothing is forecast."""
        return Forecast()

    def observe(self, outcome: Outcome, forecast: Forecast) -> None:
        """Nothing is learnt."""


class DeviceSplitPolicy:
    """Chooses budgets from measurements; one object serves any number of generations, at once too.

    Args:
        limits: the largest tree to ask for.
        threads: "auto" measures which number of torch threads verifies fastest, up to the number that is set;
            "keep" leaves it alone.
        measured_in: directory for measurements, found again by later processes; None takes the user's cache
            directory (see `records.default_directory`).

    Raises:
        ValueError: `threads` is neither.
    """

    def __init__(
        self, *, limits: TreeBudget = LIMITS, threads: str = "auto", measured_in: str | Path | None = None
    ) -> None:
        if threads not in ("auto", "keep"):
            raise ValueError(
                f'threads must be "auto" or "keep", got {threads!r}; use torch.set_num_threads for others.'
            )
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

    def rounds(
        self,
        key: str,
        *,
        temperature: float,
        shape: Shape | None = None,
        calibration: dict[str, list[float]] | None = None,
    ) -> "AdaptiveRounds":
        """For one generation.

        Args:
            key: of target, draft and machine; what was learnt is remembered under it.
            temperature: 0 is greedy.
            shape, calibration: of the target, and of the draft's checkpoint; None if unknown.
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
    shape: Shape | None
    lock: Any
    limits: TreeBudget = field(init=False)

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
                self.policy.costs[self.key] = CostModel(measured, self.shape)
            return self.cost.measured

    def next(self, context: int, bound: TreeBudget) -> RoundPlan:
        with self.lock:
            if not self.drafting or bound.nodes < 2:
                return RoundPlan(PLAIN)
            verify_s = self.cost.verify_table(context, bound.nodes)
            level_s = self.cost.level_table(bound.top_k)
            return RoundPlan(bound, TreeJudge(bound, self._price(context), verify_s, level_s, self.mode))

    def _price(self, context: int) -> float:
        """Tokens a second: of drafted rounds, or of plain ones if these are faster."""
        return max(self.mode.rate(), 1.0 / self.cost.plain_s(context))

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
            mode.curve.observe(*outcome.nodes())
            seconds = min(sum(outcome.seconds.values()), 3 * forecast.cost.total_s)
            # The mean of what came and what was expected: as right in the long run, and half as noisy.
            mode.count((emitted + forecast.tokens) / 2, seconds)
            mode.judge(1.0 / self.cost.plain_s(outcome.context))
