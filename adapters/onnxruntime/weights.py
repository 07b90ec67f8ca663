"""Finds the weights of a stored ONNX model on disk, and reads the two tables that a draft borrows.

A graph that was read without external data and its file go in. The same graph comes out, with every large weight named
by file, offset and length, so that ONNX Runtime maps it from the user's own files and no second copy is held. Embedding
and head come out as float32, decompressed if they are stored in fewer bits.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from dovetail_plugin.targets.base import Tables

from ..stored_graph import GraphError, tables_of
from .graph import Links, attribute, head_of, path_to_head

SMALL = 4096
"""Bytes below which a weight stays in the graph: shapes and constants that ONNX Runtime reads while it loads."""

LOOKUPS = {"Gather", "GatherBlockQuantized"}
AROUND_A_LOOKUP = {"Cast", "Reshape", "Unsqueeze", "Identity"}


def external_files(model: onnx.ModelProto) -> list[str]:
    """Return the names of the files beside the graph that hold weights."""
    return sorted({_entry(tensor, "location") for tensor in model.graph.initializer if _is_external(tensor)})


@dataclass(frozen=True)
class Stored:
    """A graph without its large weights.

    Attributes:
        model: the graph.
        directory: directory that the locations of its weights are relative to.
    """

    model: onnx.ModelProto
    directory: Path


def point_to_files(model: onnx.ModelProto, file: Path) -> Stored:
    """Return the graph with the places of its large weights instead of their bytes.

    The weights lie in `file` itself or beside it. Links are followed, because a snapshot of the hub consists of links
    into one directory.

    Args:
        model: graph that was read from `file` without external data. It is edited and must not be used afterwards.
        file: file of the graph.

    Raises:
        GraphError: the weights lie in more than one directory.
    """
    real = file.resolve()
    directories = {real.parent}
    with real.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 0
        for tensor in model.graph.initializer:
            if _is_external(tensor):
                target = (file.parent / _entry(tensor, "location")).resolve()
                directories.add(target.parent)
                start, length = int(_entry(tensor, "offset", "0")), _size(tensor)
            else:
                raw = tensor.raw_data
                start, target, length = content.find(raw, end) if len(raw) >= SMALL else -1, real, len(raw)
                if start < 0:  # small, or not stored as raw bytes: it stays
                    continue
                end = start + length
            _point(tensor, target.name, start, length)
    if len(directories) > 1:
        listed = ", ".join(sorted(map(str, directories)))
        raise GraphError(f"graph and weights lie in different directories ({listed}). Put them into one.")
    return Stored(onnx.ModelProto.FromString(model.SerializeToString()), real.parent)


def tables(stored: Stored) -> Tables:
    """Return embedding table and head as float32.

    Raises:
        GraphError: the embedding is not a lookup, or the head is packed in an unknown way.
    """
    model, directory = stored.model, stored.directory
    links = Links(model.graph)
    head = head_of(links)
    if head.op_type == "MatMulNBits":
        matrix = _unpacked(links, head, directory)
    else:
        if not links.is_constant(head.input[1]):
            raise GraphError(f"the head {head.name!r} has no constant weight.")
        matrix = np.ascontiguousarray(_value(model, head.input[1], directory).T)
    bias = None
    for node in path_to_head(links)[:-1]:
        if node.op_type == "Add":
            bias = _value(model, next(n for n in node.input if links.is_constant(n)), directory).reshape(-1)
    return tables_of(_embedding(model, directory), matrix, bias)


def num_parameters(model: onnx.ModelProto) -> int:
    """Return the number of weights of two and more dimensions. Packed ones count as if they were unpacked."""
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    inside = {name for node in packed for name in node.input[1:]}
    inside |= {name for node in model.graph.node if node.op_type == "GatherBlockQuantized" for name in node.input[2:]}
    plain = [t for t in model.graph.initializer if len(t.dims) > 1 and t.name not in inside]
    sizes = [attribute(node, "N") * attribute(node, "K") for node in packed]
    return sum(sizes) + sum(int(np.prod(tensor.dims)) for tensor in plain)


# --- bytes -----------------------------------------------------------------------------------------


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _entry(tensor: TensorProto, key: str, default: str = "") -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == key), default)


def _size(tensor: TensorProto) -> int:
    given = _entry(tensor, "length")
    return (
        int(given) if given else int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )


def _point(tensor: TensorProto, location: str, start: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(start)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _array(tensor: TensorProto, directory: Path) -> np.ndarray:
    """Return a weight as an array. Weights in files are mapped, not read."""
    if not _is_external(tensor):
        return numpy_helper.to_array(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset, count = int(_entry(tensor, "offset", "0")), _size(tensor) // dtype.itemsize
    mapped = np.memmap(directory / _entry(tensor, "location"), np.uint8, "r", offset, (count * dtype.itemsize,))
    return mapped.view(dtype).reshape(tuple(tensor.dims))


# --- constant expressions --------------------------------------------------------------------------


def _embedding(model: onnx.ModelProto, directory: Path) -> np.ndarray:
    """Return the result of the lookup that reads `input_ids`, for every id: (V, H)."""
    links, names = Links(model.graph), ["input_ids"]
    while names:
        for node in links.readers(names.pop(0)):
            if node.op_type in LOOKUPS and links.is_constant(node.input[0]):
                if node.op_type == "Gather":
                    return _value(model, node.input[0], directory)
                return _run(model, node.output[0], directory, fed=node.input[1], count=_rows_of(links, node.input[0]))
            if node.op_type in AROUND_A_LOOKUP:
                names += node.output
    raise GraphError(
        f"looked for the {' or '.join(sorted(LOOKUPS))} that turns `input_ids` into embeddings and found none."
    )


def _rows_of(links: Links, name: str) -> int:
    """Return the number of rows of a stored table."""
    if name not in links.weights:
        raise GraphError(f"the embedding table {name!r} is not a stored weight.")
    return links.weights[name].dims[0]


def _value(model: onnx.ModelProto, name: str, directory: Path) -> np.ndarray:
    """Compute a constant expression as float32."""
    stored = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if stored is not None:
        return np.array(_array(stored, directory), dtype=np.float32)
    return _run(model, name, directory)


def _run(model: onnx.ModelProto, name: str, directory: Path, *, fed: str | None = None, count: int = 0) -> np.ndarray:
    """Compute one value with the graph's own nodes.

    Args:
        model: the graph.
        name: the value.
        directory: directory of the graph's weights.
        fed: a value to replace by the ids 0 .. count - 1, or None.
        count: number of ids.
    """
    links, needed, wanted = Links(model.graph), set(), [name]
    while wanted:
        current = wanted.pop()
        if current not in needed and current != fed:
            needed.add(current)
            wanted += links.maker[current].input if current in links.maker else []
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    nodes = [node for node in model.graph.node if needed.intersection(node.output)]
    inputs = [] if fed is None else [helper.make_tensor_value_info(fed, TensorProto.INT64, [count])]
    result = helper.make_node("Cast", [name], ["as_float32"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("as_float32", TensorProto.FLOAT, None)
    graph = helper.make_graph([*nodes, result], "table", inputs, [output], weights)
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(part.SerializeToString(), session_options(directory), ["CPUExecutionProvider"])
    return session.run(None, {} if fed is None else {fed: np.arange(count)})[0]


def session_options(directory: Path) -> ort.SessionOptions:
    """Return options for a graph whose weights lie in `directory`. Idle threads leave the cores to the draft."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _unpacked(links: Links, node: onnx.NodeProto, directory: Path) -> np.ndarray:
    """Return the matrix (N, K) float32 of a MatMulNBits node.

    The node stores N rows of K numbers of `bits` bits, low bits first, in blocks. Each block has a scale and a zero
    point. Zero points are packed like the numbers or are floats; without them the zero is the middle of the range.
    """
    arrays = [_array(links.weights[name], directory) if name else None for name in node.input[1:5]]
    packed, scales, zeros, order = [*arrays, None, None][:4]
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size")
    rows, columns = attribute(node, "N"), attribute(node, "K")
    if bits not in (2, 4, 8) or packed is None or scales is None or order is not None:
        raise GraphError(
            f"the head {node.name!r} is packed in {bits} bits with inputs {list(node.input)}, which cannot be "
            "unpacked. Quantize with 2, 4 or 8 bits and without a group index."
        )
    blocks = -(-columns // block)
    numbers = _bits(packed.reshape(rows, -1), bits).reshape(rows, blocks, block)
    middle: np.ndarray | float = float(1 << (bits - 1))
    if zeros is not None and zeros.dtype == np.uint8:
        middle = _bits(zeros.reshape(rows, -1), bits)[:, :blocks, None]
    elif zeros is not None:
        middle = zeros.reshape(rows, blocks, 1).astype(np.float32)
    weights = (numbers - np.float32(middle)) * scales.reshape(rows, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(weights.reshape(rows, -1)[:, :columns])


def _bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack bytes (rows, n) uint8 into the numbers in them, (rows, n * 8 / bits) float32."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return numbers.reshape(len(packed), -1).astype(np.float32)
