"""The contracts of targets: an `Engine` for a model, a session for a generation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..tree import DraftTree


@dataclass(frozen=True)
class Tables:
    """What a draft borrows. embedding, head: (V, H), any float dtype; bias: (V,) or None.

    `head` is `embedding` itself where the two are tied.
    """

    embedding: Tensor
    head: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TargetOutput:
    """logits: (n, V). features: (n, F), or (T, F) of all prompt rows after `prefill`. Target device."""

    logits: Tensor
    features: Tensor


class Target(Protocol):
    """What the loop needs of an engine. Masks, cache slots and positions are the engine's own business."""

    supports_tree: bool
    max_length: int | None

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> TargetOutput:
        """Run the prompt (1, T), behind rows the cache may hold: logits (1, V) of the last row, all features."""

    def score(self, tree: DraftTree) -> TargetOutput:
        """Score N nodes: row i sees the committed text, its ancestors and itself. Appends N rows."""

    def keep(self, path: list[int]) -> None:
        """Commit these rows of the last `score`, in order; drop the others."""


class Engine(Protocol):
    """One model and what it takes to draft for it."""

    config: PretrainedConfig

    @property
    def rounding(self) -> torch.dtype:
        """The coarsest float type that results pass through; torch.float32 where texts must be identical."""

    runs_in_torch: bool
    """Whether passes need torch's threads."""

    def check(self) -> None:
        """Refuse a model that cannot be verified, before any long work.

        Raises:
            ValueError: with the reason and the remedy.
        """

    def tables(self) -> Tables:
        """Embedding table and head."""

    def cache(self, given: Any) -> Any:
        """The cache to generate with: `given` by the caller, or a new one if None; knows `get_seq_length()`.

        Raises:
            ValueError: the given one cannot take back rejected rows.
        """

    def draft_runner(self, draft: Any) -> Any:
        """A `DraftRunner` of this engine's for a `DovetailDraft` on the CPU, or None to run it in torch."""

    def session(
        self,
        cache: Any,
        *,
        max_length: int,
        max_nodes: int,
        prefill_chunk: int | None,
        model_kwargs: dict[str, Any],
        feature_layers: tuple[int, ...] | None = None,
    ) -> AbstractContextManager[Target]:
        """A target for one generation that goes on behind the rows of `cache`.

        Args:
            max_length: tokens the text may reach.
            max_nodes: rows of the largest tree.
            prefill_chunk: prompt rows in one pass; None leaves it to the engine.
            model_kwargs: further arguments of the model's forward pass.
            feature_layers: see `TorchTarget`.

        Raises:
            ValueError: the engine cannot read these layers, or an argument of the forward pass.
        """
