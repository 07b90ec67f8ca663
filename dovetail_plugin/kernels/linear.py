"""A linear layer with packed weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .library import FORMATS, NUMBER_TYPES, library
from .packing import pack, unpack

KINDS = tuple(FORMATS)
"""Kinds of packed weights."""


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed for the CPU kernels.

    The result of a row has the same bits, whatever other rows a pass has. Without the library of kernels, on other
    devices and where a gradient is wanted, torch multiplies with the unpacked weights.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is a bias.
        kind: "int8" or "int4".
        dtype: of the weights before they are packed, and of the bias.

    Raises:
        InputError: there is no such kind.

    Attributes:
        weight: packed weights, one dimension of uint8. Until `pack_` is called: (M, K) of a float dtype.
        bias: (M,) or None.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, kind: str, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"there is no kind of packed weights {kind!r}. Use one of {', '.join(KINDS)}.")
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        weight = torch.empty(out_features, in_features, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> "PackedLinear":
        """Pack the weights of a linear layer; its bias is shared."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False, kind=kind, dtype=linear.weight.dtype)
        made.weight = nn.Parameter(linear.weight, requires_grad=False)
        made.bias = linear.bias
        made.pack_()
        return made.train(linear.training)

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed."""
        return not self.weight.is_floating_point()

    def packed(self, weight: Tensor) -> nn.Parameter:
        """Return what `weight` becomes for weights (M, K) of a float dtype.

        Raises:
            InputError: see `packing.pack`.
        """
        return nn.Parameter(pack(weight, self.kind), requires_grad=False)

    def pack_(self) -> None:
        """Pack the weights, if they are not yet. The tensor that held them does not change."""
        if not self.is_packed:
            self.weight = self.packed(self.weight)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (M, K) that the packed ones stand for."""
        if not self.is_packed:
            return self.weight.to(dtype)
        return unpack(self.weight, self.out_features, self.in_features, self.kind).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias: (..., M) in the dtype of x (..., K)."""
        kernels = library() if self._fits_kernels(x) else None
        if kernels is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.unpacked(x.dtype), bias)
        rows = x.reshape(-1, self.in_features)
        dtype = rows.dtype if rows.dtype in NUMBER_TYPES else torch.float32
        bias = None if self.bias is None else self.bias.detach().to(dtype).contiguous()
        out = kernels.linear(rows.to(dtype).contiguous(), self.weight, self.out_features, self.kind, bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _fits_kernels(self, x: Tensor) -> bool:
        if x.shape[-1] != self.in_features:
            raise InputError(f"a layer for rows of {self.in_features} numbers got rows of {x.shape[-1]}.")
        plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and self.weight.device.type == "cpu"
        return plain and self.is_packed and not (x.requires_grad and torch.is_grad_enabled())

    def extra_repr(self) -> str:
        """Return sizes and kind, for `print`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, kind={self.kind!r}"


def linear_of(packed: PackedLinear, dtype: torch.dtype, device: Any = "cpu") -> nn.Linear:
    """Return a linear layer with the unpacked weights, in `dtype` on `device`."""
    with torch.device("meta"):
        made = nn.Linear(packed.in_features, packed.out_features, bias=False, dtype=dtype)
    made.weight = nn.Parameter(packed.unpacked(dtype).to(device), requires_grad=False)
    if packed.bias is not None:
        made.bias = nn.Parameter(packed.bias.to(dtype).to(device), requires_grad=False)
    return made.train(packed.training)
