"""A linear layer with packed weights."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import FORMATS
from .library import NUMBER_TYPES, library, packed_bytes
from .packing import pack, unpack


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed for the CPU kernels.

    With the kernels, the result of a row has the same bits whatever other rows a pass has. Without them, on other
    devices, and where a gradient or a trace is wanted, torch multiplies with the unpacked weights.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is a bias.
        kind: "int8" or "int4", or one of the other `FORMATS`, whose bytes come from elsewhere: see `take_`.
        dtype: of the weights before they are packed, and of the bias.

    Raises:
        InputError: there is no such kind.

    Attributes:
        weight: (M, K) of a float dtype. When the weights are packed, a placeholder without memory whose numbers are
            NaN: models read the dtype and shape of their weights.
        packed_weight: (bytes,) uint8, or None until the weights are packed.
        bias: (M,) or None.
    """

    kinds: tuple[str, ...] = FORMATS
    """Kinds of weights that such a layer can have."""

    packed_weight: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, kind: str, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if kind not in self.kinds:
            raise InputError(f"there is no kind of packed weights {kind!r}. Use one of {', '.join(self.kinds)}.")
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        weight = torch.empty(out_features, in_features, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_buffer("packed_weight", None)

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> "PackedLinear":
        """Pack the weights of a linear layer; its bias is shared."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False, kind=kind, dtype=linear.weight.dtype)
        made.bias = linear.bias
        made.pack_(linear.weight)
        return made.train(linear.training)

    def twin(self) -> "PackedLinear":
        """Return a layer with the same packed weights and bias, which are shared, and without hooks."""
        with torch.device("meta"):
            made = type(self)(self.in_features, self.out_features, bias=False, kind=self.kind)
        made.packed_weight, made.bias = self.packed_weight, self.bias
        made.hold_place(self.weight.dtype)
        return made

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed."""
        return self.packed_weight is not None

    def pack_(self, weight: Tensor) -> None:
        """Take over the numbers of `weight` (M, K), which does not change.

        Raises:
            InputError: `weight` has another shape; or see `packing.pack`.
        """
        self.check_shape(weight)
        self.packed_weight = pack(weight, self.kind)
        self.hold_place(weight.dtype)

    def check_shape(self, weight: Tensor) -> None:
        """Refuse weights of another layer.

        Raises:
            InputError: `weight` is not (M, K).
        """
        if weight.shape != (self.out_features, self.in_features):
            raise InputError(
                f"the weights are {tuple(weight.shape)}, and the config says {(self.out_features, self.in_features)}."
            )

    def take_(self, packed: Tensor, dtype: torch.dtype) -> None:
        """Take over weights that are packed already, without a copy.

        Args:
            packed: (bytes,) uint8, in the layer's kind.
            dtype: that the layer's weights are to have for models that ask.

        Raises:
            InputError: these are not as many bytes as the layer's weights have.
        """
        size = packed_bytes(self.out_features, self.in_features, self.kind)
        if packed.shape != (size,) or packed.dtype != torch.uint8:
            raise InputError(
                f"{self.out_features} x {self.in_features} weights in {self.kind} are {size} bytes, got "
                f"{tuple(packed.shape)} numbers of {packed.dtype}."
            )
        self.packed_weight = packed
        self.hold_place(dtype)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (M, K) that the packed ones stand for."""
        if self.packed_weight is None:
            return self.weight.to(dtype)
        return unpack(self.packed_weight, self.out_features, self.in_features, self.kind, dtype)

    def expect_packed(self, *, tied: bool) -> None:
        """Make room, on the meta device, for packed weights that a file has; `hold_place` ends this.

        Args:
            tied: whether the weights are tied to others, so that a parameter is looked for.
        """
        size = packed_bytes(self.out_features, self.in_features, self.kind)
        self.packed_weight = torch.empty(size, dtype=torch.uint8, device="meta")
        if not tied:
            self._parameters["weight"] = None  # nothing is loaded for it

    def hold_place(self, dtype: torch.dtype) -> None:
        """Have a placeholder of `dtype` for the weights, which are packed."""
        nothing = torch.full((), torch.nan, dtype=dtype, device="cpu").expand(self.out_features, self.in_features)
        self.weight = nn.Parameter(nothing, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """Move or cast the layer. The placeholder is made anew, because a copy of it would take memory."""
        if self.packed_weight is None:
            return super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self.weight.dtype)).dtype
        del self.weight
        try:
            return super()._apply(fn, recurse)
        finally:
            self.hold_place(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        if self.packed_weight is not None:
            memo[id(self.weight)] = self.weight  # it holds nothing
            memo[id(self.packed_weight)] = self.packed_weight  # nothing writes into it
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias: (..., M) in the dtype of x (..., K)."""
        if not x.is_floating_point():
            raise TypeError(f"a linear layer multiplies floating-point numbers, got {x.dtype}.")
        out = self._product(x.reshape(-1, self.in_features)) if self._is_plain(x) else None
        if out is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.unpacked(x.dtype), bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor | None:
        """Return rows (N, K) W^T + bias, (N, M), or None if there are no kernels for it here."""
        kernels = None if self.packed_weight is None else library()
        if kernels is None or self.packed_weight is None:
            return None
        dtype = rows.dtype if rows.dtype in NUMBER_TYPES else torch.float32
        bias = None if self.bias is None else self.bias.detach().to(dtype).contiguous()
        return kernels.linear(rows.to(dtype).contiguous(), self.packed_weight, self.out_features, self.kind, bias)

    def _is_plain(self, x: Tensor) -> bool:
        """Return whether kernels can read x: ordinary numbers on the CPU, and neither a gradient nor a trace."""
        if x.shape[-1] != self.in_features:
            raise InputError(f"a layer for rows of {self.in_features} numbers got rows of {x.shape[-1]}.")
        if self.packed_weight is None or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return False
        plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" == self.packed_weight.device.type
        return plain and not (x.requires_grad and torch.is_grad_enabled())

    def extra_repr(self) -> str:
        """Return sizes and kind, for `print`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, kind={self.kind!r}"
