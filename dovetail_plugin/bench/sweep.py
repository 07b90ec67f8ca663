"""Measures fixed budgets and the draft's own budget on the same prompts, in turns.

Takes a `Comparison` and a few prompts and returns the median tokens/s of each budget. The runs are not added to the
comparison.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..tree import TreeBudget
from .compare import Comparison

CHAINS = (TreeBudget(2, 1, 1), TreeBudget(4, 3, 1), TreeBudget(6, 5, 1), TreeBudget(9, 8, 1))
TREES = (TreeBudget(8, 4, 4), TreeBudget(16, 6, 8), TreeBudget(32, 8, 8))
BUDGETS = CHAINS + TREES
"""Budgets that `sweep` tries by default."""

PROMPTS = 3
"""Number of prompts that is enough for a plot."""


@dataclass(frozen=True)
class Sweep:
    """Median speeds of whole generations, over prompts.

    Attributes:
        plain_tokens_per_s: speed without a draft.
        own: the draft's own budget: "policy", or "nodes/depth/top_k".
        own_tokens_per_s: speed with the draft's own budget.
        tokens_per_s: speed of each fixed budget.
    """

    plain_tokens_per_s: float
    own: str
    own_tokens_per_s: float
    tokens_per_s: dict[TreeBudget, float]

    def as_dict(self) -> dict[str, float]:
        """Tokens/s by the name of the budget, for JSON."""
        named = {str(budget): speed for budget, speed in self.tokens_per_s.items()}
        return {"plain": self.plain_tokens_per_s, **named, self.own: self.own_tokens_per_s}


def sweep(comparison: Comparison, prompts: Sequence[Tensor], budgets: Sequence[TreeBudget] = BUDGETS) -> Sweep:
    """Run each prompt without a draft, with the draft's own budget, and with each fixed budget.

    The order of the budgets is reversed from prompt to prompt.


    Args:
        comparison: has been warmed up. The budget of its draft is restored at the end.
        prompts: at least one, each (1, T) int64.
        budgets: fixed budgets to try.
    """
    draft, own = comparison.draft, comparison.draft.budget
    plain: list[float] = []
    drafted: list[list[float]] = [[] for _ in (own, *budgets)]
    order = list(enumerate((own, *budgets)))
    try:
        for number, input_ids in enumerate(prompts):
            plain.append(comparison.run(input_ids, drafted=False, number=number).tokens_per_s)
            for place, budget in order if number % 2 == 0 else reversed(order):
                draft.budget = budget
                drafted[place].append(comparison.run(input_ids, drafted=True, number=number).tokens_per_s)
    finally:
        draft.budget = own
    own_speed, *speeds = (statistics.median(values) for values in drafted)
    return Sweep(statistics.median(plain), str(own or "policy"), own_speed, dict(zip(budgets, speeds, strict=True)))
