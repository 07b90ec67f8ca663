"""What a round may draft: the rule that grows trees as far as they pay, and fixed budgets.

The rule behind every decision is one exchange rate: `price`, the tokens a second is worth, which is the rate that
generation reaches now. A level is drafted, a row is verified, if the tokens it is expected to bring are worth more
than the seconds it is expected to take. Rounds chosen so maximise tokens over seconds in the long run (Dinkelbach's
method for ratios, with the running rate as its estimate).

Enters: the draft's probabilities, tables of seconds, what was accepted. Leaves: widths and row counts. It times
nothing and runs no model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .acceptance import AcceptanceCurve
from .cost import Measurements, RoundCost
from .tree import DraftTree, TreeBudget
from .verify import Acceptance

PLAIN = TreeBudget(nodes=1, depth=1, top_k=1)
"""The budget of plain decoding."""

REMEMBER = 0.96
"""What a round leaves of the weight of those before it in the running rate: some 25 rounds count."""

FIRST_TRIAL, TRIAL, LONG_TRIAL = 4, 2, 8
"""Drafted rounds before drafting may be switched off: at first, when it is tried again, and if any of it was right."""

ESTIMATES = 16
"""Drafted rounds after a rest until only what really came counts."""

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


class Lookahead:
    """What the children of nodes are expected to bring, before they are drafted: as latest nodes' children did.

    Remembers, of the latest nodes that were drafted further, how likely their two best children were accepted if
    they themselves were. What a child brings is convex in its probability, since children that would not pay are left
    out; so it is the mean over these, not what a mean child would bring.
    """

    def __init__(self) -> None:
        first = np.linspace(0.3, 0.95, 16)  # until there are real ones
        self._children = np.tile(np.stack([first, 0.4 * (1.0 - first)], axis=1), (8, 1))
        self._next = 0
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    def observe(self, parents: np.ndarray, children: np.ndarray) -> None:
        """Remember, until `refresh`: acceptance (R,) of parents, scores (R, C) of their children, best first."""
        if children.shape[1] < 2:  # chains
            children = np.pad(children, ((0, 0), (0, 1)), constant_values=-np.inf)
        self._seen.append((parents, children[:, :2]))

    def refresh(self, curve: AcceptanceCurve) -> None:
        """Take over what was remembered, by this curve."""
        if not self._seen:
            return
        parents = np.concatenate([parents for parents, _ in self._seen])
        scores = np.concatenate([children for _, children in self._seen])
        self._seen.clear()
        likely = parents > 0.02
        shares = curve(scores[likely]) / parents[likely, None]
        shares = np.minimum(shares[-len(self._children) :], 1.0)
        self._children[(self._next + np.arange(len(shares))) % len(self._children)] = shares
        self._next = (self._next + len(shares)) % len(self._children)

    def gains(self, likely: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """Tokens that further drafting of nodes with these probabilities (K,) is expected to bring, each.

        Args:
            prices: (2 K,) rising: tokens that verifying a child costs; the likeliest of all takes the first place.
        """
        expected = likely[:, None] * self._children.mean(axis=0)
        paid = np.empty(expected.size)
        paid[np.argsort(-expected, axis=None, kind="stable")] = prices
        brought = likely[:, None, None] * self._children.T - paid.reshape(*expected.shape, 1)
        return np.maximum(brought, 0.0).mean(axis=2).sum(axis=1)


@dataclass
class Mode:
    """What is known about drafting for one target at one temperature.

    tokens, estimated, seconds: of drafted rounds, older ones counting less: what came, and what trees like these bring
        by all that is known. since, accepted: drafted rounds since the last rest, and drafted tokens that were accepted
        in them.
    trial: drafted rounds until they are judged. rest: plain rounds until the next trial. interval: of the next rest.
    """

    curve: AcceptanceCurve
    lookahead: Lookahead = field(default_factory=Lookahead)
    tokens: float = 0.0
    estimated: float = 0.0
    seconds: float = 0.0
    since: int = 0
    accepted: float = 0.0
    trial: int = FIRST_TRIAL
    rest: int = 0
    interval: int = FIRST_REST

    def rate(self) -> float:
        """Tokens a second of drafted rounds. The estimate, less noisy and less sure, counts at first only."""
        share = max(0.5 * (1.0 - self.since / ESTIMATES), 0.0)
        return ((1.0 - share) * self.tokens + share * self.estimated) / self.seconds if self.seconds else 0.0

    def count(self, tokens: float, estimated: float, seconds: float) -> None:
        """Add a drafted round."""
        self.tokens = REMEMBER * self.tokens + tokens
        self.estimated = REMEMBER * self.estimated + estimated
        self.seconds = REMEMBER * self.seconds + seconds
        self.since += 1
        self.accepted += tokens - 1.0

    def judge(self, plain_rate: float) -> None:
        """After a drafted round: go on, or rest when plain decoding is faster."""
        self.trial -= 1
        if self.trial > 0:
            return
        if self.rate() >= plain_rate:
            if self.since > ESTIMATES:
                self.interval = FIRST_REST
            return
        if self.accepted and self.since < LONG_TRIAL:
            return  # some of it is right: look longer
        self.rest, self.interval = self.interval, min(2 * self.interval, LONGEST_REST)
        self.trial, self.since, self.accepted = TRIAL, 0, 0.0
        self.curve.fade()  # or the next trial would verify nothing, and learn nothing
        weight = TRIAL * (1 / plain_rate) / self.seconds  # the next trial weighs as much as all that was before
        self.tokens, self.estimated, self.seconds = (
            part * weight for part in (self.tokens, self.estimated, self.seconds)
        )


class TreeJudge:
    """Decides while one tree grows: how wide the next level is, and how many nodes are verified.

    Args:
        budget: bounds.
        price: tokens that a second is worth.
        verify_s: (budget.nodes,) seconds of passes over 1, 2, ... rows.
        level_s: (budget.top_k + 1,) seconds of a further draft level over 0, 1, ... rows.
        mode: what is known of this draft, kept up to date.
        switch: (budget.nodes,) share of those seconds that a pass takes more after the one before it.

    Attributes:
        widths: rows of the levels drafted after the first. expected: tokens that the tree is expected to give.
    """

    def __init__(
        self,
        budget: TreeBudget,
        price: float,
        verify_s: np.ndarray,
        level_s: np.ndarray,
        mode: Mode,
        switch: np.ndarray,
    ) -> None:
        self._budget, self._mode = budget, mode
        self._node_costs = price * verify_s * (1.0 + switch)  # in tokens, of 0, 1, ... drafted nodes
        self._level_costs = price * level_s
        self._frontier = np.ones(1)  # acceptance of the nodes whose children come next, in the order they were run
        self._candidates = np.zeros(0)  # acceptance of all nodes so far, best first, as many as may be verified
        self.widths: list[int] = []
        self.expected = 1.0

    def width(self, scores: np.ndarray) -> int:
        """Rows of the level below these candidates, the likeliest first; 0 stops.

        Args:
            scores: (M,) cumulative log-probabilities of all candidates of the last level: of each row that was run,
                its children, best first.
        """
        lookahead = self._mode.lookahead
        lookahead.observe(self._frontier, scores.reshape(len(self._frontier), -1))
        level = self._likeliest(scores, len(scores))
        self._candidates = -np.sort(-np.concatenate([self._candidates, level]))[: self._budget.nodes - 1]
        likely = level[: self._budget.top_k]
        gains = lookahead.gains(likely, self._prices(2 * len(likely))).cumsum() - self._level_costs[1 : len(likely) + 1]
        width = int(gains.argmax()) + 1
        if gains[width - 1] <= 0.0:
            return 0
        self.widths.append(width)
        self._frontier = likely[:width]
        return width

    def _prices(self, count: int) -> np.ndarray:
        """(count,) tokens that `count` nodes better than all so far would cost, cheapest first; inf where none fits.

        A node takes the place of the weakest that would be verified, or makes the pass longer by a row.
        """
        taken = self._worth(self._candidates)
        replaced = self._candidates[:taken][::-1][:count]
        longer = np.maximum.accumulate(np.diff(self._node_costs[taken : taken + count + 1]))
        prices = np.sort(np.concatenate([replaced, longer, np.full(count, np.inf)]))
        return prices[:count]

    def rows(self, scores: np.ndarray) -> int:
        """Nodes to verify, the root included.

        Args:
            scores: (M,) cumulative log-probabilities of all candidates of the tree.
        """
        likely = self._likeliest(scores, self._budget.nodes - 1)
        nodes = self._worth(likely)
        self.expected = 1.0 + float(likely[:nodes].sum())
        return nodes + 1

    def _worth(self, likely: np.ndarray) -> int:
        """How many of these candidates, best first, to verify."""
        brought = np.concatenate([[0.0], likely.cumsum()])
        return int((brought - self._node_costs[: len(brought)]).argmax())

    def _likeliest(self, scores: np.ndarray, count: int) -> np.ndarray:
        """Acceptance of the `count` best candidates, best first."""
        return self._mode.curve(np.sort(scores)[::-1][:count])


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
