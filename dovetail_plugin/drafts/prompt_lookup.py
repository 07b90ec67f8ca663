"""Drafting without a model: what followed the last few tokens earlier in the text may follow them again.

`PromptLookupDraft` helps where answers repeat their prompt: summaries, edits, code, retrieval. It proposes a tree, not
one continuation: every earlier place where the text ended like now counts, the longest match first. Enters: token
ids. Leaves: a `DraftTree`. It looks at no feature and runs no model.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, tensor

from ..report import PhaseClock
from ..tree import DraftTree, TreeBudget
from .base import Assistant, Judge

DOUBT = 0.5
"""Places that count against every continuation: one match is no certainty."""


@dataclass
class LookupIndex:
    """Where every run of up to `longest` tokens stood in a text that grows.

    followers: run -> places behind it, ascending.
    """

    longest: int
    shortest: int
    tokens: list[int] = field(default_factory=list)
    followers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def append(self, tokens: list[int]) -> None:
        """The text grew."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for length in range(self.shortest, min(self.longest, end) + 1):
                self.followers.setdefault(tuple(self.tokens[end - length :]), []).append(end)

    def places(self) -> list[int]:
        """Places behind earlier runs that equal the text's end: of the longest run that has any, latest first."""
        end = len(self.tokens)
        for length in range(min(self.longest, end), self.shortest - 1, -1):
            found = self.followers[tuple(self.tokens[end - length :])]
            if len(found) > 1:  # the last one is the text's end itself
                return found[-2::-1]
        return []


class LookupDrafter:
    """Implements `Drafter`. A continuation's probability is its share of the places, with some doubt.

    Args:
        longest, shortest: tokens that a match may have.
        clock: where the seconds go.
    """

    def __init__(self, longest: int, shortest: int, clock: PhaseClock) -> None:
        self.clock = clock
        self.index = LookupIndex(longest, shortest)

    def begin(self, features: Tensor, input_ids: Tensor) -> None:  # noqa: ARG002
        """As `Drafter.begin`."""
        with self.clock.phase("draft"):
            known = bool(self.index.tokens)  # in a later turn the first of these is the last of the turn before
            self.index.append(input_ids.tolist()[1 if known else 0 :])

    def advance(self, features: Tensor, tokens: Tensor) -> None:  # noqa: ARG002
        """As `Drafter.advance`."""
        with self.clock.phase("draft"):
            self.index.append(tokens.tolist())

    def catch_up(self) -> None:
        """Nothing waits."""

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """As `Drafter.grow`; the root alone where nothing matches."""
        with self.clock.phase("draft"):
            tree = self._grow(budget)
            if judge is None or len(tree) == 1:
                return tree
            nodes = min(judge.rows(tree.scores[1:].numpy()), len(tree))
            return DraftTree(tree.tokens[:nodes], tree.parents[:nodes], tree.depths[:nodes], tree.scores[:nodes])

    def _grow(self, budget: TreeBudget) -> DraftTree:
        """Best first, so that any number of leading nodes is the best tree of that size."""
        text = self.index.tokens
        tokens, parents, depths, scores = [text[-1]], [-1], [0], [0.0]
        order = itertools.count()
        open_nodes: list[tuple[float, int, int, int, int, list[int]]] = []

        def offer(parent: int, places: list[int]) -> None:
            by_token: dict[int, list[int]] = {}
            for place in places:
                if place < len(text):
                    by_token.setdefault(text[place], []).append(place + 1)
            likeliest = sorted(by_token.items(), key=lambda item: -len(item[1]))[: budget.top_k]
            for token, following in likeliest:
                score = scores[parent] + math.log(len(following) / (len(places) + DOUBT))
                heapq.heappush(open_nodes, (-score, next(order), parent, token, depths[parent] + 1, following))

        offer(0, self.index.places())
        while open_nodes and len(tokens) < budget.nodes:
            score, _, parent, token, depth, following = heapq.heappop(open_nodes)
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
            scores.append(-score)
            if depth < budget.depth:
                offer(len(tokens) - 1, following)
        return DraftTree(tensor(tokens), tensor(parents), tensor(depths), tensor(scores))


class PromptLookupDraft(Assistant):
    """A draft that needs no model and no training: pass it as `assistant_model`.

    ```python
    out = target.generate(**inputs, assistant_model=PromptLookupDraft(), max_new_tokens=256)
    ```

    Args:
        longest, shortest: tokens at the text's end that must have stood together earlier; longer matches count first.

    Raises:
        ValueError: `shortest` is below 1 or above `longest`.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be between 1 and longest ({longest}), got {shortest}.")
        self.longest, self.shortest = longest, shortest

    def identity(self) -> list[Any]:
        """As `Assistant.identity`."""
        return ["lookup", self.longest, self.shortest]

    def new_drafter(self, capacity: int, clock: PhaseClock) -> LookupDrafter:  # noqa: ARG002
        """For one text."""
        return LookupDrafter(self.longest, self.shortest, clock)
