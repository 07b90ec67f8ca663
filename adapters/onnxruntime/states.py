"""Adds hidden states of single layers to the outputs of a prepared ONNX graph, for drafts of the EAGLE-3 kind.

A graph after `graph.prepare` goes in, and the same graph with further outputs comes out. `stored_graph` has the search
for the states.
"""

from onnx import ModelProto, TensorProto, helper

from ..stored_graph import FEATURES, state_name, states_before_layers
from .graph import Links


def expose_states(model: ModelProto, layers: tuple[int, ...], count: int) -> bool:
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
    graph = model.graph
    present = {value.name for value in graph.output}
    missing = [layer for layer in layers if state_name(layer) not in present]
    if not missing:
        return False
    states = states_before_layers(_Names(Links(graph)), FEATURES, count)
    for layer in missing:
        name = state_name(layer)
        graph.node.append(
            helper.make_node("Cast", [states[layer]], [name], name=f"dovetail/{name}", to=TensorProto.FLOAT)
        )
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return True


class _Names:
    """The names in a graph as the values of a `ResidualGraph`."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def addends(self, value: str) -> list[str]:
        """Return both inputs of an Add that reads no weight."""
        computed = self.sources(value)
        return computed if self._links.kind(value) == "Add" and len(computed) == 2 else []

    def sources(self, value: str) -> list[str]:
        """Return the inputs of a value's node that do not depend on weights alone."""
        node = self._links.maker.get(value)
        return [] if node is None else [name for name in node.input if not self._links.is_constant(name)]

    def uses(self, value: str) -> int:
        """Return how many nodes read a value."""
        return sum(1 for _ in self._links.readers(value))

    def before_casts(self, value: str) -> str:
        """Return the value that a chain of Casts starts from."""
        while self._links.kind(value) == "Cast":
            value = self._links.maker[value].input[0]
        return value

    def name(self, value: str) -> str:
        """Return the value, which is a name."""
        return value
