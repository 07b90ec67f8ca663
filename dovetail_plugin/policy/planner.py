"""`RoundPlanner`, the contract between the generation loop and the code that decides what a round may draft.

`FixedPlanner` implements it for a fixed budget; `device_split.AdaptivePlanner` implements it for the policy.
"""

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
"""A function that measures this machine with the loaded models."""


@dataclass(frozen=True)
class RoundPlan:
    """The tree that a round may draft.

    Attributes:
        budget: the largest tree.
        judge: shapes the tree within the budget while it grows; None uses the whole budget.
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

    def prepare(self, measure: Measure | None) -> Measurements | None:
        """Call `measure` before the first round if measurements are needed, and return them; None if there are none.

        Args:
            measure: None if there is no time for measurements now.
        """

    def plan(self, context: int, bound: TreeBudget) -> RoundPlan:
        """Plan the next round, with a tree of at most `bound`, after `context` tokens of text."""

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> Forecast | None:
        """Forecast a round whose tree has grown to `nodes` nodes. None if this planner makes no forecasts."""

    def observe(self, round_: Round, tree: DraftTree, path: list[int], forecast: Forecast | None) -> None:
        """Learn from a finished round.

        Args:
            round_: record of the round.
            tree: the verified tree, on the CPU.
            path: indices of the accepted nodes from the root down, the root included.
            forecast: result of `forecast` for this round.
        """


class FixedPlanner:
    """Plans the same budget for every round.

    Args:
        budget: the tree of each round; one node is plain decoding.
    """

    def __init__(self, budget: TreeBudget) -> None:
        self.limits, self.drafting = budget, budget.nodes > 1

    def prepare(self, measure: Measure | None) -> None:
        """Measure nothing."""

    def plan(self, context: int, bound: TreeBudget) -> RoundPlan:  # noqa: ARG002
        """Use all of `bound`."""
        return RoundPlan(bound)

    def forecast(self, plan: RoundPlan, nodes: int, context: int) -> None:
        """Forecast nothing."""

    def observe(self, round_: Round, tree: DraftTree, path: list[int], forecast: Forecast | None) -> None:
        """Learn nothing."""
