"""What a round may draft: the rule that grows trees as far as they pay, and fixed budgets.

The rule behind every decision is one exchange rate: `price`, the tokens a second is worth, which is the rate that
generation reaches now. A level is drafted, a row is verified, if the tokens it is expected to bring are worth more
than the seconds it is expected to take. Rounds chosen so maximise tokens over seconds in the long run (Dinkelbach's
method for ratios, with the running rate as its estimate).

Enters: the draft's probabilities, tables of seconds, what was accepted. Leaves: widths and row counts. It times
nothing and runs no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..tree import DraftTree, TreeBudget
from ..verify import Acceptance
from .cost import RoundCost
from .measurements import Measurements
from .tree_rule import TreeJudge

PLAIN = TreeBudget(nodes=1, depth=1, top_k=1)
"""The budget of plain decoding."""


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
