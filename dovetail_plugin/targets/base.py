"""The contracts of targets: an `Engine` for a model, a `TargetSession` for one generation.

Everything above works with these protocols alone and does not ask which library runs a target.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..kernels.linear import PackedLinear
from ..runner import DraftRunner
from ..tree import DraftTree


@dataclass(frozen=True)
class Tables:
    """The tables of a target that a draft borrows.

    Attributes:
        embedding: (V, H), any float dtype.
        head: (V, H), any float dtype; `embedding` itself where the two are tied.
        bias: (V,) of the head, or None.
    """

    embedding: Tensor
    head: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class TargetOutput:
    """Result of a pass of the target, on its device.

    Attributes:
        logits: (N, V) of a tree, or (1, V) of the prompt's last row.
        features: (N, F) of a tree, or (T, F) of all prompt rows.
    """

    logits: Tensor
    features: Tensor


class TextCache(Protocol):
    """Keys and values of one text, as the caller holds them between turns."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens held."""


class TargetModel(Protocol):
    """A model that can generate with a draft: one of transformers' own or a stored one."""

    config: PretrainedConfig

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""


class TargetSession(Protocol):
    """One engine during one generation. Masks, cache slots and positions are the engine's own business.

    Attributes:
        supports_tree: whether a tree may have branches; else it gets chains only.
        limitation: why a pass may have one row only, which is plain decoding; None if it may have several.
        max_length: tokens up to which a text may be drafted, or None if there is no limit.
    """

    @property
    def supports_tree(self) -> bool: ...

    limitation: str | None
    max_length: int | None

    def levels_left(self) -> int | None:
        """Return how many levels below the root the next tree may have; None for any number.

        Such a limit passes as the text grows, in contrast to `max_length`.
        """

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, cached: int = 0) -> TargetOutput:
        """Run the prompt after the rows that are in the cache already.

        Args:
            input_ids: (1, T) int64, the whole prompt, or what is new of it.
            attention_mask: (1, tokens of the whole text), 0 at padding; None without padding.
            cached: tokens at the start of `input_ids` whose rows are in the cache. They are not run.

        Returns:
            Logits of the last row and features of the T - cached rows.
        """

    def score(self, tree: DraftTree) -> TargetOutput:
        """Score N nodes and append N rows: row i attends to the committed text, its ancestors and itself."""

    def keep(self, path: list[int]) -> None:
        """Commit these rows of the last `score`, in order, and drop the others."""


@runtime_checkable
class ExtendingSession(Protocol):
    """A session that can score a tree in parts, where `supports_tree` is true. It has room for any number of nodes."""

    def extend(self, tree: DraftTree, scored: int) -> TargetOutput:
        """Score the nodes of a tree behind its first `scored` ones, and append their rows only.

        Args:
            tree: N nodes.
            scored: nodes whose rows the passes since the last `keep` have appended. The rows of other nodes are
                dropped. 0 scores the whole tree.

        Returns:
            Logits (N - scored, V) and features (N - scored, F). `keep` takes nodes of the whole tree.
        """


class Engine(Protocol):
    """Runs one model, and provides what drafts need of it.

    Attributes:
        config: the model's config.
        runs_in_torch: whether passes need torch's threads.
        position_limit: tokens that a text can have; None if only memory limits it.
    """

    config: PretrainedConfig
    runs_in_torch: bool

    @property
    def position_limit(self) -> int | None: ...

    @property
    def rounding(self) -> torch.dtype:
        """The coarsest float dtype that results pass through; torch.float32 where texts must be identical."""

    def num_parameters(self) -> int:
        """Return the number of weights that a pass reads. May take a while."""

    def check(self) -> None:
        """Refuse a model that cannot be verified, before any long work.

        Raises:
            ValueError: with the reason and the remedy.
        """

    def tables(self) -> Tables:
        """Return the embedding table and the head."""

    def cache(self, given: Any) -> Any:
        """Return the cache to generate with: `given` by the caller, or a new one if it is None. A `TextCache`.

        Raises:
            ValueError: the given cache cannot take back rejected rows.
        """

    def packed_head(self) -> PackedLinear | None:
        """Return the head if its weights are packed on the CPU. Drafts share these weights."""

    def draft_runner(self, draft: nn.Module) -> DraftRunner[Any] | None:
        """Make a runner on this engine for a `DovetailDraft` on the CPU, or return None to run it in torch."""

    def session(
        self,
        cache: Any,
        *,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> AbstractContextManager[TargetSession]:
        """Open a session for one generation that continues the rows of `cache`.

        Args:
            cache: from `cache`.
            max_nodes: rows of the largest tree (N).
            prefill_chunk: prompt rows per pass; None leaves it to the engine.
            model_kwargs: further arguments of the model's forward pass, as `generate` prepared them.
            feature_layers: see `Draft.feature_layers`; () for a session without features.

        Raises:
            ValueError: the engine cannot read these layers, or does not know an argument of the forward pass.
        """
