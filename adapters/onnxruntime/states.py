"""Hidden states of single layers as outputs of a prepared ONNX graph, which EAGLE-3 drafts read.

Enters: a graph after `onnxruntime_graph.prepare`. Leaves: the same graph with further outputs. An export does not name
its decoder layers, so the residual stream is followed backwards from what the head reads.
"""

from onnx import ModelProto, TensorProto, helper

from ..stored_target import state_name, states_before_layers
from .graph import FEATURES, Links


def expose_states(model: ModelProto, layers: tuple[int, ...], count: int) -> bool:
    """Add outputs f32 (1, n, F) for hidden states in transformers' numbering, in place; False if all were there.

    Args:
        layers: states wanted. count: decoder layers of the model.

    Raises:
        ValueError: the residual stream cannot be followed through the graph.
    """
    graph = model.graph
    there = {value.name for value in graph.output}
    wanted = [layer for layer in layers if state_name(layer) not in there]
    if not wanted:
        return False
    states = _residual_states(Links(graph), count)
    for layer in wanted:
        name = state_name(layer)
        graph.node.append(
            helper.make_node("Cast", [states[layer]], [name], name=f"dovetail/{name}", to=TensorProto.FLOAT)
        )
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return True


def _residual_states(links: Links, count: int) -> list[str]:
    """The residual stream before each of `count` layers.

    A residual sum adds two computed values; the one that goes on is the one that others read, too.
    """
    stream: list[str] = []
    added = _nearest_sum(links, FEATURES)
    while added is not None:
        going_on = [name for name in links.maker[added].input if sum(1 for _ in links.readers(name)) > 1]
        if len(going_on) != 1:
            break
        stream.append(going_on[0])
        before = going_on[0]
        while links.kind(before) == "Cast":
            before = links.maker[before].input[0]
        added = before if _is_sum(links, before) else None
    return states_before_layers(stream[::-1], count)


def _is_sum(links: Links, name: str) -> bool:
    """Whether a value is the sum of two computed ones."""
    return links.kind(name) == "Add" and not any(links.is_constant(source) for source in links.maker[name].input)


def _nearest_sum(links: Links, name: str) -> str | None:
    """The nearest value behind this one, or itself, that is the sum of two computed ones, breadth first."""
    queue, seen = [name], {name}
    while queue:
        name = queue.pop(0)
        if _is_sum(links, name):
            return name
        node = links.maker.get(name)
        for source in () if node is None else node.input:
            if source not in seen and not links.is_constant(source):
                seen.add(source)
                queue.append(source)
    return None
