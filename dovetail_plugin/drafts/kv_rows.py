"""Preallocated key/value storage of one attention layer of a draft."""

from typing import Protocol

from torch import Tensor

from ..cache import rows_like


class AttentionRows(Protocol):
    """Storage that an attention layer appends new rows to and reads all rows from."""

    @property
    def keys(self) -> Tensor:
        """Keys (1, kv_heads, m, head_dim) of all rows that may be attended to."""

    @property
    def values(self) -> Tensor:
        """Values (1, kv_heads, m, head_dim) of the same rows."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append n rows.

        Args:
            keys: (1, kv_heads, n, head_dim).
            values: (1, kv_heads, n, head_dim).
        """


class KVRows:
    """Keys and values of one attention layer for one sequence, in preallocated buffers.

    Args:
        capacity: rows that the buffers have room for. They are allocated by the first `append`.

    Attributes:
        capacity: rows that the buffers have room for.
        length: rows in use.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def keys(self) -> Tensor:
        """Keys (1, kv_heads, length, head_dim), a view."""
        assert self._buffers is not None
        return self._buffers[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """Values (1, kv_heads, length, head_dim), a view."""
        assert self._buffers is not None
        return self._buffers[1][:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append n rows. The buffers double when they are full. See `AttentionRows.append`."""
        end = self.length + keys.shape[2]
        if self._buffers is None:
            self.capacity = max(self.capacity, end)
            self._buffers = rows_like(keys, self.capacity), rows_like(values, self.capacity)
        elif end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            larger = rows_like(keys, self.capacity), rows_like(values, self.capacity)
            for new, old in zip(larger, self._buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = larger
        for buffer, rows in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = rows
        self.length = end
