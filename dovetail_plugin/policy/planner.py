"""The contract between the loop and whoever decides what a round may draft, and the planner of fixed budgets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..report import Round
from ..tree import DraftTree, TreeBudget
from .cost import Forecast
from .measurements import Measurements
from .settings import PolicySettings
from .tree_rule import TreeJudge

PLAIN = TreeBudget(nodes=1, depth=1, top_k=1)
"""The budget of plain decoding."""

Measure = Callable[[PolicySettings], Measurements]
"""Measures this machine with the real models."""


@dataclass(frozen=True)
class RoundPlan:
    """What a round may draft.

    Attributes:
        budget: the largest tree.
        judge: decides within the budget while the tree grows; None uses all of it.
    """

    budget: TreeBudget
    judge: TreeJudge | None = None


class RoundPlanner(Protocol):
    """Plans the rounds of one generation.

    Attributes:
        limits: the largest tree of any round.
    """

    limits: TreeBudget

    @property
    def drafting(self) -> bool:
        """Whether the next round will draft."""

    def prepare(self, measure: Measure) -> Measurements | None:
        """Call `measure` before the first round if that is needed; returns what is known of this machine."""

    def plan(self, context: int, bound: TreeBudget) -> RoundPlan:
        """Plan the next round, within `bound` and behind `context` tokens."""

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast | None:
        """Forecast a round whose tree of `nodes` nodes is grown; None where nobody forecasts."""

    def observe(self, round_: Round, tree: DraftTree, path: list[int], forecast: Forecast | None) -> None:
        """Learn from a finished round.

        Args:
            round_: its record.
            tree: the verified tree, on the CPU.
            path: accepted nodes from the root down, the root included.
            forecast: the result of `forecast` for this round.
        """


class FixedPlanner:
    """Plans the same budget every round."""

    def __init__(self, budget: TreeBudget) -> None:
        self.limits, self.drafting = budget, budget.nodes > 1

    def prepare(self, measure: Measure) -> None:
        """Measure nothing."""

    def plan(self, context: int, bound: TreeBudget) -> RoundPlan:  # noqa: ARG002
        """Use all of `bound`."""
        return RoundPlan(bound)

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> None:
        """Forecast nothing."""

    def observe(self, round_: Round, tree: DraftTree, path: list[int], forecast: Forecast | None) -> None:
        """Learn nothing."""
