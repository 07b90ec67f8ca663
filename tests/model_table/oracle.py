"""A draft that knows the text: long paths are accepted, among wrong tokens. Written from the public contract alone."""

import random
from typing import Any

from support.trees import random_tree
from torch import Tensor

from dovetail_plugin import Draft, Drafter, DraftTree, TreeBudget


class OracleDrafter(Drafter):
    """Proposes random trees that contain a random beginning of the text's continuation.

    Args:
        draft: keeps the text, and what was asked for.
        clock: where the seconds would be counted.
    """

    def __init__(self, draft: "OracleDraft", clock: Any) -> None:
        self.clock, self.draft = clock, draft
        self.rng, self.known = random.Random(draft.seed), 0

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Find out where the text stands."""
        self._check(features, len(input_ids) - 1)
        self.known = len(input_ids)

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """Follow the text."""
        self._check(features, len(tokens))
        self.known += len(tokens)

    def grow(self, budget: TreeBudget, judge: Any = None) -> DraftTree:
        """The tree, which is a chain where the target asks for one."""
        self.draft.branches |= budget.top_k > 1
        text = self.draft.text
        return random_tree(text[self.known - 1], text[self.known :], budget, self.rng, self.draft.vocab)

    def _check(self, features: Tensor, rows: int) -> None:
        if features.ndim != 2 or len(features) != rows or not bool(features.isfinite().all()):
            raise ValueError(f"features for {rows} tokens have the shape {tuple(features.shape)}")


class OracleDraft(Draft):
    """A draft for one text.

    Args:
        text: prompt and continuation.
        vocab: wrong tokens are below it.
        seed: of the trees.

    Attributes:
        branches: whether the target has asked for trees, and not for chains only.
    """

    budget = TreeBudget(32, 12, 8)

    def __init__(self, text: list[int], vocab: int, seed: int = 0) -> None:
        self.text, self.vocab, self.seed, self.branches = text, vocab, seed, False

    def identity(self) -> list[Any]:
        """All oracles cost the same."""
        return ["oracle"]

    def new_drafter(self, engine: Any, *, capacity: int, clock: Any) -> OracleDrafter:
        """Make a drafter at the beginning of the text."""
        return OracleDrafter(self, clock)
