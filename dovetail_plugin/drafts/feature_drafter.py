"""Drafting: accepted features and tokens in, a `DraftTree` out. Owns the draft's key/value cache.

The cache holds one row for every pair (target feature, next token) of the text so far, made from true
target features only; rows of tree nodes are appended behind them and dropped when the text goes on, so
the prompt is never run twice. What the text gained is run when the next tree is asked for, so text that is
decoded plainly costs the draft nothing until then. Trees grow in inference mode, which takes a seventh off the
launch of the many small operations. Nothing waits for the draft's device inside a level; between levels a judge, if
there is one, reads the level's scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cache import KVRows
from ..report import PhaseClock
from ..tree import DraftTree, TreeBudget, expand, select
from .base import DraftError, DraftModel, DraftRunner, Judge
from .model import DovetailDraft


def without_padding(features: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `Drafter.begin` wants of a prompt whose padding the target ran along: padding is no text.

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


class TorchRunner:
    """A draft's own modules, on whatever device they are."""

    runs_in_torch = True
    weights: str | None = None

    def __init__(self, draft: DovetailDraft) -> None:
        self._draft = draft
        weight = next(draft.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def new_rows(self, capacity: int) -> list[KVRows]:
        """As `DraftRunner.new_rows`: one for each block."""
        return [KVRows(capacity) for _ in self._draft.layers]

    def run(
        self,
        features: Tensor,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: list[KVRows],
        mask: Tensor | None,
        logits_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """As `DraftRunner.run`."""
        predicted = self._draft.step(features[None], tokens[None], rope, rows, mask)[0]
        return predicted, self._draft.head(predicted[logits_from:])


@dataclass
class _Root:
    """Where the next tree grows from: the last token, the prediction of its feature (1, H) and its logits (1, V)."""

    token: Tensor
    predicted: Tensor
    logits: Tensor


class FeatureDrafter:
    """Drafts with a `DovetailDraft`, EAGLE-2 style trees (Dovetail, section 3; EAGLE-2, section 4).

    Args:
        draft: attached to its target; on any device.
        capacity: tokens the text may reach; the cache makes room for them at once.
        clock: where the seconds of this drafter go.
        runner: what runs the draft's steps; None is torch.
    """

    def __init__(self, draft: DraftModel, capacity: int, clock: PhaseClock, runner: DraftRunner | None = None) -> None:
        self.draft = draft
        self.clock = clock
        if runner is None:
            assert isinstance(draft, DovetailDraft), "other drafts bring their runner"
            runner = TorchRunner(draft)
        self.runner: DraftRunner = runner
        self.rows = self.runner.new_rows(capacity)
        self.device, self.dtype = self.runner.device, self.runner.dtype
        self.committed = 0  # pairs of the text, without tree nodes
        self._pending: list[tuple[Tensor, Tensor]] = []  # features and next tokens that were not run yet
        self._root: _Root | None = None

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """As `Drafter.begin`; after an earlier turn of the same text its rows stay and this goes on behind them."""
        self.advance(features, input_ids[1:])

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """As `Drafter.advance`."""
        self._pending.append((features, tokens))

    @torch.inference_mode()
    def catch_up(self) -> None:
        """As `Drafter.catch_up`."""
        if not self._pending:
            return
        with self.clock.phase("transfer"):
            features = self._here(torch.cat([features for features, _ in self._pending]).to(self.dtype))
            tokens = self._here(torch.cat([tokens for _, tokens in self._pending]))
        self._pending.clear()
        with self.clock.phase("draft"):
            for rows in self.rows:
                rows.length = self.committed
            count = tokens.shape[0]
            positions = torch.arange(self.committed, self.committed + count, device=self.device)
            mask = self._causal(count) if self.committed else None
            rope = self.draft.rope_at(positions[None], self.dtype)
            features = self.draft.project(features)
            predicted, logits = self.runner.run(features, tokens, rope, self.rows, mask, count - 1)
            self.committed += count
            self._root = _Root(tokens[-1], predicted[-1:], logits)

    def _here(self, tensor: Tensor) -> Tensor:
        """On the draft's device; to a GPU through pinned memory, so that nobody waits for the copy."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
            tensor = tensor.pin_memory()  # torch reuses such memory only when copies from it are done
        return tensor.to(self.device, non_blocking=True)

    def _causal(self, count: int) -> Tensor:
        """(count, committed + count) additive: new rows see the text and each other, causally."""
        mask = torch.full((count, count), float("-inf"), dtype=self.dtype, device=self.device).triu(1)
        return torch.cat([mask.new_zeros(count, self.committed), mask], dim=1)

    def grow(self, budget: TreeBudget, judge: Judge | None = None) -> DraftTree:
        """As `Drafter.grow`.

        Raises:
            DraftError: a score is not a number.
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
        """As `grow`, but the tree stays on the draft's device; without a judge nothing waits for it."""
        assert self._root is not None and not self._pending, "begin() and catch_up() come first"
        root, device = self._root, self.device
        start = torch.zeros(1, device=device)
        level = expand(start, root.logits, start.long() - 1, budget.top_k, self.draft.token_ids)
        levels, outputs = [level], root.predicted
        rope_of = self._rope_by_depth(budget.depth)
        for rows in self.rows:
            rows.length = self.committed
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
            outputs, logits = self._run(outputs[parents], level.tokens[frontier], visible, rope_of(depth))
            ids = frontier + seen
            seen += level.tokens.shape[0]
            level = expand(scores, logits, ids, budget.top_k, self.draft.token_ids)
            levels.append(level)
        nodes = budget.nodes if judge is None else judge.rows(_fetched(torch.cat([lv.scores for lv in levels])))
        return select(levels, root.token, nodes)

    def grow_chain(
        self, depth: int, pick: Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """A chain whose tokens the caller picks, for verification by draft probabilities.

        Args:
            depth: tokens to draft, 1 or more.
            pick: (logits (1, V), tokens so far) -> (token (1,) int64, scores (1, V) it was picked by).

        Returns:
            tokens (depth,) int64 and scores (depth, V), on the draft's device.
        """
        self.catch_up()
        assert self._root is not None, "begin() comes first"
        for rows in self.rows:
            rows.length = self.committed
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        output, logits = self._root.predicted, self._root.logits
        rope_of = self._rope_by_depth(depth)
        for level in range(1, depth + 1):
            token, picked_by = pick(self.draft.over_vocabulary(logits), tokens)
            tokens.append(token)
            scores.append(picked_by)
            if level < depth:
                visible = torch.ones(1, level, dtype=torch.bool, device=self.device)
                output, logits = self._run(output, token, visible, rope_of(level))
        return torch.cat(tokens), torch.cat(scores)

    def _rope_by_depth(self, depth: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Rotary tables (1, 1, head_dim) of every level of a tree, computed once.

        A node of depth d stands at text position committed + d and pairs with the feature before it.
        """
        positions = torch.arange(self.committed, self.committed + depth, device=self.device)
        cos, sin = self.draft.rope_at(positions[None], self.dtype)
        return lambda d: (cos[:, d - 1 : d], sin[:, d - 1 : d])

    def _run(
        self, features: Tensor, tokens: Tensor, visible: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One level through the draft: (K, H), (K,), (K, tree rows) -> (K, H), (K, V)."""
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(visible.logical_not(), float("-inf"))
        mask = torch.cat([mask.new_zeros(tokens.shape[0], self.committed), mask], dim=1)
        return self.runner.run(features, tokens, rope, self.rows, mask)


def _fetched(scores: Tensor) -> np.ndarray:
    """Scores (M,) on the CPU, for a judge.

    Raises:
        DraftError: one is not a number.
    """
    fetched = scores.cpu().numpy()
    if not np.isfinite(fetched).all():
        raise DraftError("the draft's logits are not finite numbers")
    return fetched
