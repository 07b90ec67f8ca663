"""Experts of MoE models with packed weights, one layer for each expert and matrix.

transformers keeps the matrices of all experts of a layer in two parameters, and chooses the function that multiplies
with them by a name in the config. This module registers such a function under `IMPLEMENTATION`. The parameters become
lists of packed layers. Each expert's product is that of a packed layer, and the results of a row are added in the order
of its experts' numbers, so a row depends on no other row, as far as torch's activation functions do not.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..errors import InputError
from ..kernels import FLOAT
from ..kernels.float_linear import FloatLinear
from ..kernels.linear import PackedLinear

IMPLEMENTATION = "dovetail_packed"
"""Name of `multiply` among transformers' functions for experts."""

NEEDED = ("has_gate", "has_bias", "is_transposed", "num_experts", "config", "_apply_gate")
"""Attributes that transformers gives modules of experts whose function can be chosen."""


def make_layer(inputs: int, outputs: int, kind: str, *, bias: bool, dtype: torch.dtype) -> PackedLinear:
    """Return a layer of a kind of weights, on the meta device, whose weights are packed later."""
    with torch.device("meta"):
        return (FloatLinear if kind == FLOAT else PackedLinear)(inputs, outputs, bias=bias, kind=kind, dtype=dtype)


def matrices_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's parameters that can be packed by expert; none if `multiply` cannot run it."""
    if not all(hasattr(module, name) for name in NEEDED) or not hasattr(type(module).forward, "__wrapped__"):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    found = [module._parameters.get(name) for name in names]
    return names if all(each is not None and each.ndim == 3 for each in found) else ()


def is_unknown(module: nn.Module) -> bool:
    """Return whether a module has matrices of experts that cannot be packed."""
    stacked = [name for name, each in module._parameters.items() if each is not None and each.ndim == 3]
    of_experts = "expert" in type(module).__name__.lower()
    return (any("proj" in name for name in stacked) or (of_experts and bool(stacked))) and not matrices_of(module)


def use_packed(module: nn.Module) -> None:
    """Have a module of experts run `multiply`. Its config is a copy from then on, so that of the model stays."""
    config: Any = copy.deepcopy(module.config)
    config._experts_implementation = IMPLEMENTATION
    module.config = config


def pack_matrices(module: nn.Module, name: str, matrices: Tensor, kind: str) -> None:
    """Replace a parameter of a module of experts by packed layers.

    Args:
        module: see `matrices_of`.
        name: of the parameter.
        matrices: (E, M, K), or (E, K, M) if the module says that they are transposed.
        kind: of the packed weights.

    Raises:
        InputError: they have another shape than the parameter.
    """
    expected = tuple(module._parameters[name].shape)  # type: ignore[union-attr]
    if tuple(matrices.shape) != expected:
        raise InputError(f"the weights of {name} are {tuple(matrices.shape)}, and the config says {expected}.")
    layers = _empty(module, name, kind)
    for layer, matrix in zip(layers, matrices, strict=True):
        layer.pack_((matrix.T if module.is_transposed else matrix).contiguous())
        compat.mark_initialized(layer.weight)
    _replace(module, name, layers)


def expect_packed(module: nn.Module, name: str, kind: str) -> None:
    """Replace a parameter of a module of experts by layers for packed weights that a file has."""
    layers = _empty(module, name, kind)
    for layer in layers:
        layer.expect_packed(tied=False)
    _replace(module, name, layers)


def _empty(module: nn.Module, name: str, kind: str) -> list[PackedLinear]:
    parameter = module._parameters[name]
    assert parameter is not None, "see `matrices_of`"
    experts, *sizes = parameter.shape
    outputs, inputs = reversed(sizes) if module.is_transposed else sizes
    return [make_layer(inputs, outputs, kind, bias=False, dtype=parameter.dtype) for _ in range(experts)]


def _replace(module: nn.Module, name: str, layers: list[PackedLinear]) -> None:
    packed: Any = nn.ModuleList(layers)
    compat.mark_initialized(packed)  # models initialize their experts by the parameter's name
    del module._parameters[name]
    module.add_module(name, packed)


def multiply(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of each row.

    Args:
        experts: the module, with packed layers.
        hidden_states: (N, H) float.
        top_k_index: (N, K) integers, the experts of each row. Numbers beyond the experts stand for none.
        top_k_weights: (N, K) float.

    Returns:
        (N, H), the sum of the experts' results by weight, in the dtype of `hidden_states`.
    """
    first, bias = ("gate_up_proj", "gate_up_proj_bias") if experts.has_gate else ("up_proj", "up_proj_bias")
    numbers, order = top_k_index.sort(dim=1)
    weights = top_k_weights.gather(1, order)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    results = torch.zeros(*numbers.shape, hidden_states.shape[-1], dtype=dtype, device=hidden_states.device)
    for expert in numbers.unique().tolist():
        if expert >= experts.num_experts:
            continue
        row, slot = (numbers == expert).nonzero(as_tuple=True)
        inner = _product(experts, first, bias, expert, hidden_states[row])
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        result = _product(experts, "down_proj", "down_proj_bias", expert, inner)
        if getattr(experts, "has_post_expert_norm", False):
            result = experts.post_expert_norm(result)
        results[row, slot] = (result * weights[row, slot, None]).to(dtype)
    total = results[:, 0]
    for slot in range(1, results.shape[1]):
        total = total + results[:, slot]
    return total.to(hidden_states.dtype)


def _product(experts: Any, name: str, bias: str, expert: int, rows: Tensor) -> Tensor:
    out: Tensor = getattr(experts, name)[expert](rows)
    return out + getattr(experts, bias)[expert] if experts.has_bias else out


compat.register_experts(IMPLEMENTATION, multiply)
