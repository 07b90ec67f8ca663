"""What every kind of draft has in common: `Assistant`, which may be passed as `assistant_model`.

Enters: nothing. Leaves: attributes that generation reads and sets. What proposes the tokens is a `Drafter`; an
assistant is what a user holds and keeps over generations.
"""

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..report import GenerationReport, PhaseClock
from ..tree import DraftTree, TreeBudget

DRAFT_ROWS = 1024
"""Rows that a draft's cache has room for beyond the prompt. The cache doubles when they are used up."""


class Assistant:
    """Base of drafts.

    Attributes:
        report: the `GenerationReport` of the latest generation with this draft, or None.
        budget: `TreeBudget` of every round; None lets the policy choose each of them.
        policy: the `DeviceSplitPolicy` that chooses budgets; drafts of one machine may share one. The first
            generation makes one where there is none.
        verification: `"tree"` (our loop inside `generate`) or `"stock"` (transformers' assisted loop, which takes
            chains of a `DovetailDraft` only; transformers 5.8 or later).
        turns: cache -> the drafter that has followed it, for the next turn of a conversation.
    """

    budget: TreeBudget | None = None
    policy: Any = None
    report: GenerationReport | None = None
    verification: Literal["tree", "stock"] = "tree"

    @property
    def turns(self) -> "weakref.WeakKeyDictionary[Any, Any]":
        """Made at the first use."""
        return self.__dict__.setdefault("_turns", weakref.WeakKeyDictionary())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu")

    def num_parameters(self) -> int:
        """Numbers of its own."""
        return 0

    def check_target(self, target: Any) -> None:
        """Refuse a target that this draft cannot propose tokens for.

        Raises:
            ValueError: with the reason.
        """

    @abstractmethod
    def identity(self) -> list[Any]:
        """What tells apart drafts whose speed and acceptance may differ; JSON can hold it."""

    def new_drafter(self, capacity: int, clock: PhaseClock) -> Any:
        """A `Drafter` for one text, with room for `capacity` tokens at once; a `DovetailDraft`'s depends on the engine.

        Args:
            clock: where its seconds go.
        """


class DraftError(RuntimeError):
    """The draft cannot go on (its logits are not numbers, say); the text is not affected."""


class Judge(Protocol):
    """Decides while a tree grows, from cumulative log-probabilities of candidates, on the CPU."""

    def width(self, scores: np.ndarray) -> int:
        """Rows of the level below these candidates; 0 stops."""

    def rows(self, scores: np.ndarray) -> int:
        """Nodes of the tree, the root included, out of all candidates."""


class Drafter(Protocol):
    """Proposes trees. Implementations own their state; the loop owns the order of the calls."""

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Start a text or a turn: features (T, F) of its last T tokens, input_ids (T + 1,) with one more token."""

    def catch_up(self) -> None:
        """Run what `begin` and `advance` have handed over; `grow` does so too."""

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """The tree below the last token, on the CPU: all that the budget allows, or what the judge takes of it."""

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """The text grew: features (A, F) of the accepted rows, tokens (A,) emitted after each of them."""


class DraftRunner(Protocol):
    """Runs the steps of a `DovetailDraft` on some engine. `TorchRunner` is the draft itself.

    weights: how these are stored, where that is not `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    weights: str | None
    runs_in_torch: bool

    def new_rows(self, capacity: int) -> Sequence[Any]:
        """Empty key/value storage for one text; each part has a `length` that may be set back."""

    def run(
        self,
        features: Tensor,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Any,
        mask: Tensor | None,
        logits_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One step over n pairs; arguments as `DovetailDraft.step`, without the batch dimension.

        Returns:
            predicted features (n, H), and the logits (n - logits_from, V) of the last of them.
        """


class DraftModel(Protocol):
    """What a `FeatureDrafter` asks of a draft beside what its runner runs; see `DovetailDraft`."""

    token_ids: Tensor | None

    def rope_at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the runner wants to know of positions (1, n), as two tensors (1, n, ...)."""

    def project(self, features: Tensor) -> Tensor:
        """Features of the target as the runner reads them."""

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits of the target's whole vocabulary."""
