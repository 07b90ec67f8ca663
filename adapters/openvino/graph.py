"""Edits a stored OpenVINO language model so that it can be a target. This module does not run the model.

The `ov.Model` of a stateful export, quantized or not, goes in. The same graph comes out, in memory, with

    input  tree_bias         f32 (1, 1, n or 1, m or 1)   added to the mask of every attention
    input  first_logit_row   i64 (1,)                     rows before it skip the head
    output features          f32 (1, n, F)                what the head reads: the state after the final norm

A bias of zeros (1, 1, 1, 1) and a first row of 0 leave the function as it was, so other users of the model, such as
optimum, see no difference. Files on disk are not changed.
"""

import numpy as np
import torch

from dovetail_plugin.targets.base import Tables

from ..stored_graph import FEATURES, FIRST_LOGIT_ROW, HIDDEN, TREE_BIAS, GraphError, missing_package, tables_of

try:
    import openvino as ov
    from openvino import opset13 as ops
except ImportError as error:  # a user reads this message first
    raise ImportError(missing_package("OpenVINO targets", "openvino", extra="openvino")) from error

ATTENTION = "ScaledDotProductAttention"
PRECISIONS = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
AFTER_THE_HEAD = {"Convert", "Multiply", "Divide", "Tanh", "Add"}
"""Nodes that can stand between the head's MatMul and the logits: scaling, a soft cap, a bias."""
DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Add", "Reshape", "Transpose"}
"""Nodes that weight expressions consist of, besides constants."""


def input_names(model: ov.Model) -> set[str]:
    """Return the names of all inputs."""
    return {name for port in model.inputs for name in port.get_names()}


def check_model(model: ov.Model) -> None:
    """Refuse a graph that is not a stateful decoder-only language model.

    Raises:
        GraphError: an input, the output or the state is missing.
    """
    names = input_names(model)
    if "input_ids" not in names:
        raise GraphError(
            f"the graph has no input `input_ids` (inputs: {', '.join(sorted(names))}). A language model has it."
        )
    _logits(model)
    if any(name.startswith("past_key_values") for name in names) or not model.get_sinks():
        raise GraphError(
            "the graph has no key/value state: this is a stateless export, or one without a cache. To use the model, "
            "export it again with `dovetail export --to openvino`, or with optimum-cli without --disable-stateful."
        )
    if not {"attention_mask", "beam_idx"} <= names:
        raise GraphError(
            "the graph lacks the input `attention_mask` or `beam_idx`. Export the model again with `dovetail export "
            f"--to openvino` (inputs: {', '.join(sorted(names))})."
        )


def is_prepared(model: ov.Model) -> bool:
    """Return whether `prepare` has edited the graph."""
    return TREE_BIAS in input_names(model)


def prepare(model: ov.Model) -> None:
    """Add the inputs and the output that the module's docstring lists, in place.

    Raises:
        GraphError: the graph is not a stateful language model, or its head or an attention mask was not found.
    """
    check_model(model)
    head = _head(model)
    attention = _attention(model)
    hidden = head.input_value(0)
    first = ops.parameter([1], np.int64, name=FIRST_LOGIT_ROW)
    first.output(0).set_names({FIRST_LOGIT_ROW})
    last = ops.constant(np.array([np.iinfo(np.int64).max]))
    one = ops.constant(np.array([1], dtype=np.int64))
    rows = ops.slice(hidden, first, last, one, one)
    head.input(0).replace_source_output(rows.output(0))

    features = ops.result(hidden if hidden.get_element_type() == ov.Type.f32 else ops.convert(hidden, "f32"))
    features.output(0).set_names({FEATURES})

    bias = ops.parameter([1, 1, -1, -1], np.float32, name=TREE_BIAS)
    bias.output(0).set_names({TREE_BIAS})
    biased: dict[tuple[str, int], ov.Output] = {}  # layers share their masks
    for node in attention:
        mask = node.input_value(3)
        key = (mask.get_node().get_name(), mask.get_index())
        if key not in biased:
            biased[key] = _plus_bias(mask, bias).output(0)
        node.input(3).replace_source_output(biased[key])
    model.add_parameters([first, bias])
    model.add_results([features])
    model.validate_nodes_and_infer_types()


def _plus_bias(mask: ov.Output, bias: ov.Node) -> ov.Node:
    """Return a mask with the bias added, in the mask's type. A boolean mask becomes zeros and large negatives."""
    kind = mask.get_element_type()
    if kind == ov.Type.boolean:
        zero, hidden = ops.constant(np.float32(0)), ops.constant(np.float32(HIDDEN))
        return ops.add(ops.select(mask, zero, hidden), bias)
    return ops.add(mask, bias if kind == ov.Type.f32 else ops.convert(bias, kind))


def tables(model: ov.Model) -> Tables:
    """Return embedding table and head as float32, decompressed if they are stored in fewer bits.

    Raises:
        GraphError: the embedding is not a plain lookup, or the head's weight is not constant.
    """
    head = _head(model)
    lookup = _embedding(model)
    weight, transposed = _weight(head)
    matrix = _value(weight)
    bias = None
    for node in _path_to_head(model)[:-1]:
        if node.get_type_name() == "Add":
            constant = next(node.input_value(i) for i in (0, 1) if is_constant(node.input_value(i).get_node()))
            bias = _value(constant).reshape(-1)
    return tables_of(_value(lookup.input_value(0)), matrix if transposed else np.ascontiguousarray(matrix.T), bias)


def row_axis(model: ov.Model) -> int:
    """Return the dimension of the key/value states that counts rows, such as 2 in (batch, heads, rows, head_dim).

    Raises:
        GraphError: a state does not have four dimensions of which one is dynamic.
    """
    shape = model.get_variables()[0].get_info().data_shape
    dynamic = [axis for axis in range(1, len(shape)) if shape[axis].is_dynamic]
    if len(shape) != 4 or len(dynamic) != 1:
        raise GraphError(
            f"a key/value state has the shape {shape}. Expected four dimensions, one of them dynamic besides the batch."
        )
    return dynamic[0]


def num_parameters(model: ov.Model) -> int:
    """Return the number of weights in constants of two and more dimensions, scales of compressed ones excluded."""
    shapes = [node.output(0).get_shape() for node in model.get_ops() if node.get_type_name() == "Constant"]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) >= 2 and min(shape[-2:]) > 1)


def rounding(model: ov.Model, compiled: ov.CompiledModel) -> torch.dtype:
    """Return the coarsest float dtype that the results of a compiled graph pass through; see `Engine.rounding`.

    With integer weights the CPU plugin rounds activations to eight bits too, which is about as coarse as bfloat16.
    """
    precise = all(compiled.get_property(name) == ov.Type.f32 for name in PRECISIONS)
    groups = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
    integers = {ov.Type.u8, ov.Type.i8, ov.Type.u4, ov.Type.i4}
    quantized = groups and any(
        node.get_type_name() == "Constant" and node.get_element_type() in integers and len(node.get_output_shape(0)) > 1
        for node in model.get_ops()
    )
    return torch.float32 if precise and not quantized else torch.bfloat16


# --- finding nodes ---------------------------------------------------------------------------------


def _logits(model: ov.Model) -> ov.Node:
    """Return the result node of the logits."""
    for port in model.outputs:
        if "logits" in port.get_names():
            return port.get_node()
    names = ", ".join(sorted(name for port in model.outputs for name in port.get_names()))
    raise GraphError(
        f"the graph has no output `logits` (outputs: {names}). A causal language model has it, an encoder has none."
    )


def _path_to_head(model: ov.Model) -> list[ov.Node]:
    """Return the nodes from the logits back to the head's MatMul, which comes last."""
    node, path = _logits(model).input_value(0).get_node(), []
    while node.get_type_name() in AFTER_THE_HEAD:
        path.append(node)
        inputs = [node.input_value(i).get_node() for i in range(node.get_input_size())]
        node = next((n for n in inputs if not is_constant(n)), inputs[0])
    if node.get_type_name() != "MatMul":
        raise GraphError(
            f"looked for the head's MatMul in front of `logits` and found {node.get_type_name()} "
            f"{node.get_friendly_name()!r}."
        )
    return [*path, node]


def _head(model: ov.Model) -> ov.Node:
    """Return the head's MatMul."""
    return _path_to_head(model)[-1]


def _attention(model: ov.Model) -> list[ov.Node]:
    """Return the attention nodes, all of which take a mask."""
    found = [node for node in model.get_ops() if node.get_type_name() == ATTENTION]
    if not found:
        raise GraphError(f"looked for {ATTENTION} nodes and found none. Export the model with a recent optimum-intel.")
    bare = [node.get_friendly_name() for node in found if node.get_input_size() < 4]
    if bare:
        raise GraphError(
            f"{ATTENTION} {bare[0]!r} takes no mask, so drafted rows cannot be hidden from each other. Export the "
            "model with a recent optimum-intel."
        )
    return found


def _embedding(model: ov.Model) -> ov.Node:
    """Return the lookup that reads `input_ids`, possibly through a conversion."""
    parameter = next(p for p in model.get_parameters() if "input_ids" in p.output(0).get_names())
    queue = [target.get_node() for target in parameter.output(0).get_target_inputs()]
    while queue:
        node = queue.pop(0)
        if node.get_type_name() == "Gather" and is_constant(node.input_value(0).get_node()):
            return node
        if node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
            queue += [target.get_node() for target in node.output(0).get_target_inputs()]
    raise GraphError("looked for the Gather that turns `input_ids` into embeddings and found none.")


def _weight(product: ov.Node) -> tuple[ov.Output, bool]:
    """Return the constant input of a MatMul, and whether it is stored as (out, in)."""
    source = product.input_value(1)
    if not is_constant(source.get_node()):
        raise GraphError(f"the head {product.get_friendly_name()!r} has no constant weight.")
    return source, bool(product.get_attributes()["transpose_b"])


def is_constant(node: ov.Node) -> bool:
    """Return whether a node is a weight, which is a constant or an expression that decompresses one."""
    kind = node.get_type_name()
    if kind == "Constant":
        return True
    return kind in DECOMPRESSION and all(
        is_constant(node.input_value(i).get_node()) for i in range(node.get_input_size())
    )


def _value(port: ov.Output) -> np.ndarray:
    """Compute a constant expression as float32."""
    copied = ov.Model([ops.result(ops.convert(port, "f32"))], [], "table").clone()
    request = ov.Core().compile_model(copied, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    request.infer()
    return request.get_output_tensor(0).data.copy()
