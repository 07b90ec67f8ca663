"""Edits of a stored OpenVINO language model that make it a target; nothing here compiles or runs it.

Enters: the `ov.Model` of a stateful export, quantised or not. Leaves: the same graph in memory with

    input  tree_bias         f32 (1, 1, n or 1, m or 1)   added to the mask of every attention
    input  first_logit_row   i64 (1,)                     rows before it skip the head
    output features          f32 (1, n, F)                what the head reads: the state after the final norm

Zeros of shape (1, 1, 1, 1) and a first row 0 leave the function as it was, so whoever else runs the model
(optimum, say) goes on as before. The files on disk are not touched.
"""

from dataclasses import dataclass

import numpy as np
import torch

try:
    import openvino as ov
    from openvino import opset13 as ops
except ImportError as error:  # the message is what a user reads first
    raise ImportError(
        "OpenVINO targets need the `openvino` package: pip install 'dovetail-plugin[openvino]'."
    ) from error

TREE_BIAS, FIRST_LOGIT_ROW, FEATURES = "tree_bias", "first_logit_row", "features"
ATTENTION = "ScaledDotProductAttention"
PRECISIONS = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
BEHIND_THE_HEAD = {"Convert", "Multiply", "Divide", "Tanh", "Add"}
"""What may stand between the head's product and the logits: scaling, a soft cap, a bias."""
DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Add", "Reshape", "Transpose"}
"""What weight expressions are made of, beside constants."""


class GraphError(ValueError):
    """The graph is not one that can be made a target; says which node was looked for."""


@dataclass(frozen=True)
class Tables:
    """embedding, head: (V, H) float32; bias: (V,) float32 or None."""

    embedding: np.ndarray
    head: np.ndarray
    bias: np.ndarray | None


def input_names(model: "ov.Model") -> set[str]:
    """Names of all inputs."""
    return {name for port in model.inputs for name in port.get_names()}


def check_model(model: "ov.Model") -> None:
    """Refuse what is no stateful decoder-only language model.

    Raises:
        GraphError: says what is missing.
    """
    names = input_names(model)
    if "input_ids" not in names:
        raise GraphError(
            f"no input `input_ids` in the graph (inputs: {', '.join(sorted(names))}); not a language model."
        )
    _logits(model)
    if any(name.startswith("past_key_values") for name in names) or not model.get_sinks():
        raise GraphError(
            "the graph keeps no key/value state (a stateless export, or one without a cache); export it again with "
            "`dovetail export --to openvino`, or with optimum-cli and without --disable-stateful."
        )
    if not {"attention_mask", "beam_idx"} <= names:
        raise GraphError(
            f"no inputs `attention_mask` and `beam_idx` in the graph (inputs: {', '.join(sorted(names))})."
        )


def is_prepared(model: "ov.Model") -> bool:
    """Whether `prepare` was here."""
    return TREE_BIAS in input_names(model)


def prepare(model: "ov.Model") -> None:
    """Add the inputs and the output of the module's docstring, in place.

    Raises:
        GraphError: there is no head product, or no attention with a mask.
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


def _plus_bias(mask: "ov.Output", bias: "ov.Node") -> "ov.Node":
    """The mask with the bias added, in the mask's type; a mask of yes and no becomes zeros and large negatives."""
    kind = mask.get_element_type()
    if kind == ov.Type.boolean:
        zero, hidden = ops.constant(np.float32(0)), ops.constant(np.float32(np.finfo(np.float16).min))
        return ops.add(ops.select(mask, zero, hidden), bias)
    return ops.add(mask, bias if kind == ov.Type.f32 else ops.convert(bias, kind))


def tables(model: "ov.Model") -> Tables:
    """Embedding table and head as float32, decompressed if they are stored in fewer bits.

    Raises:
        GraphError: the embedding is not a plain lookup.
    """
    head = _head(model)
    lookup = _embedding(model)
    weight, transposed = _weight(head)
    matrix = _value(weight)
    bias = None
    for node in _behind(model, head):
        if node.get_type_name() == "Add":
            constant = next(node.input_value(i) for i in (0, 1) if is_constant(node.input_value(i).get_node()))
            bias = _value(constant).reshape(-1)
    return Tables(_value(lookup.input_value(0)), matrix if transposed else np.ascontiguousarray(matrix.T), bias)


def row_axis(model: "ov.Model") -> int:
    """The dimension of the key/value states that counts rows: 2 in (batch, heads, rows, head_dim)."""
    shape = model.get_variables()[0].get_info().data_shape
    dynamic = [axis for axis in range(1, len(shape)) if shape[axis].is_dynamic]
    if len(shape) != 4 or len(dynamic) != 1:
        raise GraphError(f"a key/value state has the shape {shape}; expected four dimensions, one of them for rows.")
    return dynamic[0]


def num_parameters(model: "ov.Model") -> int:
    """Numbers in constants of two dimensions and more, without the scales of compressed ones."""
    shapes = [node.output(0).get_shape() for node in model.get_ops() if node.get_type_name() == "Constant"]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) >= 2 and min(shape[-2:]) > 1)


def rounding(model: "ov.Model", request: "ov.InferRequest") -> torch.dtype:
    """The coarsest float type that stands for the roundings of a compiled graph.

    Integer weights make the CPU plugin round activations to eight bits too, about as coarse as bfloat16.
    """
    compiled = request.get_compiled_model()
    precise = all(compiled.get_property(name) == ov.Type.f32 for name in PRECISIONS)
    groups = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
    integers = {ov.Type.u8, ov.Type.i8, ov.Type.u4, ov.Type.i4}
    quantised = groups and any(
        node.get_type_name() == "Constant" and node.get_element_type() in integers and len(node.get_output_shape(0)) > 1
        for node in model.get_ops()
    )
    return torch.float32 if precise and not quantised else torch.bfloat16


# --- finding things --------------------------------------------------------------------------------


def _logits(model: "ov.Model") -> "ov.Node":
    for port in model.outputs:
        if "logits" in port.get_names():
            return port.get_node()
    names = ", ".join(sorted(name for port in model.outputs for name in port.get_names()))
    raise GraphError(f"no output `logits` in the graph (outputs: {names}); an encoder has none.")


def _behind(model: "ov.Model", head: "ov.Node | None" = None) -> list["ov.Node"]:
    """The nodes between the logits and the head's product, from the logits backwards, the product excluded."""
    node, path = _logits(model).input_value(0).get_node(), []
    while node.get_type_name() in BEHIND_THE_HEAD:
        path.append(node)
        inputs = [node.input_value(i).get_node() for i in range(node.get_input_size())]
        node = next((n for n in inputs if not is_constant(n)), inputs[0])
    if node.get_type_name() != "MatMul" or (head is not None and node.get_name() != head.get_name()):
        raise GraphError(
            f"looked for the head's MatMul in front of `logits` and found {node.get_type_name()} "
            f"{node.get_friendly_name()!r}."
        )
    return [*path, node]


def _head(model: "ov.Model") -> "ov.Node":
    return _behind(model)[-1]


def _attention(model: "ov.Model") -> list["ov.Node"]:
    found = [node for node in model.get_ops() if node.get_type_name() == ATTENTION]
    if not found:
        raise GraphError(f"looked for {ATTENTION} nodes and found none; export the model with a recent optimum-intel.")
    bare = [node.get_friendly_name() for node in found if node.get_input_size() < 4]
    if bare:
        raise GraphError(f"{ATTENTION} {bare[0]!r} takes no mask, so drafted rows cannot be hidden from each other.")
    return found


def _embedding(model: "ov.Model") -> "ov.Node":
    """The lookup fed by `input_ids`, possibly through a conversion."""
    parameter = next(p for p in model.get_parameters() if "input_ids" in p.output(0).get_names())
    queue = [target.get_node() for target in parameter.output(0).get_target_inputs()]
    while queue:
        node = queue.pop(0)
        if node.get_type_name() == "Gather" and is_constant(node.input_value(0).get_node()):
            return node
        if node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
            queue += [target.get_node() for target in node.output(0).get_target_inputs()]
    raise GraphError("looked for the Gather that turns `input_ids` into embeddings and found none.")


def _weight(product: "ov.Node") -> tuple["ov.Output", bool]:
    """The constant side of a MatMul, and whether it is stored as (out, in)."""
    source = product.input_value(1)
    if not is_constant(source.get_node()):
        raise GraphError(f"the head {product.get_friendly_name()!r} has no constant weight.")
    return source, bool(product.get_attributes()["transpose_b"])


def is_constant(node: "ov.Node") -> bool:
    """Whether a node is a weight: a constant, stored plainly or compressed."""
    kind = node.get_type_name()
    if kind == "Constant":
        return True
    return kind in DECOMPRESSION and all(
        is_constant(node.input_value(i).get_node()) for i in range(node.get_input_size())
    )


def _value(port: "ov.Output") -> np.ndarray:
    """What a constant expression comes to, as float32."""
    copied = ov.Model([ops.result(ops.convert(port, "f32"))], [], "table").clone()
    request = ov.Core().compile_model(copied, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    request.infer()
    return request.get_output_tensor(0).data.copy()
