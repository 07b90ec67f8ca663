"""The rows of one text in the key/value state of an OpenVINO inference request.

A state grows at its end with every pass and can otherwise only be replaced as a whole. Rows that the text does not use
stay in it as holes, which the caller's mask hides, until `RowSlots.compact` copies the state without them. Positions
are inputs of the graph, so a row can lie in any slot. This module does not know what runs.
"""

import numpy as np
import openvino as ov


class RowSlots:
    """Which slots of a request's state hold rows that are in use.

    Attributes:
        slots: rows of the state, holes included.
        used: (n,) int64 slots of the rows in use, ascending.
    """

    def __init__(self) -> None:
        self.slots = 0
        self.used = np.zeros(0, dtype=np.int64)

    @property
    def length(self) -> int:
        """Number of rows in use. Setting it back drops the rows behind it."""
        return len(self.used)

    @length.setter
    def length(self, length: int) -> None:
        assert length <= len(self.used)
        self.used = self.used[:length]

    @property
    def holes(self) -> int:
        """Number of rows of the state that are not in use."""
        return self.slots - self.length

    def grow(self, count: int) -> np.ndarray:
        """Count `count` rows at the end of the state, as holes until `use`, and return their slots (count,) int64."""
        added = np.arange(self.slots, self.slots + count)
        self.slots += count
        return added

    def use(self, slots: np.ndarray) -> None:
        """Take rows into use, behind the others.

        Args:
            slots: (n,) int64, ascending, all behind those in use.
        """
        self.used = np.concatenate([self.used, slots])

    def compact(self, request: ov.InferRequest, axis: int) -> None:
        """Copy the state without its holes.

        Args:
            request: the request that holds the state.
            axis: dimension of its tensors that counts rows.
        """
        for state in request.query_state():
            rows = np.take(state.state.data, self.used, axis=axis)
            state.state = ov.Tensor(np.ascontiguousarray(rows))
        self.used = np.arange(self.length)
        self.slots = self.length
