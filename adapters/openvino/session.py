"""One generation on an OpenVINO target.

A session runs prompts and trees over a prepared graph. The keys and values of a text are the state of one inference
request, which belongs to the text's cache and is freed with it. So texts do not affect each other, in whatever order or
threads they are generated. Rows of rejected nodes stay in the state as holes until there are so many that they are
removed. This module knows nothing of models and how they are loaded.
"""

import numpy as np
import torch
from torch import Tensor

from dovetail_plugin.targets.base import TargetOutput
from dovetail_plugin.tree import DraftTree

from ..stored_graph import FIRST_LOGIT_ROW, NO_BIAS, TREE_BIAS
from ..stored_target import PREFILL_ROWS, GraphTraits, OneAtATime, feature_outputs, seen_and_positions, tree_bias
from .graph import ov
from .rows import RowSlots

FREE_HOLES = 128
"""Holes that are left in the state whatever the length of the text; see `OpenVINOSession.keep`."""

BLOCK, REST = 64, 48
"""Rows that OpenVINO multiplies together, and the largest rest that is faster in a pass by itself: 65 rows of an int8
target take 420 ms, 64 rows take 288 ms, and 64 rows followed by one row take a fifth less than 65."""


def prompt_passes(rows: int, most: int) -> list[int]:
    """Return the number of rows of each pass over a prompt: whole blocks, and a short rest by itself.

    Args:
        rows: rows of the prompt.
        most: rows of the largest pass.
    """
    passes = [most] * (rows // most)
    last = rows % most
    rest = last % BLOCK
    if last > BLOCK and 0 < rest <= REST:
        passes.append(last - rest)
        last = rest
    return passes + [last] * (last > 0)


class OpenVINOCache(RowSlots):
    """The rows of a text in the state of a request, as `past_key_values` of a later turn.

    Attributes:
        request: holds the rows, from the first session on.
        target: identifies the target that the request belongs to, once there is one.
        user: the session that uses the cache.
        seen: (n,) int64, 1 for each row in use that may be attended to, 0 at padding.
        position: position of the next token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.request: ov.InferRequest | None = None
        self.target: object | None = None
        self.user = OneAtATime()
        self.seen = np.zeros(0, dtype=np.int64)
        self.position = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "OpenVINOCache":
        """Copy the rows into a request of the copy, so that a text can go on in two ways."""
        copied = OpenVINOCache()
        copied.slots, copied.used, copied.seen = self.slots, self.used.copy(), self.seen.copy()
        copied.position, copied.target, copied.request = self.position, self.target, self.request
        if self.request is not None:
            copied.move_to(self.request.get_compiled_model().create_infer_request())
        return copied

    def move_to(self, request: ov.InferRequest) -> None:
        """Copy the state to another request, whose graph has the same layers."""
        if self.request is not None:
            held = {state.name: state.state for state in self.request.query_state()}
            for state in request.query_state():
                state.state = held[state.name]
        self.request = request

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers hold the same rows
        """Return the number of tokens held, padding included."""
        return self.length

    def commit(self, slots: np.ndarray, seen: np.ndarray) -> None:
        """Take rows into use that hold the next tokens of the text.

        Args:
            slots: (n,) int64, see `use`.
            seen: (n,) int64, 0 at padding.
        """
        self.use(slots)
        self.seen = np.concatenate([self.seen, seen])

    def mask(self) -> np.ndarray:
        """Return the attention mask of the state: (slots,) int64, 0 at padding and holes."""
        mask = np.zeros(self.slots, dtype=np.int64)
        mask[self.used] = self.seen
        return mask


def has_outputs(compiled: ov.CompiledModel, names: list[str]) -> bool:
    """Return whether a graph has all of these outputs."""
    return set(names) <= {name for port in compiled.outputs for name in port.get_names()}


def set_neutral(request: ov.InferRequest) -> None:
    """Set inputs that leave the function of the graph as it is, for users of the request who do not know them."""
    request.set_tensor(TREE_BIAS, ov.Tensor(NO_BIAS))
    request.set_tensor(FIRST_LOGIT_ROW, ov.Tensor(np.zeros(1, dtype=np.int64)))


class OpenVINOSession:
    """One generation on a target; implements `StoredSession`. Use it as a context manager.

    Args:
        compiled: the graph. A cache without a request, or with one that lacks outputs for `feature_layers`, gets one.
        row_axis: dimension of the state's tensors that counts rows.
        cache: rows of the text so far.
        traits: properties of the graph.
        exact: draft chains only and remove holes in every round; see `OpenVINOEngine`.
        max_nodes: rows of the largest tree (N).
        prefill_chunk: prompt rows per pass; None takes `PREFILL_ROWS`.
        feature_layers: see `Draft.feature_layers`. The graph must have these outputs.
    """

    def __init__(
        self,
        compiled: ov.CompiledModel,
        row_axis: int,
        cache: OpenVINOCache,
        traits: GraphTraits,
        *,
        exact: bool,
        max_nodes: int,
        prefill_chunk: int | None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        self._compiled, self._row_axis, self._cache, self._traits = compiled, row_axis, cache, traits
        self._exact, self._max_nodes = exact, max_nodes
        self._chunk = prefill_chunk or PREFILL_ROWS
        self._features = feature_outputs(feature_layers)
        self.max_length = traits.max_length
        self.limitation: str | None = None
        self._scored = np.zeros(0, dtype=np.int64)  # slots of the latest tree

    def __enter__(self) -> "OpenVINOSession":
        cache = self._cache
        cache.user.begin()
        try:
            if cache.request is None or not has_outputs(cache.request.get_compiled_model(), self._features):
                cache.move_to(self._compiled.create_infer_request())
            elif cache.slots == 0:
                cache.request.reset_state()
        except BaseException:
            cache.user.end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cache.user.end()

    @property
    def _request(self) -> ov.InferRequest:
        assert self._cache.request is not None, "the session was opened"
        return self._cache.request

    @property
    def _near_window(self) -> bool:
        """Whether a sliding window could reach into the text. The graph's window counts rows, not positions."""
        window = self._traits.window
        return window is not None and self._cache.slots + self._max_nodes >= window

    @property
    def supports_tree(self) -> bool:
        """False where the window counts rows: chains are exact there, trees are not."""
        return self._traits.takes_positions and not self._near_window and not self._exact

    def levels_left(self) -> None:
        """Return None: passes are alike up to `max_length`."""

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, cached: int = 0) -> TargetOutput:
        """Run the prompt in chunks; see `TargetSession.prefill`."""
        input_ids = input_ids[:, cached:]
        cache, first = self._cache, self._cache.length
        total = first + input_ids.shape[1]
        seen, positions = seen_and_positions(total, attention_mask, tokens=first, position=cache.position)
        if self._traits.window is not None:
            self._compact()
        features, logits = [], np.empty(0)
        start = first
        for count in prompt_passes(total - first, self._chunk):
            rows = slice(start, start + count)
            ids = input_ids[0, start - first : start - first + count].numpy()
            logits, hidden = self._infer(ids, seen[rows], positions[rows], first_logit_row=count - 1)
            cache.commit(self._scored, seen[rows])
            cache.position = int(positions[start + count - 1]) + 1  # an interrupted prompt leaves a valid cache
            features.append(torch.from_numpy(hidden))
            start += count
        return TargetOutput(torch.from_numpy(logits), torch.cat(features))

    def score(self, tree: DraftTree) -> TargetOutput:
        """Run a tree; its rows are holes until `keep`. See `TargetSession.score`."""
        if self._near_window:
            self._compact()
        positions = self._cache.position + tree.depths.numpy()
        bias = tree_bias(tree, self._cache.slots)
        logits, hidden = self._infer(tree.tokens.numpy(), np.ones(len(tree), dtype=np.int64), positions, bias)
        return TargetOutput(torch.from_numpy(logits), torch.from_numpy(hidden))

    def keep(self, path: list[int]) -> None:
        """Take the path's rows into use. The others stay holes until those are half as many as the tokens.

        A hole costs what a row of the cache costs in each pass, which is little beside the weights, while removing
        holes copies the state of every layer through the host.
        """
        cache = self._cache
        cache.commit(self._scored[path], np.ones(len(path), dtype=np.int64))
        cache.position += len(path)
        if self._exact or cache.holes > FREE_HOLES + cache.length // 2:
            self._compact()

    def score_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Run a whole text in one pass; see `StoredSession.score_text`."""
        seen, positions = seen_and_positions(input_ids.shape[1], attention_mask, tokens=0, position=0)
        logits, _ = self._infer(input_ids[0].numpy(), seen, positions)
        return torch.from_numpy(logits)[None]

    def _infer(
        self,
        ids: np.ndarray,
        seen: np.ndarray,
        positions: np.ndarray,
        bias: np.ndarray | None = None,
        first_logit_row: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run n rows and append them to the state as holes.

        Args:
            ids: (n,) int64 tokens.
            seen: (n,) int64, 0 at padding.
            positions: (n,) int64.
            bias: (1, 1, n, slots + n) float32 of a tree, or None.
            first_logit_row: first row whose logits are computed.

        Returns:
            Logits (n - first_logit_row, V) and features (n, F), float32 copies.
        """
        inputs = {
            "input_ids": ids[None],
            "attention_mask": np.concatenate([self._cache.mask(), seen])[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
            TREE_BIAS: NO_BIAS if bias is None else bias,
            FIRST_LOGIT_ROW: np.array([first_logit_row], dtype=np.int64),
        }
        if self._traits.takes_positions:
            inputs["position_ids"] = positions[None].astype(np.int64)
        request = self._request
        request.infer(inputs, share_inputs=True)
        self._scored = self._cache.grow(len(ids))
        features = [request.get_tensor(name).data[0] for name in self._features]
        return request.get_tensor("logits").data[0].copy(), np.concatenate(features, axis=-1)

    def _compact(self) -> None:
        """Remove the holes from the state, if there are any."""
        if self._cache.holes:
            self._cache.compact(self._request, self._row_axis)
