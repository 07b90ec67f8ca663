"""What fixed budgets bring beside the draft's own, on the same prompts, interleaved.

Enters: a `Comparison` and a few prompts. Leaves: median tokens/s of every budget. Nothing is added to the comparison.
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
"""What is tried unless other budgets are asked for."""

PROMPTS = 3
"""Prompts that are enough for a picture."""


@dataclass(frozen=True)
class Sweep:
    """Medians over prompts, of whole generations.

    plain_tokens_per_s: without a draft. own_tokens_per_s: with the draft as it is, whose budget is `own` ("policy",
    or N/D/K). tokens_per_s: of each fixed budget.
    """

    plain_tokens_per_s: float
    own: str
    own_tokens_per_s: float
    tokens_per_s: dict[TreeBudget, float]

    def as_dict(self) -> dict[str, float]:
        """For JSON: tokens/s by name of budget."""
        named = {str(budget): speed for budget, speed in self.tokens_per_s.items()}
        return {"plain": self.plain_tokens_per_s, **named, self.own: self.own_tokens_per_s}


def sweep(comparison: Comparison, prompts: Sequence[Tensor], budgets: Sequence[TreeBudget] = BUDGETS) -> Sweep:
    """Run every prompt (1, T) plainly, with the draft as it is, and with each budget; the order turns every time.

    Args:
        comparison: warmed up. Its draft's budget is put back at the end.
        prompts: at least one.
        budgets: fixed ones to try.
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
