"""Runs a draft's steps on the CPU with packed weights.

A pass of a draft reads all its weights for a few rows, as a pass of a target does. So the same kernels make it faster,
whatever the target runs on. Rounding may change what the draft proposes, and the target still verifies it, so the text
stays the same.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kernels.linear import PackedLinear
from .blocks import MLP, Attention, Block, ConcatFusion, Eagle3Block, Eagle3Fusion, GatedFusion, RMSNorm
from .config import DovetailConfig
from .network import DraftNetwork
from .torch_runner import TorchRunner

PARTS = (
    *(Attention, Block, ConcatFusion, Eagle3Block, Eagle3Fusion, GatedFusion, MLP, RMSNorm),
    *(nn.Identity, nn.Linear, nn.ModuleList),
)
"""Modules of a draft that a packed copy can stand for."""

Module = TypeVar("Module", bound=nn.Module)


def can_be_packed(draft: DraftNetwork) -> bool:
    """Return whether a packed copy computes what the draft computes: no part is another class, patched or hooked."""
    kind, own = type(draft), draft.__dict__
    if (kind.step, kind.head) != (DraftNetwork.step, DraftNetwork.head) or "step" in own or "head" in own:
        return False
    return all(
        type(part) in PARTS and not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
        for module in (draft.fusion, draft.layers)
        for part in module.modules()
    )


class PackedRunner(TorchRunner):
    """A draft's modules with packed weights; implements `DraftRunner`.

    The draft itself does not change. Norms and the tables of the target are shared with it.

    Args:
        draft: attached to its target, on the CPU.
        head: of the target, if it is packed. A draft that proposes all tokens through it multiplies with it, too.
    """

    def __init__(self, draft: DraftNetwork, head: PackedLinear | None) -> None:
        self.weights = "int4" if head is not None and head.kind == "int4" else "int8"
        super().__init__(_packed_copy(draft, head, self.weights))


class _PackedNetwork(DraftNetwork):
    """A draft network whose products are those of packed layers."""

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__(config)
        self.packed_head: PackedLinear | None = None

    def times_head(self, features: Tensor) -> Tensor:
        return super().times_head(features) if self.packed_head is None else self.packed_head(features)


class _PackedFusion(GatedFusion):
    """A gated fusion whose matrices are packed layers."""

    def __init__(self, fusion: GatedFusion, kind: str) -> None:
        nn.Module.__init__(self)
        self.input_layernorm = fusion.input_layernorm
        names = ("W_1", "W_2", "W_z")
        self.layers = nn.ModuleDict({name: _layer(getattr(fusion, name).T, None, kind) for name in names})

    def times(self, x: Tensor, name: str) -> Tensor:
        return self.layers[name](x)


def _packed_copy(draft: DraftNetwork, head: PackedLinear | None, kind: str) -> DraftNetwork:
    """Return a network that computes what `draft` computes, with packed weights. It does not keep the draft alive."""
    with torch.device("meta"):
        network = _PackedNetwork(copy.deepcopy(draft.config))
    network.fusion = _packed_fusion(draft.fusion, kind)
    network.layers = _with_packed_layers(draft.layers, kind)
    network.norm, network.rotary = draft.norm, draft.rotary
    network.embedding_device = draft.embedding_device
    assert draft.head_weight is not None, "the draft has to be attached first"
    if draft.config.fusion == "eagle3" or (head is not None and draft.token_ids is not None):
        network.packed_head = _layer(draft.head_weight, draft.head_bias, kind)
    elif head is not None:
        network.packed_head = head.twin()
    tables = {name: getattr(draft, name) for name in ("embed_weight", "head_weight", "head_bias", "token_ids")}
    if network.packed_head is not None:
        tables |= {"head_weight": network.packed_head.weight.detach(), "head_bias": None}  # a placeholder
    for name, table in tables.items():
        delattr(network, name)
        network.register_buffer(name, table, persistent=False)
    return network


def _packed_fusion(fusion: nn.Module, kind: str) -> nn.Module:
    if isinstance(fusion, Eagle3Fusion):
        return fusion  # its matrix projects features, which the drafter does with the draft itself
    return _PackedFusion(fusion, kind) if isinstance(fusion, GatedFusion) else _with_packed_layers(fusion, kind)


def _with_packed_layers(module: Module, kind: str) -> Module:
    """Return a copy of a module with packed linear layers; other weights are shared."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, shared)
    for name, layer in list(copied.named_modules()):
        if type(layer) is nn.Linear:
            copied.set_submodule(name, PackedLinear.of(layer, kind))
    return copied


def _layer(weight: Tensor, bias: Tensor | None, kind: str) -> PackedLinear:
    """Return a packed layer with weights (M, K) and a bias (M,) that belong to no linear layer."""
    with torch.device("meta"):
        made = PackedLinear(weight.shape[1], weight.shape[0], bias=False, kind=kind, dtype=weight.dtype)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    made.pack_(weight)
    return made
