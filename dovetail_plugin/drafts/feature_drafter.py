"""Grows trees from target features: accepted features and tokens in, a `DraftTree` out. Owns the draft's rows.

There is one row for every pair (target feature, next token) of the text, made from true target features only. Rows of
tree nodes are appended after them and dropped when the text continues, so the prompt is never run twice. New pairs are
run only when the next tree is needed, so the draft does no work while text is decoded plainly.

Trees grow in inference mode, which saves a seventh of the time to launch the many small operations. Nothing waits for
the draft's device inside a level; between levels a judge, if there is one, reads the level's scores.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..report import PhaseClock
from ..runner import DraftRunner, Pass, Predicted
from ..tree import DraftTree, TreeBudget, expand, select
from .base import Drafter, DraftError, Judge


class DraftModel(Protocol):
    """The part of a draft that a `FeatureDrafter` uses besides a runner.

    Attributes:
        token_ids: (v,) int64 tokens that the logits belong to; None is the whole vocabulary.
    """

    @property
    def token_ids(self) -> Tensor | None: ...

    def project(self, features: Tensor) -> Tensor:
        """Turn features of the target into those that the runner reads."""

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Return logits over the target's whole vocabulary."""


class ChainDrafter(Drafter):
    """A drafter that can also grow a chain whose tokens the caller picks, for transformers' assisted loop."""

    @abstractmethod
    def grow_chain(
        self, depth: int, pick: Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Grow a chain.

        Args:
            depth: tokens to draft, 1 or more.
            pick: (logits (1, V), tokens so far) -> (token (1,) int64, scores (1, V) that it was picked by).

        Returns:
            tokens (depth,) int64 and scores (depth, V), on the draft's device.
        """


def without_padding(features: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Remove padding, which the target has run too, from the arguments of `Drafter.begin`.

    Args:
        features: (n, F) of the last n tokens before the newest one.
        input_ids: (n + 1,) or more; the newest token is the last.
        attention_mask: (1, m) over the tokens before the newest one, m at least n; None without padding.

    Returns:
        features (T, F) and input_ids (T + 1,) of the real tokens.
    """
    rows = features.shape[0]
    input_ids = input_ids[-(rows + 1) :]
    if attention_mask is None:
        return features, input_ids
    real = attention_mask[0, -rows:].bool()
    return features[real], torch.cat([input_ids[:-1][real], input_ids[-1:]])


@dataclass
class _Root:
    """Where the next tree grows from.

    Attributes:
        token: (1,) int64, the last token of the text.
        predicted: (1, H) prediction of its feature.
        logits: (1, V) of the token after it.
    """

    token: Tensor
    predicted: Tensor
    logits: Tensor


class FeatureDrafter(ChainDrafter):
    """Grows EAGLE-2 style trees (Dovetail, section 3; EAGLE-2, section 4).

    Args:
        draft: attached to its target; on any device.
        runner: runs the draft's steps.
        capacity: tokens to make room for at once.
        clock: where the seconds of this drafter are counted.
    """

    def __init__(self, draft: DraftModel, runner: DraftRunner[Any], *, capacity: int, clock: PhaseClock) -> None:
        self.draft, self.runner, self.clock = draft, runner, clock
        self.rows = runner.new_rows(capacity)
        self.device, self.dtype, self.runs_in_torch = runner.device, runner.dtype, runner.runs_in_torch
        self.committed = 0  # pairs of the text, without tree nodes
        self._pending: list[tuple[Tensor, Tensor]] = []  # features and next tokens that were not run yet
        self._root: _Root | None = None

    def identity(self) -> list[Any]:
        """Return kind, device and dtypes of the runner."""
        runner = self.runner
        return [type(runner).__name__, runner.device, runner.dtype, runner.weights]

    def takes(self, runner: DraftRunner[Any]) -> bool:
        """Go on with `runner`, which may have newer weights, if this drafter's rows are what it would make.

        Returns:
            Whether kind, device and dtype are the same.
        """
        own = self.runner
        fits = (type(own), own.device, own.dtype) == (type(runner), runner.device, runner.dtype)
        if fits:
            self.runner = runner
        return fits

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Start a text, or continue after the rows of an earlier turn. See `Drafter.begin`."""
        self.advance(features, input_ids[1:])

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """Remember what the text gained, to be run by the next `catch_up`. See `Drafter.advance`."""
        self._pending.append((features, tokens))

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Run the pairs that the text gained and predict the next token."""
        if not self._pending:
            return
        with self.clock.phase("transfer"):
            features = self._here(torch.cat([features for features, _ in self._pending]).to(self.dtype))
            tokens = self._here(torch.cat([tokens for _, tokens in self._pending]))
        self._pending.clear()
        with self.clock.phase("draft"):
            self.rows.length = self.committed
            count = tokens.shape[0]
            mask = self._causal(count) if self.committed else None
            features = self.draft.project(features)
            step = Pass(features, tokens, self.committed, mask=mask, logits_from=count - 1)
            predicted = self.runner.run(step, self.rows)
            self.committed += count
            self._root = _Root(tokens[-1], predicted.features[-1:], predicted.logits)

    def _here(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the draft's device; to a GPU through pinned memory, so that nothing waits for the copy."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
            tensor = tensor.pin_memory()  # torch reuses such memory only when copies from it are done
        return tensor.to(self.device, non_blocking=True)

    def _causal(self, count: int) -> Tensor | None:
        """Return an additive mask (count, committed + count): new rows see the text, and each other causally.

        A drafter whose runner makes this mask itself returns None.
        """
        mask = torch.full((count, count), float("-inf"), dtype=self.dtype, device=self.device).triu(1)
        return torch.cat([mask.new_zeros(count, self.committed), mask], dim=1)

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """Grow a tree and fetch it. See `Drafter.grow`.

        Raises:
            DraftError: a score is not finite.
        """
        self.catch_up()
        with self.clock.phase("draft"):
            tree = self.grow_on_device(budget, judge)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # so that the fetch below is timed alone
        with self.clock.phase("transfer"):
            tree = tree.to("cpu")
        if not bool(tree.scores.isfinite().all()):
            raise DraftError("the draft's logits are not finite numbers")
        return tree

    @torch.inference_mode()
    def grow_on_device(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """Grow a tree that stays on the draft's device. Without a judge nothing waits for the device."""
        assert self._root is not None and not self._pending, "begin() and catch_up() come first"
        root, device = self._root, self.device
        start = torch.zeros(1, device=device)
        level = expand(start, root.logits, start.long() - 1, budget.top_k, self.draft.token_ids)
        levels, outputs = [level], root.predicted
        self.rows.length = self.committed
        visible = torch.zeros(1, 0, dtype=torch.bool, device=device)  # tree rows the parents see
        seen = 0  # candidates of the levels above
        for depth in range(1, budget.depth):
            width = budget.top_k if judge is None else judge.width(_fetched(level.scores))
            if width == 0:
                break
            scores, frontier = level.scores.topk(min(width, level.scores.shape[0]))
            parents = level.parent_rows[frontier]
            own = torch.eye(frontier.shape[0], dtype=torch.bool, device=device)
            visible = torch.cat([visible[parents], own], dim=1)
            predicted = self._run(outputs[parents], level.tokens[frontier], visible, depth)
            outputs = predicted.features
            ids = frontier + seen
            seen += level.tokens.shape[0]
            level = expand(scores, predicted.logits, ids, budget.top_k, self.draft.token_ids)
            levels.append(level)
        nodes = budget.nodes if judge is None else judge.rows(_fetched(torch.cat([lv.scores for lv in levels])))
        return select(levels, root.token, nodes)

    def grow_chain(
        self, depth: int, pick: Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Grow a chain for verification by draft probabilities. See `ChainDrafter.grow_chain`."""
        self.catch_up()
        assert self._root is not None, "begin() comes first"
        self.rows.length = self.committed
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        output, logits = self._root.predicted, self._root.logits
        for level in range(1, depth + 1):
            token, picked_by = pick(self.draft.over_vocabulary(logits), tokens)
            tokens.append(token)
            scores.append(picked_by)
            if level < depth:
                visible = torch.ones(1, level, dtype=torch.bool, device=self.device)
                predicted = self._run(output, token, visible, level)
                output, logits = predicted.features, predicted.logits
        return torch.cat(tokens), torch.cat(scores)

    def _run(self, features: Tensor, tokens: Tensor, visible: Tensor, depth: int) -> Predicted:
        """Run one level of the tree through the draft.

        A node of depth d has the text position committed + d and is paired with the feature before it.

        Args:
            features: (K, H) predicted for the nodes' parents.
            tokens: (K,) int64 of the nodes.
            visible: (K, tree rows) bool, the nodes' ancestors and themselves.
            depth: of the nodes.
        """
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(visible.logical_not(), float("-inf"))
        mask = torch.cat([mask.new_zeros(tokens.shape[0], self.committed), mask], dim=1)
        step = Pass(features, tokens, self.committed + depth - 1, is_level=True, mask=mask)
        return self.runner.run(step, self.rows)


def _fetched(scores: Tensor) -> np.ndarray:
    """Return scores (M,) on the CPU, for a judge.

    Raises:
        DraftError: one is not finite.
    """
    fetched = scores.cpu().numpy()
    if not np.isfinite(fetched).all():
        raise DraftError("the draft's logits are not finite numbers")
    return fetched
