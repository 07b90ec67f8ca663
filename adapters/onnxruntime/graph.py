"""Edits of an exported ONNX language model that make it a target; nothing here runs it or reads its weights.

Enters: the graph that optimum's exporter wrote, quantised or not, with explicit past keys and values. Leaves:
the same graph in memory with

    input  tree_bias         f32 (1, 1, n or 1, m or 1)   added to the mask of every attention
    input  first_logit_row   i64 (1,)                     rows before it skip the head
    input  position_ids      i64 (1, n)                   where the export counts positions itself
    output features          f32 (1, n, F)                what the head reads: the state after the final norm

and with the new rows of keys and values as outputs, in place of `present.*` (the old rows and the new ones).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

try:
    import onnx
    from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
except ImportError as error:  # the message is what a user reads first
    raise ImportError(
        "ONNX Runtime targets need the `onnx` package: pip install 'dovetail-plugin[onnxruntime]'."
    ) from error

TREE_BIAS, FIRST_LOGIT_ROW, FEATURES, POSITIONS = "tree_bias", "first_logit_row", "features", "position_ids"
HEADS = {"MatMul", "MatMulNBits"}
BEHIND_THE_HEAD = {"Cast", "Mul", "Div", "Tanh", "Add", "Identity"}
"""What may stand between the head's product and the logits: scaling, a soft cap, a bias."""
ON_SCORES = {"Cast", "Mul", "Div", "Tanh", "Add", "Reshape"}
"""What may stand between the product of queries and keys and the mask's Add: scaling, a soft cap, ALiBi."""
ON_ANGLES = {"Cast", "Concat", "Mul", "Transpose", "Identity", "MatMul", "Unsqueeze"}
"""What may stand between position ids and the cosines of rotary embeddings."""
OVER_ALL_ROWS = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
"""Operators whose result for one row depends on the other rows of the pass."""
EXPORT_AGAIN = "export it with `optimum-cli export onnx --task text-generation-with-past`"


class GraphError(ValueError):
    """The graph is not one that can be made a target; says which node was looked for."""


@dataclass(frozen=True)
class Rows:
    """One layer's keys or values: the input with old rows (1, heads, m, head_dim), the output with new ones."""

    past: str
    new: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made of a graph. dtype: of keys, values and logits; rounds: activations to fewer bits."""

    rows: list[Rows]
    dtype: np.dtype
    takes_positions: bool
    rounds: bool


class Links:
    """Who makes and who reads each value of a graph."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output if name}

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on weights alone."""
        if name in self.weights or not name:
            return True
        node = self.maker.get(name)
        return node is not None and all(self.is_constant(source) for source in node.input)

    def readers(self, name: str) -> Iterator["NodeProto"]:
        """Who reads a value."""
        return (node for node in self.graph.node if name in node.input)

    def kind(self, name: str) -> str:
        """The operator that makes a value; "" for inputs and weights."""
        return self.maker[name].op_type if name in self.maker else ""


def check_model(model: "onnx.ModelProto") -> None:
    """Refuse what is no decoder-only language model with explicit past keys and values.

    Raises:
        GraphError: says what is missing or what there is too much.
    """
    graph = model.graph
    given = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    outputs = [value.name for value in graph.output]
    if "input_ids" not in given:
        raise GraphError(f"no input `input_ids` in the graph (inputs: {_listed(given)}); not a language model.")
    if "logits" not in outputs:
        raise GraphError(f"no output `logits` in the graph (outputs: {_listed(outputs)}); an encoder has none.")
    past = {name for name in given if name.startswith("past_key_values.")}
    if not past:
        raise GraphError(f"no inputs `past_key_values.*` in the graph (inputs: {_listed(given)}); {EXPORT_AGAIN}.")
    if "attention_mask" not in given:
        raise GraphError(f"no input `attention_mask` in the graph (inputs: {_listed(given)}).")
    unknown = given - past - {"input_ids", "attention_mask", POSITIONS}
    if unknown:
        raise GraphError(f"the graph has inputs that nobody here knows to fill: {_listed(unknown)}; {EXPORT_AGAIN}.")
    for node in graph.node:
        if node.op_type in OVER_ALL_ROWS:
            raise GraphError(
                f"{node.op_type} {node.name!r} scales all rows of a pass together, so drafted tokens would change "
                "the logits of others; quantise weights only (MatMulNBits, or DequantizeLinear on weights)."
            )


def prepare(model: "onnx.ModelProto") -> Prepared:
    """Edit the graph as the module's docstring says, in place.

    Raises:
        GraphError: there is no head product, no attention with a mask, or no place where rows are joined.
    """
    check_model(model)
    graph, links = model.graph, Links(model.graph)
    inputs = {value.name: value for value in graph.input}
    element = next(v for n, v in inputs.items() if n.startswith("past_key_values.")).type.tensor_type.elem_type
    rows = _rows(links, inputs)
    masks = _masks(links, len(rows) // 2)
    before: dict[int, list[NodeProto]] = {}  # position in the graph -> nodes to put there

    _tap_head(links, head_of(links), before)
    _add_bias(links, masks, element, before)
    takes_positions = POSITIONS in inputs or _add_positions(links)

    nodes = [node for index, old in enumerate(graph.node) for node in (*before.get(index, ()), old)]
    del graph.node[:]
    graph.node.extend(nodes)
    kinds = {"logits": element, FEATURES: TensorProto.FLOAT} | {each.new: element for each in rows}
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
    del graph.value_info[:]  # shapes of values that are other values now
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element))
    return Prepared(rows, dtype, takes_positions, any(map(_rounds, graph.node)))


def head_of(links: Links) -> "NodeProto":
    """The product that makes the logits.

    Raises:
        GraphError: names what stands there instead.
    """
    return behind_head(links)[-1]


def behind_head(links: Links) -> list["NodeProto"]:
    """The nodes from the logits back to the head's product, the product last."""
    name, path = "logits", []
    while links.kind(name) in BEHIND_THE_HEAD:
        node = links.maker[name]
        path.append(node)
        name = next((source for source in node.input if not links.is_constant(source)), node.input[0])
    if links.kind(name) not in HEADS:
        found = f"{links.kind(name)} {links.maker[name].name!r}" if name in links.maker else repr(name)
        raise GraphError(f"looked for the head's {' or '.join(sorted(HEADS))} in front of `logits` and found {found}.")
    return [*path, links.maker[name]]


def attribute(node: "NodeProto", name: str, default: int = 0) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name and a.type == AttributeProto.INT), default)


def _rounds(node: "NodeProto") -> bool:
    """Whether activations are rounded; ONNX Runtime makes such products of DequantizeLinear by itself."""
    return node.op_type == "DequantizeLinear" or attribute(node, "accuracy_level") > 1


# --- finding and changing things -------------------------------------------------------------------


def _listed(names: "set[str] | list[str]") -> str:
    return ", ".join(sorted(names)) or "none"


def _rows(links: Links, inputs: dict[str, "onnx.ValueInfoProto"]) -> list[Rows]:
    """Of every layer, keys before values."""
    found = []
    for past, value in inputs.items():
        if not past.startswith("past_key_values."):
            continue
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        joined = [node for node in links.readers(past) if node.op_type == "Concat" and node.input[0] == past]
        if len(dims) != 4 or not dims[1] or not dims[3] or len(joined) != 1 or len(joined[0].input) != 2:
            kinds = _listed({node.op_type for node in links.readers(past)})
            raise GraphError(
                f"looked for one Concat that puts new rows behind `{past}` (1, heads, rows, head_dim) and found shape "
                f"{tuple(dims)}, read by {kinds}; {EXPORT_AGAIN}, without fused attention."
            )
        found.append(Rows(past, joined[0].input[1], dims[1], dims[3]))
    return found


@dataclass(frozen=True)
class _Place:
    """One input of one node."""

    node: "NodeProto"
    index: int


def _masks(links: Links, layers: int) -> list[_Place]:
    """The mask's place at the Add in front of each attention's Softmax."""
    found = []
    for node in links.graph.node:
        if node.op_type != "Softmax":
            continue
        name = node.input[0]
        while links.kind(name) == "Cast":
            name = links.maker[name].input[0]
        if links.kind(name) != "Add":
            continue  # a router's softmax, say
        add = links.maker[name]
        products = [_is_product(links, source) for source in add.input]
        if sum(products) == 1 and not links.is_constant(add.input[products.index(False)]):
            found.append(_Place(add, products.index(False)))
    if len(found) != layers:
        raise GraphError(
            f"looked for Softmax nodes behind an Add of scores and mask, one for each of {layers} layers, and found "
            f"{len(found)}; {EXPORT_AGAIN}, without fused attention (no --optimize above O1)."
        )
    return found


def _is_product(links: Links, name: str) -> bool:
    """Whether a value is a matrix product with at most some scaling after it."""
    if links.kind(name) in ON_SCORES:
        return any(_is_product(links, source) for source in links.maker[name].input)
    return links.kind(name) in ("MatMul", "FusedMatMul")


def _position(links: Links, reader: "NodeProto") -> int:
    return next(index for index, node in enumerate(links.graph.node) if node is reader)


def _tap_head(links: Links, head: "NodeProto", before: dict[int, list["NodeProto"]]) -> None:
    hidden, graph = head.input[0], links.graph
    for name, value in (("first_logit_row_end", np.iinfo(np.int64).max), ("first_logit_row_axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    graph.input.append(helper.make_tensor_value_info(FIRST_LOGIT_ROW, TensorProto.INT64, [1]))
    ends = [FIRST_LOGIT_ROW, "first_logit_row_end", "first_logit_row_axis"]
    before[_position(links, head)] = [
        helper.make_node("Cast", [hidden], [FEATURES], name="dovetail/features", to=TensorProto.FLOAT),
        helper.make_node("Slice", [hidden, *ends], ["logit_rows"], name="dovetail/logit_rows"),
    ]
    head.input[0] = "logit_rows"


def _add_bias(links: Links, masks: list[_Place], element: int, before: dict[int, list["NodeProto"]]) -> None:
    links.graph.input.append(helper.make_tensor_value_info(TREE_BIAS, TensorProto.FLOAT, [1, 1, "n", "m"]))
    for number, mask in enumerate(masks):
        cast, biased = f"tree_bias_{number}", f"biased_mask_{number}"
        before[_position(links, mask.node)] = [
            helper.make_node("Cast", [TREE_BIAS], [cast], name=f"dovetail/bias_{number}", to=element),
            helper.make_node("Add", [mask.node.input[mask.index], cast], [biased], name=f"dovetail/mask_{number}"),
        ]
        mask.node.input[mask.index] = biased


def _add_positions(links: Links) -> bool:
    """Make the positions of rotary embeddings an input, where the graph counts them; False if none are found.

    The count of rows goes on being what the causal mask is made of: only the way to the angles is changed.
    """
    angles = [node for node in links.graph.node if node.op_type in ("Cos", "Sin")]
    found = [_reader_of_count(links, node) for node in angles]
    if not found or None in found:
        return False
    for place in found:
        assert place is not None
        place.node.input[place.index] = POSITIONS
    links.graph.input.append(helper.make_tensor_value_info(POSITIONS, TensorProto.INT64, [1, "n"]))
    return True


def _reader_of_count(links: Links, node: "NodeProto") -> _Place | None:
    """Where a node's value comes from a Range made (1, n), what reads that."""
    for index, source in enumerate(node.input):
        kind = links.kind(source)
        if kind == "Unsqueeze" and links.kind(links.maker[source].input[0]) == "Range":
            return _Place(node, index)
        if kind in ON_ANGLES and (found := _reader_of_count(links, links.maker[source])):
            return found
    return None
