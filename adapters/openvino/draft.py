"""A draft as an OpenVINO graph, for machines without a GPU: beside an OpenVINO target it is three times as fast as in
torch, its weights being read as int4 or int8.

Enters: a `DovetailDraft` attached to its target. Leaves: a `DraftRunner`. The graph is traced from the draft's
own modules; the key/value rows live in the state of one request for each text, where rows of rejected nodes
stay as holes that the mask hides, as in `openvino.py`.
"""

import contextlib
import io
import logging
import warnings
import weakref
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

from ..stored_target import HIDDEN

try:
    import nncf
except ImportError as error:
    raise ImportError(
        "compressing a draft needs the `nncf` package: pip install 'dovetail-plugin[openvino]', or set "
        'draft.runner = "torch".'
    ) from error

GROUP = 128
"""Inputs of a product that share a scale, of int4 weights and of activations rounded to int8."""

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

SPARE_HOLES = 512
"""Holes that are let be whatever the number of live rows."""


class _Past:
    """Stands in for `KVRows` while tracing: rows are concatenated."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


class _Step(nn.Module):
    """What is traced: one draft step and the head, with explicit rows."""

    def __init__(self, draft: DraftNetwork) -> None:
        super().__init__()
        self.fusion, self.layers, self._head = draft.fusion, draft.layers, draft.head

    def forward(self, features, embeddings, cos, sin, mask, logit_rows, beam_idx, past):
        pairs = zip(past[::2], past[1::2], strict=True)
        rows = [_Past(keys.index_select(0, beam_idx), values.index_select(0, beam_idx)) for keys, values in pairs]
        x = self.fusion(features, embeddings)
        for layer, own in zip(self.layers, rows, strict=True):
            x = layer(x, (cos, sin), own, mask)
        logits = self._head(x.index_select(1, logit_rows))
        return x, logits, *(tensor for own in rows for tensor in (own.keys, own.values))


INPUTS = ("features", "embeddings", "cos", "sin", "mask", "logit_rows", "beam_idx")


def default_weights() -> str:
    """ "int4" where the CPU multiplies eight-bit numbers by itself, "int8" elsewhere.

    A draft's pass is bound by the bytes of its weights, and four bits cost it one accepted token in a hundred. How fast
    CPUs without such instructions unpack them has not been measured.
    """
    return "int4" if {"avx512_vnni", "amx_int8"} & machine.vector_extensions() else "int8"


def draft_graph(draft: DraftNetwork, weights: str) -> "ov.Model":
    """The stateful graph of one draft step.

    Args:
        draft: attached; its tables and weights are copied into the graph.
        weights: "int4" (the head and matrices that do not divide into groups stay int8), "int8" or "f32".
    """
    config = draft.config
    with torch.random.fork_rng(devices=[]):  # initial weights, replaced at once, take no draws from the user's text
        exact = DraftNetwork(config).float().eval()
    exact.load_state_dict(draft.state_dict())
    assert draft.head_weight is not None, "attach() comes first"
    if draft.config.fusion != "eagle3":  # whose head is a parameter of its own, and loaded
        exact.head_weight = draft.head_weight.float()
    exact.head_bias = None if draft.head_bias is None else draft.head_bias.float()
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
        warnings.simplefilter("ignore")  # of tracing: deprecation in torch, Python numbers that are constants here
        model = ov.convert_model(_Step(exact), example_input=example)
    _make_stateful(model, heads, dim)
    if weights == "f32":
        return model
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars: this takes a second
        return nncf.compress_weights(model, **COMPRESSION[weights])


def _make_stateful(model: "ov.Model", heads: int, dim: int) -> None:
    """Name inputs and outputs, and turn the past rows into the request's state."""
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


class StateRows:
    """The draft's key/value rows in a request's state; `length` counts live ones and may be set back."""

    def __init__(self, request: "ov.InferRequest", capacity: int) -> None:
        self.request = request
        self.slots = 0  # rows of the state, holes included
        self._live = np.zeros(capacity, dtype=np.int64)  # where the live rows lie
        self._length = 0

    @property
    def length(self) -> int:
        """Live rows."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        assert length <= self._length
        self._length = length

    def append(self, count: int) -> None:
        """Make room for rows that the next pass writes; first takes out holes when they are most of the state."""
        if self.slots - self._length > SPARE_HOLES + self._length:
            self._compact()
        end = self._length + count
        if end > len(self._live):
            self._live = np.concatenate([self._live, np.zeros(end, dtype=np.int64)])
        self._live[self._length : end] = np.arange(self.slots, self.slots + count)
        self._length, self.slots = end, self.slots + count

    def spread(self, mask: Tensor | None, count: int) -> np.ndarray:
        """The mask (count, length) over live rows as (count, slots); None is causal over the new rows."""
        if mask is None:
            mask = torch.full((count, count), HIDDEN).triu(1)
        spread = np.full((count, self.slots), HIDDEN, dtype=np.float32)
        spread[:, self._live[: self._length]] = mask.float().clamp(min=HIDDEN).numpy()
        return spread

    def _compact(self) -> None:
        live = self._live[: self._length]
        for state in self.request.query_state():
            state.state = ov.Tensor(np.ascontiguousarray(np.take(state.state.data, live, axis=2)))
        self._live[: self._length] = np.arange(self._length)
        self.slots = self._length


class OpenVINORunner:
    """Runs a draft's steps in OpenVINO; implements `DraftRunner`.

    Args:
        draft: attached, on the CPU.
        weights: as `draft_graph`; None takes `default_weights`.
        properties: of the CPU plugin, the target's own.
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

    def new_rows(self, capacity: int) -> StateRows:
        """Make one object for all blocks, over a request of its own."""
        return StateRows(self._compiled.create_infer_request(), capacity)

    def run(self, step: Pass, rows: StateRows) -> Predicted:
        """Run the graph over the pass."""
        draft = self._draft_ref()
        assert draft is not None, "whoever runs a draft holds it"
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
