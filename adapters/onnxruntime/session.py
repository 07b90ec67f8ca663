"""One generation on an ONNX Runtime target, over keys and values in buffers of this process.

The runtime reads the buffers in place. The mask hides their free rows, and positions are inputs of the graph. A pass
returns only its new rows, and those of the accepted path are written into the buffers. Inside the graph an export joins
the old rows and the new ones, one layer at a time, so each pass copies the cache once. This module knows nothing of
models and how they are loaded.
"""

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from dovetail_plugin.targets.base import TargetOutput
from dovetail_plugin.tree import DraftTree

from ..stored_graph import FIRST_LOGIT_ROW, NO_BIAS, TREE_BIAS
from ..stored_target import PREFILL_ROWS, GraphTraits, OneAtATime, feature_outputs, seen_and_positions, tree_bias
from . import graph

STEP = 64
"""Rows by which buffers grow. Attention runs over free rows too, so there are never more free rows than this."""


class OnnxRuntimeCache:
    """Keys and values of one text, as `past_key_values` of a later turn. A target can serve several caches at once.

    Args:
        layout: keys and values of every layer; see `graph.Prepared`.
        dtype: dtype of keys and values.

    Attributes:
        rows: keys and values of every layer, (1, heads, capacity, head_dim) each. Rows from `tokens` on are free.
        values: the same memory as values of the runtime.
        seen: (capacity,) int64, 1 for each row that may be attended to, 0 at padding and free rows.
        tokens: tokens of the text, padding included.
        position: position of the next token.
        user: the session that uses the cache.
    """

    def __init__(self, layout: list[graph.Rows], dtype: np.dtype) -> None:
        self.layout = layout
        self.rows = [np.zeros((1, each.heads, 0, each.head_dim), dtype=dtype) for each in layout]
        self.values = [ort.OrtValue.ortvalue_from_numpy(rows) for rows in self.rows]
        self.seen = np.zeros(0, dtype=np.int64)
        self.tokens = self.position = 0
        self.user = OneAtATime()

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers hold the same rows
        """Return the number of tokens held, padding included."""
        return self.tokens

    @property
    def capacity(self) -> int:
        """Number of rows of the buffers."""
        return len(self.seen)

    def append(self, new: list[np.ndarray], seen: np.ndarray) -> None:
        """Add rows of n tokens.

        Args:
            new: (1, heads, n, head_dim) for each buffer.
            seen: (n,) int64, 0 at padding.
        """
        end = self.tokens + len(seen)
        if end > self.capacity:
            self._grow(-(-end // STEP) * STEP)
        for rows, added in zip(self.rows, new, strict=True):
            rows[:, :, self.tokens : end] = added
        self.seen[self.tokens : end] = seen
        self.tokens = end

    def _grow(self, capacity: int) -> None:
        """Copy the buffers into larger ones, one by one, so that there is never a second cache in memory."""
        for index, old in enumerate(self.rows):
            self.rows[index] = np.zeros((*old.shape[:2], capacity, old.shape[3]), dtype=old.dtype)
            self.rows[index][:, :, : self.tokens] = old[:, :, : self.tokens]
            self.values[index] = ort.OrtValue.ortvalue_from_numpy(self.rows[index])
        self.seen = np.concatenate([self.seen, np.zeros(capacity - self.capacity, dtype=np.int64)])


class OnnxRuntimeSession:
    """One generation on a loaded graph; implements `StoredSession`. Use it as a context manager.

    Args:
        runtime: ONNX Runtime's own session over the graph.
        cache: keys and values of the text so far.
        traits: properties of the graph.
        exact: draft chains only and give the runtime no free rows; see `OnnxRuntimeTarget.from_pretrained`.
        same_kernels: run single rows as two.
        max_nodes: rows of the largest tree (N).
        prefill_chunk: prompt rows per pass; None takes `PREFILL_ROWS`.
        feature_layers: see `Draft.feature_layers`. The graph must have these outputs.
    """

    def __init__(
        self,
        runtime: ort.InferenceSession,
        cache: OnnxRuntimeCache,
        traits: GraphTraits,
        *,
        exact: bool,
        same_kernels: bool,
        max_nodes: int,
        prefill_chunk: int | None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        self._runtime, self._cache, self._traits = runtime, cache, traits
        self._exact, self._same_kernels, self._max_nodes = exact, same_kernels, max_nodes
        self._chunk = prefill_chunk or PREFILL_ROWS
        self._features = feature_outputs(feature_layers)
        self.max_length = traits.max_length
        self.limitation: str | None = None
        self._new: list[np.ndarray] = []  # keys and values of the latest pass

    def __enter__(self) -> "OnnxRuntimeSession":
        self._cache.user.begin()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._new = []
        self._cache.user.end()

    def _counts_rows(self, new: int) -> bool:
        """Return whether a row's place in the cache has to be its place in the text, in a pass of `new` rows.

        This is the case where the graph has no position ids, where a sliding window could reach into the text, and
        with `exact`. The runtime then gets copies of the buffers without their free rows, and drafts are chains.
        """
        traits = self._traits
        near_window = traits.window is not None and self._cache.capacity + new >= traits.window
        return near_window or self._exact or not traits.takes_positions

    @property
    def supports_tree(self) -> bool:
        """False where a row's place in the cache counts: chains are exact there, trees are not."""
        return not self._counts_rows(self._max_nodes)

    def levels_left(self) -> None:
        """Return None: passes are alike up to `max_length`."""

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, cached: int = 0) -> TargetOutput:
        """Run the prompt in chunks; see `TargetSession.prefill`."""
        input_ids = input_ids[:, cached:]
        cache, first = self._cache, self._cache.tokens
        total = first + input_ids.shape[1]
        seen, positions = seen_and_positions(total, attention_mask, tokens=first, position=cache.position)
        features, logits = [], np.empty(0)
        for start in range(first, total, self._chunk):
            rows = slice(start, min(start + self._chunk, total))
            ids = input_ids[0, rows.start - first : rows.stop - first].numpy()
            logits, hidden = self._run(ids, seen[rows], positions[rows], last_only=True)
            features.append(torch.from_numpy(hidden))
            cache.append(self._new, seen[rows])
            cache.position = int(positions[rows.stop - 1]) + 1  # an interrupted prompt leaves a valid cache
        return TargetOutput(torch.from_numpy(logits), torch.cat(features))

    def score(self, tree: DraftTree) -> TargetOutput:
        """Run a tree; its rows stay outside the cache until `keep`. See `TargetSession.score`."""
        slots = self._cache.tokens if self._counts_rows(len(tree)) else self._cache.capacity
        positions = self._cache.position + tree.depths.numpy()
        ones = np.ones(len(tree), dtype=np.int64)
        logits, hidden = self._run(tree.tokens.numpy(), ones, positions, tree_bias(tree, slots))
        return TargetOutput(torch.from_numpy(logits), torch.from_numpy(hidden))

    def keep(self, path: list[int]) -> None:
        """Write the path's rows into the cache's buffers; see `TargetSession.keep`."""
        self._cache.append([rows[:, :, path] for rows in self._new], np.ones(len(path), dtype=np.int64))
        self._cache.position += len(path)

    def score_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Run a whole text in one pass; see `StoredSession.score_text`."""
        seen, positions = seen_and_positions(input_ids.shape[1], attention_mask, tokens=0, position=0)
        logits, _ = self._run(input_ids[0].numpy(), seen, positions)
        return torch.from_numpy(logits)[None]

    def _run(
        self,
        ids: np.ndarray,
        seen: np.ndarray,
        positions: np.ndarray,
        bias: np.ndarray | None = None,
        last_only: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run n rows behind the cache, and hold their keys and values for `append`.

        Args:
            ids: (n,) int64 tokens.
            seen: (n,) int64, 0 at padding.
            positions: (n,) int64.
            bias: (1, 1, n, slots + n) float32 of a tree, or None.
            last_only: compute the logits of the last row only.

        Returns:
            Logits (n or 1, V) and features (n, F), float32.
        """
        rows = len(ids)
        wanted = 1 if last_only else rows
        if rows == 1 and self._same_kernels:  # the second row is dropped below
            ids, seen, positions = np.repeat(ids, 2), np.repeat(seen, 2), np.repeat(positions, 2)
        elif self._same_kernels:
            wanted = max(wanted, 2)  # the head has a kernel for single rows, too
        past, old_seen = self._past(len(ids))
        inputs = {
            "input_ids": ids[None],
            "attention_mask": np.concatenate([old_seen, seen])[None],
            TREE_BIAS: NO_BIAS if bias is None else bias,
            FIRST_LOGIT_ROW: np.array([rows - wanted], dtype=np.int64),
        }
        if self._traits.takes_positions:
            inputs[graph.POSITIONS] = positions[None].astype(np.int64)
        values = {name: ort.OrtValue.ortvalue_from_numpy(given) for name, given in inputs.items()}
        outputs = ["logits", *self._features, *(each.new for each in self._cache.layout)]
        found = [value.numpy() for value in self._runtime.run_with_ort_values(outputs, values | past)]
        kinds = 1 + len(self._features)
        self._new = [new[:, :, :rows] for new in found[kinds:]]
        logits = found[0][0][:wanted].astype(np.float32, copy=False)
        features = np.concatenate([each[0][:rows] for each in found[1:kinds]], axis=-1)
        return logits[-1:] if last_only else logits, features

    def _past(self, new: int) -> tuple[dict[str, ort.OrtValue], np.ndarray]:
        """Return the cache as inputs of the graph and its mask (m,), for a pass of `new` rows.

        The values are the buffers themselves, or copies without the free rows; see `_counts_rows`.
        """
        cache, names = self._cache, [each.past for each in self._cache.layout]
        if not self._counts_rows(new):
            return dict(zip(names, cache.values, strict=True)), cache.seen
        held = [np.ascontiguousarray(rows[:, :, : cache.tokens]) for rows in cache.rows]
        values = [ort.OrtValue.ortvalue_from_numpy(rows) for rows in held]
        return dict(zip(names, values, strict=True)), cache.seen[: cache.tokens]
