"""A `DraftRunner` with static shapes: on a GPU the levels of a tree are replayed as CUDA graphs.

Launching the forty-odd small operations of a level one by one takes longer than a small GPU needs to run them. Passes
of up to 16 rows are therefore padded to 1, 2, 4, 8 or 16 rows over 256, 512, ... columns of keys and values. Each such
pair of shapes is captured at its first use and replayed from then on. Longer passes (prompts, long catch-ups) run
without a graph over the same storage. On other devices the same static pass runs without capture.

GPU memory of one text, at b bytes a number: `2 * blocks * kv_heads * head_dim * capacity * b` for keys and values, with
the capacity a power of two; `16 * (V + 3 H + capacity) * b` for what goes in and out of graphs; temporaries of about
`16 * (V + 3 * intermediate) * b`, once, because all graphs of a text share a pool; and what the driver takes for each
graph, of which there are 5 x log2(capacity / 128) at most. cuBLAS takes a workspace for the stream that captures
(8 MiB, 32 MiB on Hopper). The storage of a text is kept when the text ends, for the next one.

Texts of several threads have their own storage and graphs, so that their passes do not meet. Captures are different:
while one goes on, torch gives no random numbers on the GPU to other threads, and frees no memory for them. So passes
are captured while one thread generates; while several do, those that were not captured before run without a graph.
"""

import contextlib
import logging
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..runner import Pass, Predicted
from .cuda_graph_rows import MAX_STATIC_ROWS, MIN_COLUMNS, BlockRows, GraphRows, Store, power_of_two
from .network import DraftNetwork

logger = logging.getLogger(__name__)

WARMUP_RUNS = 3
"""Passes before a capture, in which libraries choose kernels and take workspaces; a capture may not do so."""


class GraphRunner:
    """Runs a draft's steps with static shapes; implements `DraftRunner`.

    Graphs contain addresses of tensors. They are dropped when the draft's weights or the target's head move, and when a
    text outgrows its storage. If a capture fails, the runner never uses graphs again. It serves any number of threads.

    Args:
        draft: attached to its target before the first pass.

    Attributes:
        enable_graphs: whether passes are captured and replayed; may be set to False at any time.
    """

    runs_in_torch = True
    weights: str | None = None

    def __init__(self, draft: DraftNetwork) -> None:
        self._draft_ref = weakref.ref(draft)  # the runner is kept under its draft and must not keep it alive
        self._parameters = list(draft.parameters())
        self.device, self.dtype = self._parameters[0].device, self._parameters[0].dtype
        self.enable_graphs = self.device.type == "cuda"
        self._idle: list[Store] = []  # storage of texts that ended
        self._stream: torch.cuda.Stream | None = None  # captures run on it

    @property
    def _draft(self) -> DraftNetwork:
        draft = self._draft_ref()
        assert draft is not None, "callers of a runner hold its draft"
        return draft

    def new_rows(self, capacity: int) -> GraphRows:
        """Make one object for all blocks, without storage before the first pass."""
        return GraphRows(capacity)

    @torch.no_grad()
    def run(self, step: Pass, rows: GraphRows) -> Predicted:
        """Run the pass. Only captures wait for the device.

        Results are copies, so later passes do not change them. Autocast has no effect.

        Raises:
            ValueError: no target is attached.
        """
        features, mask, count = step.features, step.mask, step.rows
        start, end = rows.length, rows.length + count
        embeddings = self._draft.embed(step.tokens)  # outside of graphs: the table may lie on another device
        rope = self._draft.rope_for(step, self.dtype)
        with _without_autocast(self.device.type):
            if mask is not None and count <= MAX_STATIC_ROWS:
                padded = power_of_two(count)
                store = self._room(rows, end, start + padded)
                store.load(features, embeddings, rope, mask, start)
                self._run_static(store, padded, max(power_of_two(start + padded), MIN_COLUMNS))
                predicted = store.predicted[:count].clone()
                logits = store.logits[step.logits_from : count].clone()
            else:
                store = self._room(rows, end, end)
                embeddings = embeddings.to(device=self.device, dtype=self.dtype, non_blocking=True)
                blocks = store.blocks(torch.arange(start, end, device=self.device), end)
                predicted = self._step(features, embeddings, rope, blocks, mask)
                logits = self._draft.head(predicted[step.logits_from :])
        rows.length = end
        return Predicted(predicted, logits)

    # --- passes --------------------------------------------------------------------------------

    def _step(
        self,
        features: Tensor,
        embeddings: Tensor,
        rope: tuple[Tensor, Tensor],
        blocks: list[BlockRows],
        mask: Tensor | None,
    ) -> Tensor:
        """Run the blocks: features and embeddings (n, H) -> predicted features (n, H)."""
        x = self._draft.fusion(features[None], embeddings[None])
        for layer, own in zip(self._draft.layers, blocks, strict=True):
            x = layer(x, rope, own, mask)
        return x[0]

    def _static_pass(self, store: Store, rows: int, columns: int) -> None:
        """Run what is captured. All numbers that vary come from tensors of `store`, which takes the results too."""
        padding = (store.indices[:rows] >= store.count)[:, None]
        positions = store.start + store.indices[:rows]
        predicted = self._step(
            store.features[:rows].masked_fill(padding, 0.0),
            store.embeddings[:rows].masked_fill(padding, 0.0),
            (store.cos[:, :rows], store.sin[:, :rows]),
            store.blocks(positions, columns),
            store.whole_mask(positions, padding, columns),
        )
        store.predicted[:rows].copy_(predicted)
        store.logits[:rows].copy_(self._draft.head(predicted))

    def _run_static(self, store: Store, rows: int, columns: int) -> None:
        """Replay the graph of the static pass, captured first if needed, or run the pass itself without graphs."""
        assert self._draft.head_weight is not None, "attach() comes first"
        store.fit(self._draft.head_weight.shape[0], self._addresses())
        graph = self._graph(store, rows, columns) if self.enable_graphs else None
        if graph is None:
            self._static_pass(store, rows, columns)
            return
        with torch.inference_mode():  # torch sets its generator's tensors, which others may have made in this mode
            graph.replay()

    def _graph(self, store: Store, rows: int, columns: int) -> torch.cuda.CUDAGraph | None:
        """Return the graph of the static pass, captured if needed; None if it cannot be captured, or not now."""
        kept = store.graphs.get((rows, columns))
        if kept is not None:
            return kept
        with machine.holding_back_others() as alone:
            if not alone:
                return None
            try:
                store.graphs[rows, columns] = captured = self._capture(store, rows, columns)
                return captured
            except RuntimeError as error:
                self.enable_graphs = False
                store.drop_graphs()
                logger.warning("the draft goes on without CUDA graphs: %s: %s", type(error).__name__, error)
                return None

    @torch.inference_mode(False)  # torch makes its generator's tensors, which others must be able to set in any mode
    @torch.no_grad()
    def _capture(self, store: Store, rows: int, columns: int) -> torch.cuda.CUDAGraph:
        """Capture the static pass. The passes before the capture write what the replay after it writes again.

        Raises:
            RuntimeError: CUDA reports an error, or is out of memory.
        """
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream = stream = self._stream or torch.cuda.Stream()
            store.pool = store.pool or torch.cuda.graph_pool_handle()
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARMUP_RUNS):
                        self._static_pass(store, rows, columns)
            finally:
                current.wait_stream(stream)
            graph, pool = torch.cuda.CUDAGraph(), store.pool
            try:
                # The stream is entered twice because `torch.cuda.graph` does not leave it when a capture fails.
                # "thread_local": other threads may use the GPU during the capture.
                with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, stream, "thread_local"):
                    self._static_pass(store, rows, columns)
            except RuntimeError:
                _recover(stream, pool)
                raise
        return graph

    def _addresses(self) -> tuple[int, ...]:
        """Return the addresses of the weights that graphs read."""
        if not self.enable_graphs:
            return ()
        tables = (self._draft.head_weight, self._draft.head_bias)
        return tuple(weight.data_ptr() for weight in (*self._parameters, *tables) if weight is not None)

    # --- storage -------------------------------------------------------------------------------

    def _room(self, own: GraphRows, end: int, padded_end: int) -> Store:
        """Return the text's storage with room for a pass up to row `end`, without the rows that were dropped."""
        store = own.store
        if store is None:
            store = own.store = self._take(power_of_two(max(own.capacity, padded_end, MIN_COLUMNS)))
            # The storage is not freed here, because garbage collection may run in the middle of a capture.
            weakref.finalize(own, self._idle.append, store).atexit = False
        store.forget(own.length)
        if padded_end > store.capacity:
            store.reserve(power_of_two(padded_end), own.length)
        store.expect(end, padded_end)
        return store

    def _take(self, capacity: int) -> Store:
        """Return storage that an ended text left, with its graphs, or new one.

        Other idle storage is freed, except while other threads generate, whose next texts will want it.
        """
        left = self._pop_idle(capacity)
        if machine.alone():
            self._idle.clear()
        if left is None:
            return Store(self._draft, capacity)
        left.clear()
        return left

    def _pop_idle(self, capacity: int) -> Store | None:
        """Remove the first idle storage with room for `capacity` rows, and the smaller ones before it."""
        while self._idle:
            try:
                left = self._idle.pop(0)  # no two threads get the same one
            except IndexError:  # another thread got the last one
                break
            if left.capacity >= capacity:
                return left
        return None


def _recover(stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what a failed capture leaves behind.

    The allocator of torch before 2.12 believes that the capture is still going on and frees no memory, and the
    generator gives no random numbers before another capture ends.
    """
    with contextlib.suppress(RuntimeError, AttributeError):  # it has ended, or this torch has no such function
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
    another = torch.cuda.graph(torch.cuda.CUDAGraph(), None, stream, "thread_local")
    with contextlib.suppress(RuntimeError), torch.cuda.stream(stream), another:
        torch.zeros(1, device=stream.device)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Disable autocast, which frees its cast weights although a graph would go on reading them."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
