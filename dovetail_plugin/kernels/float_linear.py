"""A linear layer whose floating-point weights oneDNN has packed for a few rows.

Torch's own product of 2 to 8 rows reorders the weights in each call, or reads them more than once. oneDNN, which is in
torch, can order them once. The numbers stay the weights' own; only the order of sums may be another one.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import vector_extensions
from . import FLOAT
from .library import NUMBER_TYPES
from .linear import PackedLinear

logger = logging.getLogger(__name__)

ROWS = 8
"""Rows that the order of packed weights is made for. The order for one row gives it other bits."""


@functools.cache
def packed_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which oneDNN multiplies weights of `dtype` here, or None if it cannot.

    It is `dtype` itself where the CPU has arithmetic for it. Otherwise it is float32, which has all numbers of bfloat16
    and float16: without such arithmetic a product of 8 rows takes several times as long as in float32.
    """
    if dtype not in NUMBER_TYPES:
        return None
    found = dtype if _has_arithmetic(dtype) else torch.float32
    try:
        weight = _reordered(torch.ones(2, 4, dtype=found, device="cpu"))
        _multiplied(torch.ones(1, 4, dtype=found, device="cpu"), weight, None)
    except (RuntimeError, AttributeError) as error:
        logger.warning("oneDNN cannot pack weights here, so they run in torch as they are: %s", error)
        return None
    return found


class FloatLinear(PackedLinear):
    """A linear layer whose floating-point weights oneDNN has packed; arguments as `PackedLinear`.

    The numbers are those of the weights. Sums are added in another order than in torch's own product, and for large
    matrices the order depends on the number of rows, as it does there. Where oneDNN cannot pack them, and on other
    devices, the layer has ordinary weights.

    Attributes:
        packed_weight: (M, K) in oneDNN's own layout and of `packed_dtype`, or None while the weights are ordinary.
    """

    kinds = (FLOAT,)

    def pack_(self, weight: Tensor) -> None:
        """Take over the numbers of `weight` (M, K), which does not change.

        Raises:
            InputError: `weight` has another shape.
        """
        self.check_shape(weight)
        dtype = packed_dtype(weight.dtype) if weight.device.type == "cpu" else None
        if dtype is None:
            self.packed_weight, self.weight = None, nn.Parameter(weight.detach(), requires_grad=False)
        else:
            self.packed_weight = _reordered(weight.detach().to(dtype))
            self.hold_place(weight.dtype)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (M, K)."""
        return (self.weight if self.packed_weight is None else self.packed_weight.to_dense()).to(dtype)

    def _product(self, rows: Tensor) -> Tensor | None:
        packed = self.packed_weight
        if packed is None:
            return None
        bias = None if self.bias is None else self.bias.detach().to(packed.dtype)
        return _multiplied(rows.to(packed.dtype), packed, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "FloatLinear":
        """Move or cast the layer. Weights whose dtype or device changes are unpacked for it."""
        packed, dtype = self.packed_weight, self.weight.dtype
        if packed is None:
            super()._apply(fn, recurse)
            return self
        after = fn(torch.empty(0, dtype=dtype, device="cpu"))
        stays = (after.device.type, after.dtype) == ("cpu", dtype)
        weight = self.weight if stays else nn.Parameter(self.unpacked(dtype), requires_grad=False)
        self.packed_weight, self._parameters["weight"] = None, None if stays else weight
        try:
            super()._apply(fn, recurse)
        finally:
            if stays:
                self.packed_weight, self._parameters["weight"] = packed, weight
        if not stays:
            self.pack_(self.weight)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination.pop(f"{prefix}packed_weight", None) is not None:
            destination[f"{prefix}weight"] = self.unpacked(self.weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Return the layer's state with ordinary weights, because oneDNN's have no bytes that could be stored."""
        state = self.__dict__.copy()
        if self.packed_weight is not None:
            weight = nn.Parameter(self.unpacked(self.weight.dtype), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
            state["_buffers"] = {**self._buffers, "packed_weight": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the layer, and pack its weights as this CPU needs them."""
        super().__setstate__(state)
        self.pack_(self.weight)


def _has_arithmetic(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        units = {"avx512_bf16", "amx_bf16"} & vector_extensions()
        return bool(units) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _reordered(weight: Tensor) -> Tensor:
    """Return a matrix (M, K) in the layout that oneDNN wants for it."""
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def _multiplied(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows (N, K) times weights (M, K) in oneDNN's layout, plus bias: (N, M), all of one dtype."""
    with torch.no_grad():
        return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed, bias, "none", [], "")
