"""Adds hidden states of single layers to the outputs of a prepared OpenVINO graph, for drafts of the EAGLE-3 kind.

A graph after `graph.prepare` goes in, and the same graph with further outputs comes out. `stored_graph` has the search
for the states.
"""

import openvino as ov
from openvino import opset13 as ops

from ..stored_graph import FEATURES, state_name, states_before_layers
from .graph import is_constant


def expose_states(model: ov.Model, layers: tuple[int, ...], count: int) -> bool:
    """Add outputs f32 (1, n, F) for hidden states of a prepared graph, in place.

    Args:
        model: the graph.
        layers: hidden states, in transformers' numbering. Those that are outputs already are skipped.
        count: number of decoder layers.

    Returns:
        Whether outputs were added.

    Raises:
        ValueError: the residual stream cannot be followed through the graph.
    """
    present = {name for port in model.outputs for name in port.get_names()}
    missing = [layer for layer in layers if state_name(layer) not in present]
    if not missing:
        return False
    features = next(port.get_node() for port in model.outputs if FEATURES in port.get_names())
    states = states_before_layers(_Ports(), features.input_value(0), count)
    results = []
    for layer in missing:
        state = states[layer]
        result = ops.result(state if state.get_element_type() == ov.Type.f32 else ops.convert(state, "f32"))
        result.output(0).set_names({state_name(layer)})
        results.append(result)
    model.add_results(results)
    model.validate_nodes_and_infer_types()
    return True


class _Ports:
    """The outputs of nodes as the values of a `ResidualGraph`."""

    def addends(self, value: ov.Output) -> list[ov.Output]:
        """Return both inputs of an Add that reads no weight."""
        node, computed = value.get_node(), self.sources(value)
        return computed if node.get_type_name() == "Add" and len(computed) == node.get_input_size() else []

    def sources(self, value: ov.Output) -> list[ov.Output]:
        """Return the inputs of a value's node that are not weights."""
        node = value.get_node()
        inputs = [node.input_value(index) for index in range(node.get_input_size())]
        return [port for port in inputs if not is_constant(port.get_node())]

    def uses(self, value: ov.Output) -> int:
        """Return how many inputs read a value."""
        return len(value.get_target_inputs())

    def before_casts(self, value: ov.Output) -> ov.Output:
        """Return the value itself: no Convert stands between the residual sums of an export."""
        return value

    def name(self, value: ov.Output) -> str:
        """Return the unique name of a value's node and its index."""
        return f"{value.get_node().get_name()}:{value.get_index()}"
