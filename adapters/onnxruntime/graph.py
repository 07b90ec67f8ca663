"""Edits an exported ONNX language model so that it can be a target.

The graph that optimum's exporter wrote, quantized or not, with past keys and values as inputs, goes in. The same graph
comes out, in memory, with

    input  tree_bias         f32 (1, 1, n or 1, m or 1)   added to the mask of every attention
    input  first_logit_row   i64 (1,)                     rows before it skip the head
    input  position_ids      i64 (1, n)                   where the export counts positions itself
    output features          f32 (1, n, F)                what the head reads: the state after the final norm

and with the new rows of keys and values as outputs in place of `present.*`, which hold the old rows and the new ones.
This module does not run the graph and does not read its weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..stored_graph import FEATURES, FIRST_LOGIT_ROW, TREE_BIAS, GraphError, missing_package

try:
    import onnx
    from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
except ImportError as error:  # a user reads this message first
    raise ImportError(missing_package("ONNX Runtime targets", "onnx", extra="onnxruntime")) from error

POSITIONS = "position_ids"
HEADS = {"MatMul", "MatMulNBits"}
AFTER_THE_HEAD = {"Cast", "Mul", "Div", "Tanh", "Add", "Identity"}
"""Nodes that can stand between the head's product and the logits: scaling, a soft cap, a bias."""
ON_SCORES = {"Cast", "Mul", "Div", "Tanh", "Add", "Reshape"}
"""Nodes that can stand between the product of queries and keys and the mask's Add: scaling, a soft cap, ALiBi."""
ON_ANGLES = {"Cast", "Concat", "Mul", "Transpose", "Identity", "MatMul", "Unsqueeze"}
"""Nodes that can stand between position ids and the cosines of rotary embeddings."""
OVER_ALL_ROWS = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
"""Operators whose result for one row depends on the other rows of the pass."""
EXPORT_AGAIN = "Export the model with `optimum-cli export onnx --task text-generation-with-past`"


@dataclass(frozen=True)
class Rows:
    """Keys or values of one layer.

    Attributes:
        past: name of the input with the old rows, (1, heads, m, head_dim).
        new: name of the output with the new rows, (1, heads, n, head_dim).
        heads: number of key/value heads.
        head_dim: size of a head.
    """

    past: str
    new: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
        rows: keys and values of every layer, keys first.
        dtype: dtype of keys, values and logits.
        takes_positions: whether position ids are an input.
        rounds: whether the graph rounds activations to fewer bits.
    """

    rows: list[Rows]
    dtype: np.dtype
    takes_positions: bool
    rounds: bool


class Links:
    """The nodes that make and read each value of a graph.

    Attributes:
        graph: the graph.
        weights: name -> stored tensor.
        maker: name of a value -> the node that makes it. Inputs and weights have none.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output if name}
        self._constants = {"", *self.weights}
        for node in graph.node:  # nodes are sorted: values are made before they are read
            if self._constants.issuperset(node.input):
                self._constants.update(node.output)

    def is_constant(self, name: str) -> bool:
        """Return whether a value depends on weights alone."""
        return name in self._constants

    def readers(self, name: str) -> Iterator[NodeProto]:
        """Return the nodes that read a value."""
        return (node for node in self.graph.node if name in node.input)

    def kind(self, name: str) -> str:
        """Return the operator that makes a value, or "" for inputs and weights."""
        return self.maker[name].op_type if name in self.maker else ""


def check_model(model: onnx.ModelProto) -> None:
    """Refuse a graph that is not a decoder-only language model with past keys and values as inputs.

    Raises:
        GraphError: an input or output is missing, an input is unknown, or rows of a pass influence each other.
    """
    graph = model.graph
    given = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    outputs = [value.name for value in graph.output]
    if "input_ids" not in given:
        raise GraphError(
            f"the graph has no input `input_ids`, so it is not a language model (inputs: {_listed(given)})."
        )
    if "logits" not in outputs:
        raise GraphError(
            f"the graph has no output `logits` (outputs: {_listed(outputs)}). A causal language model has it, an "
            "encoder has none."
        )
    past = {name for name in given if name.startswith("past_key_values.")}
    if not past:
        raise GraphError(f"the graph has no inputs `past_key_values.*` (inputs: {_listed(given)}). {EXPORT_AGAIN}.")
    if "attention_mask" not in given:
        raise GraphError(f"the graph has no input `attention_mask` (inputs: {_listed(given)}). {EXPORT_AGAIN}.")
    unknown = given - past - {"input_ids", "attention_mask", POSITIONS}
    if unknown:
        raise GraphError(f"the graph has inputs that cannot be filled: {_listed(unknown)}. {EXPORT_AGAIN}.")
    for node in graph.node:
        if node.op_type in OVER_ALL_ROWS:
            raise GraphError(
                f"{node.op_type} {node.name!r} scales all rows of a pass together, so drafted tokens would change "
                "the logits of others. Quantize weights only (MatMulNBits, or DequantizeLinear on weights)."
            )


def prepare(model: onnx.ModelProto) -> Prepared:
    """Edit the graph as the module's docstring describes, in place.

    Raises:
        GraphError: see `check_model`; or the head, an attention mask or the Concat of old and new rows was not found.
    """
    check_model(model)
    graph, links = model.graph, Links(model.graph)
    inputs = {value.name: value for value in graph.input}
    element = next(v for n, v in inputs.items() if n.startswith("past_key_values.")).type.tensor_type.elem_type
    rows = _rows(links, inputs)
    masks = _masks(links, len(rows) // 2)
    before: dict[int, list[NodeProto]] = {}  # index in the graph -> nodes to insert there

    _tap_head(links, head_of(links), before)
    _add_bias(links, masks, element, before)
    takes_positions = POSITIONS in inputs or _add_positions(links)

    nodes = [node for index, old in enumerate(graph.node) for node in (*before.get(index, ()), old)]
    del graph.node[:]
    graph.node.extend(nodes)
    kinds = {"logits": element, FEATURES: TensorProto.FLOAT} | {each.new: element for each in rows}
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
    del graph.value_info[:]  # the shapes of values that were edited
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element))
    return Prepared(rows, dtype, takes_positions, any(map(_rounds, graph.node)))


def head_of(links: Links) -> NodeProto:
    """Return the matrix product that makes the logits.

    Raises:
        GraphError: another node makes them.
    """
    return path_to_head(links)[-1]


def path_to_head(links: Links) -> list[NodeProto]:
    """Return the nodes from the logits back to the head's product, which comes last.

    Raises:
        GraphError: there is no such product.
    """
    name, path = "logits", []
    while links.kind(name) in AFTER_THE_HEAD:
        node = links.maker[name]
        path.append(node)
        name = next((source for source in node.input if not links.is_constant(source)), node.input[0])
    if links.kind(name) not in HEADS:
        found = f"{links.kind(name)} {links.maker[name].name!r}" if name in links.maker else repr(name)
        raise GraphError(f"looked for the head's {' or '.join(sorted(HEADS))} in front of `logits` and found {found}.")
    return [*path, links.maker[name]]


def attribute(node: NodeProto, name: str, default: int = 0) -> int:
    """Return an integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name and a.type == AttributeProto.INT), default)


def _rounds(node: NodeProto) -> bool:
    """Return whether a node rounds activations, as ONNX Runtime does where it finds DequantizeLinear."""
    return node.op_type == "DequantizeLinear" or attribute(node, "accuracy_level") > 1


# --- finding and editing nodes ---------------------------------------------------------------------


def _listed(names: set[str] | list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _rows(links: Links, inputs: dict[str, onnx.ValueInfoProto]) -> list[Rows]:
    """Return keys and values of every layer, in the order of the inputs."""
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
                f"{tuple(dims)}, read by {kinds}. {EXPORT_AGAIN}, without fused attention."
            )
        found.append(Rows(past, joined[0].input[1], dims[1], dims[3]))
    return found


@dataclass(frozen=True)
class _Place:
    """One input of one node.

    Attributes:
        node: the node.
        index: index of the input.
    """

    node: NodeProto
    index: int


def _masks(links: Links, layers: int) -> list[_Place]:
    """Return which input of which Add is the mask, for each attention: the Add in front of its Softmax."""
    found = []
    for node in links.graph.node:
        if node.op_type != "Softmax":
            continue
        name = node.input[0]
        while links.kind(name) == "Cast":
            name = links.maker[name].input[0]
        if links.kind(name) != "Add":
            continue  # for example a router's softmax
        add = links.maker[name]
        products = [_is_product(links, source) for source in add.input]
        if sum(products) == 1 and not links.is_constant(add.input[products.index(False)]):
            found.append(_Place(add, products.index(False)))
    if len(found) != layers:
        raise GraphError(
            f"looked for Softmax nodes behind an Add of scores and mask, one for each of {layers} layers, and found "
            f"{len(found)}. {EXPORT_AGAIN}, without fused attention (no --optimize above O1)."
        )
    return found


def _is_product(links: Links, name: str) -> bool:
    """Return whether a value is a matrix product, possibly scaled."""
    if links.kind(name) in ON_SCORES:
        return any(_is_product(links, source) for source in links.maker[name].input)
    return links.kind(name) in ("MatMul", "FusedMatMul")


def _position(links: Links, reader: NodeProto) -> int:
    """Return the index of a node in the graph."""
    return next(index for index, node in enumerate(links.graph.node) if node is reader)


def _tap_head(links: Links, head: NodeProto, before: dict[int, list[NodeProto]]) -> None:
    """Add the output of features, and let rows before `first_logit_row` skip the head.

    Args:
        links: the graph.
        head: the head's product.
        before: index in the graph -> nodes to insert there; new nodes are added to it.
    """
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


def _add_bias(links: Links, masks: list[_Place], element: int, before: dict[int, list[NodeProto]]) -> None:
    """Add the tree bias to the mask of every attention.

    Args:
        links: the graph.
        masks: the places of the masks.
        element: element type of the masks.
        before: index in the graph -> nodes to insert there; new nodes are added to it.
    """
    links.graph.input.append(helper.make_tensor_value_info(TREE_BIAS, TensorProto.FLOAT, [1, 1, "n", "m"]))
    for number, mask in enumerate(masks):
        cast, biased = f"tree_bias_{number}", f"biased_mask_{number}"
        before[_position(links, mask.node)] = [
            helper.make_node("Cast", [TREE_BIAS], [cast], name=f"dovetail/bias_{number}", to=element),
            helper.make_node("Add", [mask.node.input[mask.index], cast], [biased], name=f"dovetail/mask_{number}"),
        ]
        mask.node.input[mask.index] = biased


def _add_positions(links: Links) -> bool:
    """Make the positions of rotary embeddings an input of a graph that counts rows. Return False if none are found.

    The causal mask is still made from the count of rows. Only the input of the angles changes.
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


def _reader_of_count(links: Links, node: NodeProto) -> _Place | None:
    """Return which input reads the positions (1, n) that a Range counts and the node's value is made from, or None."""
    for index, source in enumerate(node.input):
        kind = links.kind(source)
        if kind == "Unsqueeze" and links.kind(links.maker[source].input[0]) == "Range":
            return _Place(node, index)
        if kind in ON_ANGLES and (found := _reader_of_count(links, links.maker[source])):
            return found
    return None
