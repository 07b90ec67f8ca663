"""The parts of editing a stored graph that do not depend on its format.

Holds the names of the inputs and outputs that every edited graph has, the conversion of a graph's arrays to the tables
that a draft borrows, and the search for the hidden states between layers. This module does not know engines, trees or
generation.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch

from dovetail_plugin.targets.base import Tables

TREE_BIAS, FIRST_LOGIT_ROW, FEATURES = "tree_bias", "first_logit_row", "features"
"""Names that the edits add: a bias on every attention mask, the first row the head computes, what the head reads."""

HIDDEN = float(np.finfo(np.float16).min)
"""Added to a mask where a row must not attend. It fits the half precision in which some graphs keep masks."""

NO_BIAS = np.zeros((1, 1, 1, 1), dtype=np.float32)
"""The tree bias of a pass without a tree."""

Value = TypeVar("Value")


class GraphError(ValueError):
    """The graph cannot be made a target. The message names the node or input that was looked for."""


def missing_package(what: str, package: str, extra: str) -> str:
    """Return the message of an ImportError that names the extra to install.

    Args:
        what: what needs the package, in the plural.
        package: the package that cannot be imported.
        extra: extra of dovetail-plugin that installs it.
    """
    return (
        f"{what} need the {package} package. Install the {extra} extra of dovetail-plugin, for example with "
        f"pip install '.[{extra}]' in a checkout."
    )


def state_name(layer: int) -> str:
    """Return the name of a graph's output for a hidden state, in transformers' numbering."""
    return f"hidden_state.{layer}"


def tables_of(embedding: np.ndarray, head: np.ndarray, bias: np.ndarray | None) -> Tables:
    """Make tables from arrays without copies. An embedding and a head that are equal become one tensor.

    Args:
        embedding: (V, H) float32.
        head: (V, H) float32.
        bias: (V,) float32, or None.
    """
    first, second = torch.from_numpy(embedding), torch.from_numpy(head)
    if first.shape == second.shape and torch.equal(first, second):
        second = first
    return Tables(first, second, None if bias is None else torch.from_numpy(bias))


class ResidualGraph(Protocol[Value]):
    """A graph as the search for residual sums reads it. Values computed from weights alone are left out."""

    def addends(self, value: Value) -> Sequence[Value]:
        """Return the two computed values that `value` is the sum of, or nothing if it is not such a sum."""

    def sources(self, value: Value) -> Sequence[Value]:
        """Return the computed values that `value` is made from."""

    def uses(self, value: Value) -> int:
        """Return how many nodes read `value`."""

    def before_casts(self, value: Value) -> Value:
        """Return `value` as it is before conversions of its type."""

    def name(self, value: Value) -> str:
        """Return a name that no other value has."""


def states_before_layers(graph: ResidualGraph[Value], end: Value, count: int) -> list[Value]:
    """Return the hidden state before each of `count` decoder layers.

    A stored graph does not name its layers, so the residual stream is followed backwards from `end`. A residual sum
    adds two computed values. The one that is read by other nodes too is the stream, the other one is the output of
    an attention or an MLP.

    Args:
        graph: the graph.
        end: value that the head reads.
        count: number of layers.

    Raises:
        ValueError: the stream does not have one or two sums in each layer.
    """
    stream: list[Value] = []
    added = _nearest_sum(graph, end)
    while added is not None:
        shared = [value for value in graph.addends(added) if graph.uses(value) > 1]
        if len(shared) != 1:
            break
        stream.append(shared[0])
        before = graph.before_casts(shared[0])
        added = before if graph.addends(before) else None
    per_layer, rest = divmod(len(stream), count)
    if rest or per_layer not in (1, 2):
        raise ValueError(
            f"the graph has {len(stream)} residual Add nodes for {count} layers. Expected one or two in each layer. "
            "Hidden states of single layers cannot be read from it, which EAGLE-3 drafts need. Use another draft."
        )
    return stream[::-1][::per_layer]


def _nearest_sum(graph: ResidualGraph[Value], end: Value) -> Value | None:
    """Return the sum of two computed values that is nearest before `end`, or `end` itself, breadth first."""
    queue, seen = [end], {graph.name(end)}
    while queue:
        value = queue.pop(0)
        if graph.addends(value):
            return value
        for source in graph.sources(value):
            if graph.name(source) not in seen:
                seen.add(graph.name(source))
                queue.append(source)
    return None
