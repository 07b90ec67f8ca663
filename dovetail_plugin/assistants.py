"""What every kind of draft has in common: `Assistant`, which may be passed as `assistant_model`.

Enters: nothing. Leaves: attributes that generation reads and sets. What proposes the tokens is a `Drafter`; an
assistant is what a user holds and keeps over generations.
"""

import weakref
from abc import abstractmethod
from typing import Any, Literal

import torch

from .report import GenerationReport, PhaseClock
from .tree import TreeBudget


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
