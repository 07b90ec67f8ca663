"""Drafting without a model: what followed the last few tokens earlier in the text may follow them again.

`PromptLookupDraft` helps where answers repeat their prompt: summaries, edits, code, retrieval. It proposes a tree of
continuations: every earlier place counts where the same tokens stood as at the text's end now, longest match first.
It reads token ids and returns a `DraftTree`; it reads no features and runs no model.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..report import PhaseClock
from ..targets.base import Engine
from ..tree import DraftTree, TreeBudget
from .base import Draft, Drafter, Judge

DOUBT = 0.5
"""Weight against every continuation, in places: a single match does not make it certain."""


@dataclass
class LookupIndex:
    """Where every run of up to `longest` tokens stood in a text that grows.

    Attributes:
        longest: tokens of the longest run.
        shortest: tokens of the shortest run.
        tokens: token ids of the text.
        followers: run -> positions behind it, ascending.
    """

    longest: int
    shortest: int
    tokens: list[int] = field(default_factory=list)
    followers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def append(self, tokens: list[int]) -> None:
        """Record that the text grew."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for length in range(self.shortest, min(self.longest, end) + 1):
                self.followers.setdefault(tuple(self.tokens[end - length :]), []).append(end)

    def places(self) -> list[int]:
        """Return positions behind earlier runs equal to the text's end: of the longest such run, latest first."""
        end = len(self.tokens)
        for length in range(min(self.longest, end), self.shortest - 1, -1):
            found = self.followers[tuple(self.tokens[end - length :])]
            if len(found) > 1:  # the last one is the text's end itself
                return found[-2::-1]
        return []


class LookupDrafter(Drafter):
    """Drafter of a `PromptLookupDraft`. A continuation's probability is its share of the places, less `DOUBT`.

    Args:
        longest: tokens of the longest match.
        shortest: tokens of the shortest match.
        clock: where the seconds are counted.
    """

    def __init__(self, longest: int, shortest: int, clock: PhaseClock) -> None:
        self.clock = clock
        self.index = LookupIndex(longest, shortest)
        self._pending: list[Tensor] = []  # tokens that are not in the index yet

    def begin(self, features: Tensor, input_ids: Tensor) -> None:  # noqa: ARG002
        """Remember the prompt, or what a turn adds to the text. See `Drafter.begin`."""
        known = bool(self.index.tokens or self._pending)
        self._pending.append(input_ids[1 if known else 0 :])  # in a later turn the first is the last of the turn before

    def advance(self, features: Tensor, tokens: Tensor) -> None:  # noqa: ARG002
        """Remember the new tokens. See `Drafter.advance`."""
        self._pending.append(tokens)

    def catch_up(self) -> None:
        """Index what the text gained."""
        with self.clock.phase("draft"):
            for tokens in self._pending:
                self.index.append(tokens.tolist())
            self._pending.clear()

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """Return the tree, which is the root alone where nothing matches. See `Drafter.grow`."""
        self.catch_up()
        with self.clock.phase("draft"):
            tree = self._grow(budget)
            if judge is None or len(tree) == 1:
                return tree
            nodes = min(judge.rows(tree.scores[1:].numpy()), len(tree))
            return DraftTree(tree.tokens[:nodes], tree.parents[:nodes], tree.depths[:nodes], tree.scores[:nodes])

    def _grow(self, budget: TreeBudget) -> DraftTree:
        """Grow best first, so that the first n nodes are the best tree of n nodes."""
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
        return DraftTree(*(torch.tensor(column, device="cpu") for column in (tokens, parents, depths, scores)))


class PromptLookupDraft(Draft):
    """A draft that needs no model and no training: pass it as `assistant_model`.

    ```python
    out = target.generate(**inputs, assistant_model=PromptLookupDraft(), max_new_tokens=256)
    ```

    Args:
        longest: largest number of tokens at the end of the text that are matched. Longer matches have priority.
        shortest: smallest number of tokens of a match.

    Raises:
        ValueError: `shortest` is below 1 or above `longest`.
    """

    layout = "lookup"

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be between 1 and longest ({longest}), got {shortest}.")
        self.longest, self.shortest = longest, shortest

    def feature_layers(self, target: PretrainedConfig) -> tuple[int, ...]:  # noqa: ARG002
        """Return no layers: only tokens are read, so a target need not keep its hidden states."""
        return ()

    def identity(self) -> list[Any]:
        """Return the lengths of matches."""
        return ["lookup", self.longest, self.shortest]

    def new_drafter(self, engine: Engine, *, capacity: int, clock: PhaseClock) -> LookupDrafter:  # noqa: ARG002
        """Make a drafter with an empty index."""
        return LookupDrafter(self.longest, self.shortest, clock)
