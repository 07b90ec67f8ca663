"""Hidden states of single layers as outputs of a prepared OpenVINO graph, which EAGLE-3 drafts read.

Enters: a graph after `openvino_graph.prepare`. Leaves: the same graph with further outputs. A stored graph does not
name its decoder layers, so the residual stream is followed backwards from what the head reads.
"""

import openvino as ov
from openvino import opset13 as ops

from ..stored_target import state_name, states_before_layers
from .graph import FEATURES, is_constant


def expose_states(model: "ov.Model", layers: tuple[int, ...], count: int) -> None:
    """Add outputs (1, n, F) for hidden states of a prepared graph, in transformers' numbering, in place.

    Args:
        layers: states wanted; those that are there already are let be.
        count: decoder layers of the model.

    Raises:
        ValueError: the residual stream cannot be followed through the graph.
    """
    there = {name for port in model.outputs for name in port.get_names()}
    wanted = [layer for layer in layers if state_name(layer) not in there]
    if not wanted:
        return
    states = _residual_states(model, count)
    results = []
    for layer in wanted:
        state = states[layer]
        result = ops.result(state if state.get_element_type() == ov.Type.f32 else ops.convert(state, "f32"))
        result.output(0).set_names({state_name(layer)})
        results.append(result)
    model.add_results(results)
    model.validate_nodes_and_infer_types()


def _residual_states(model: "ov.Model", count: int) -> list["ov.Output"]:
    """The residual stream before each of `count` layers, found backwards from what the head reads.

    A residual sum adds two computed values; the one that goes on is the one that others read, too.
    """
    node = next(p.get_node() for p in model.outputs if FEATURES in p.get_names()).input_value(0).get_node()
    stream: list[ov.Output] = []
    added = _nearest_sum(node)
    while added is not None:
        inputs = [added.input_value(i) for i in (0, 1)]
        going_on = [port for port in inputs if len(port.get_target_inputs()) > 1]
        if len(going_on) != 1:
            break
        stream.append(going_on[0])
        before = going_on[0].get_node()
        added = before if _is_sum(before) else None
    return states_before_layers(stream[::-1], count)


def _is_sum(node: "ov.Node") -> bool:
    """Whether a node adds two computed values."""
    inputs = [node.input_value(i).get_node() for i in range(node.get_input_size())]
    return node.get_type_name() == "Add" and not any(is_constant(n) for n in inputs)


def _nearest_sum(node: "ov.Node") -> "ov.Node | None":
    """The nearest node before this one that adds two computed values, breadth first."""
    queue, seen = [node], set()
    while queue:
        node = queue.pop(0)
        if _is_sum(node):
            return node
        for i in range(node.get_input_size()):
            before = node.input_value(i).get_node()
            if before.get_name() not in seen and not is_constant(before):
                seen.add(before.get_name())
                queue.append(before)
    return None
