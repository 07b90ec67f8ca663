"""Runs a draft as an OpenVINO graph, for machines without a GPU.

A `DovetailDraft` that is attached to its target goes in, and a `DraftRunner` comes out. The graph is traced from the
draft's own modules and its weights are compressed to int4 or int8, which makes a step three times as fast as in torch.
Keys and values are the state of one request for each text. Rows of rejected nodes stay there as holes that the mask
hides. This module knows nothing of trees or targets.
"""

import contextlib
import logging
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn

from dovetail_plugin import machine
from dovetail_plugin.drafts.network import DraftNetwork
from dovetail_plugin.runner import Pass, Predicted

from ..stored_graph import HIDDEN, missing_package
from .rows import RowSlots

try:
    import nncf
    import rich
except ImportError as error:
    raise ImportError(
        missing_package("Drafts on OpenVINO", "nncf", extra="openvino") + ' Set draft.runner = "torch" to do without.'
    ) from error

GROUP = 128
"""Number of inputs of a matrix product that share a scale, in int4 weights and in activations rounded to int8."""

COMPRESSION: dict[str, dict[str, Any]] = {
    "int4": {
        "mode": nncf.CompressWeightsMode.INT4_SYM,
        "group_size": GROUP,
        "advanced_parameters": nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
    },
    "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
}

_one_graph = threading.RLock()
"""Held while a graph is made, which takes seconds and happens once for a draft. Tracing and compression keep what they
are doing in places that belong to the whole process, so two threads must not do it at once."""

SPARE_HOLES = 512
"""Holes that are left in the state whatever the number of rows in use."""


class _TracedRows:
    """Key/value rows while the graph is traced; implements `AttentionRows` by concatenation."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


class _Step(nn.Module):
    """One draft step and the head, with rows as inputs and outputs, as it is traced."""

    def __init__(self, draft: DraftNetwork) -> None:
        super().__init__()
        self.fusion, self.layers, self._head = draft.fusion, draft.layers, draft.head

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        logit_rows: Tensor,
        beam_idx: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run one step over n rows behind m rows, for a head dimension d.

        Args:
            features: (1, n, H).
            embeddings: (1, n, H) of the tokens after the features.
            cos: (1, n, d) cosines of the rotary embedding.
            sin: (1, n, d) sines of the rotary embedding.
            mask: (n, m + n) additive.
            logit_rows: (l,) int64 rows whose logits are computed.
            beam_idx: (1,) int32 zeros. OpenVINO recognizes a key/value state by the Gather that this feeds.
            past: keys and values of each block, (1, heads, m, d) each.

        Returns:
            Predicted features (1, n, H), logits (1, l, V), then keys and values of each block, (1, heads, m + n, d).
        """
        pairs = zip(past[::2], past[1::2], strict=True)
        rows = [_TracedRows(keys.index_select(0, beam_idx), values.index_select(0, beam_idx)) for keys, values in pairs]
        x = self.fusion(features, embeddings)
        for layer, own in zip(self.layers, rows, strict=True):
            x = layer(x, (cos, sin), own, mask)
        logits = self._head(x.index_select(1, logit_rows))
        return x, logits, *(tensor for own in rows for tensor in (own.keys, own.values))


INPUTS = ("features", "embeddings", "cos", "sin", "mask", "logit_rows", "beam_idx")


def default_weights() -> str:
    """Return "int4" where the CPU has instructions for products of eight-bit numbers, "int8" elsewhere.

    The bytes of its weights limit a draft's pass, and four bits cost one accepted token in a hundred. How fast CPUs
    without such instructions unpack four bits has not been measured.
    """
    return "int4" if {"avx512_vnni", "amx_int8"} & machine.vector_extensions() else "int8"


def draft_graph(draft: DraftNetwork, weights: str) -> ov.Model:
    """Make the stateful graph of one draft step.

    Args:
        draft: draft that is attached to its target. Its tables and weights are copied into the graph.
        weights: "int4", "int8" or "f32". With "int4" the head and matrices that do not divide into groups are int8.
    """
    with _one_graph:
        model = _traced(draft)
        if weights == "f32":
            return model
        with _quiet_nncf():
            return nncf.compress_weights(model, **COMPRESSION[weights])


def _copy_in_float32(draft: DraftNetwork) -> DraftNetwork:
    """Return a copy of the network with its head. It has neither embedding table nor rotary table."""
    weights = {name: _float32(weight) for name, weight in draft.state_dict().items()}
    with torch.device("meta"):  # initial weights must not take draws from the sampling of other threads
        copy = DraftNetwork(draft.config).eval()
    copy.load_state_dict(weights, assign=True)
    assert draft.head_weight is not None, "the draft has to be attached first"
    if draft.config.fusion != "eagle3":  # an EAGLE-3 draft has its own head, which the state dict holds
        copy.head_weight = draft.head_weight.float()
    copy.head_bias = None if draft.head_bias is None else draft.head_bias.float()
    return copy


def _float32(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32 if weight.is_floating_point() else weight.dtype, copy=True)


def _traced(draft: DraftNetwork) -> ov.Model:
    """Return the graph of one draft step with its rows as state."""
    config = draft.config
    n, past, size, heads, dim = 3, 5, config.hidden_size, config.num_key_value_heads, config.head_dim
    assert heads is not None and dim is not None  # the configuration fills them in
    example = (
        torch.zeros(1, n, size),
        torch.zeros(1, n, size),
        torch.zeros(1, n, dim),
        torch.zeros(1, n, dim),
        torch.zeros(n, n + past),
        torch.arange(n),
        torch.zeros(1, dtype=torch.int32),
        [torch.zeros(1, heads, past, dim) for _ in range(2 * config.num_hidden_layers)],
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of deprecations and of numbers that become constants
        model = ov.convert_model(_Step(_copy_in_float32(draft)), example_input=example)
    _make_stateful(model, heads, dim)
    return model


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[None]:
    """Hide messages and progress bars of a step that takes a second.

    The logger's own level is changed, and only for this time: `nncf.set_log_level` also sets the level of all handlers
    of the logger, which may be the application's. Standard output stays where it is: other threads may be printing
    their texts. Progress bars go through rich's own console.
    """
    logger, console = logging.getLogger("nncf"), rich.get_console()
    level, quiet = logger.level, console.quiet
    logger.setLevel(logging.ERROR)
    console.quiet = True
    try:
        yield
    finally:
        logger.setLevel(level)
        console.quiet = quiet


def _make_stateful(model: ov.Model, heads: int, dim: int) -> None:
    """Name inputs and outputs, and turn the rows into the request's state.

    Args:
        model: the traced graph, edited in place.
        heads: number of key/value heads.
        dim: head dimension.
    """
    for port, name in zip(model.inputs, INPUTS, strict=False):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ("predicted", "logits"), strict=False):
        port.get_tensor().set_names({name})
    pairs = {}
    for index, (given, kept) in enumerate(zip(model.inputs[len(INPUTS) :], model.outputs[2:], strict=True)):
        given.get_tensor().set_names({f"past.{index}"})
        kept.get_tensor().set_names({f"present.{index}"})
        given.get_node().set_partial_shape(ov.PartialShape([1, heads, -1, dim]))
        pairs[f"past.{index}"] = f"present.{index}"
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.constant(np.zeros((1, heads, 0, dim), dtype=np.float32))])
    model.validate_nodes_and_infer_types()


class StateRows(RowSlots):
    """A draft's key/value rows in the state of a request, for one text; implements `RowStorage`.

    Args:
        request: a request for a graph from `draft_graph`.
    """

    def __init__(self, request: ov.InferRequest) -> None:
        super().__init__()
        self.request = request

    def append(self, count: int) -> None:
        """Add `count` rows that the next pass writes. Holes are removed first when they are most of the state."""
        if self.holes > SPARE_HOLES + self.length:
            self._compact()
        self.use(self.grow(count))

    def spread(self, mask: Tensor | None, count: int) -> np.ndarray:
        """Return the mask of a pass over all slots: (count, slots) float32.

        Args:
            mask: (count, length) additive over the rows in use; None means causal over the last `count` rows.
            count: rows of the pass, appended already.
        """
        if mask is None:
            mask = torch.full((count, count), HIDDEN).triu(1)
        spread = np.full((count, self.slots), HIDDEN, dtype=np.float32)
        spread[:, self.used] = mask.float().clamp(min=HIDDEN).numpy()
        return spread

    def _compact(self) -> None:
        self.compact(self.request, axis=2)


class OpenVINORunner:
    """Runs a draft's steps in OpenVINO; implements `DraftRunner`.

    Args:
        draft: draft that is attached to its target, on the CPU.
        weights: see `draft_graph`; None takes `default_weights`.
        properties: properties of the CPU plugin that the draft shares with the target.
    """

    device, dtype = torch.device("cpu"), torch.float32
    runs_in_torch = False

    def __init__(
        self, draft: DraftNetwork, weights: str | None = None, properties: dict[str, Any] | None = None
    ) -> None:
        own = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "PERFORMANCE_HINT": "LATENCY"}
        own["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(GROUP)
        stored = weights or default_weights()
        self.weights: str | None = stored
        graph = draft_graph(draft, stored)
        self._compiled = ov.Core().compile_model(graph, "CPU", own | (properties or {}))
        self._draft_ref = weakref.ref(draft)  # the runner is kept under its draft and must not keep it alive

    def new_rows(self, capacity: int) -> StateRows:  # noqa: ARG002 - the state grows by itself
        """Make a request for one text, which holds the rows of all blocks."""
        return StateRows(self._compiled.create_infer_request())

    def run(self, step: Pass, rows: StateRows) -> Predicted:
        """Run the graph over a pass; see `DraftRunner.run`."""
        draft = self._draft_ref()
        assert draft is not None, "a draft that runs is held by its caller"
        count = step.rows
        rows.append(count)
        rope = draft.rope_for(step, torch.float32)
        cos, sin = (table.expand(1, count, -1).contiguous().numpy() for table in rope)
        inputs = {
            "features": step.features[None].float().contiguous().numpy(),
            "embeddings": draft.embed(step.tokens)[None].float().numpy(),
            "cos": cos,
            "sin": sin,
            "mask": rows.spread(step.mask, count),
            "logit_rows": np.arange(step.logits_from, count),
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        rows.request.infer(inputs, share_inputs=True)
        predicted, logits = (rows.request.get_tensor(name).data[0].copy() for name in ("predicted", "logits"))
        return Predicted(torch.from_numpy(predicted), torch.from_numpy(logits))
