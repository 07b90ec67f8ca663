"""Target layers on the GPU: what VRAM the draft leaves holds the target's last layers, with their KV cache.

Enters: a transformers model on the CPU and the layers that go. Leaves: the same model, its modules moved and hooks at
the border, so that `generate` runs as before. Weights never move again: unlike an offloaded model's, layers on the CPU
compute there. Hidden states cross once a pass, and so do masks and rotary tables, whatever the number of layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from .transformers_model import decoder_layers


class Border:
    """The way to a device, for one model; remembers what has crossed in this pass, so nothing crosses twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._crossed: dict[int, tuple[Any, Any]] = {}  # id -> the value itself, which keeps the id taken, and its copy

    def new_pass(self, *_: Any) -> None:
        """Forward pre-hook of the base model: forget the last pass."""
        self._crossed.clear()

    def cross(self, value: Any) -> Any:
        """`value` with its tensors on the device; what holds no tensors is the value itself."""
        if isinstance(value, Tensor) and value.device == self.device:
            return value
        if not isinstance(value, (Tensor, tuple, list, dict)):
            return value  # a cache: its rows lie where its layers do
        known = self._crossed.get(id(value))
        if known is None:
            at_once = self.device.type != "cpu"  # a copy to the CPU must be there before it is read
            known = self._crossed[id(value)] = (value, send_to_device(value, self.device, non_blocking=at_once))
        return known[1]

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook of a module that lives on the device."""
        return tuple(self.cross(a) for a in args), {name: self.cross(value) for name, value in kwargs.items()}


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm behind the last layer, whose output is the draft's feature; None if it cannot be told."""
    children = [child for name, child in model.base_model.named_children() if "norm" in name or name == "ln_f"]
    return children[-1] if children else None


def place_layers(model: PreTrainedModel, layers: Sequence[int], device: torch.device | str) -> None:
    """Move these decoder layers, and the final norm with the last of them, to `device` for good.

    The head stays where it is: it reads as many bytes as several layers, and its logits are needed on the CPU.

    Args:
        model: on the CPU, not placed yet.
        layers: indices; the last ones of the model, so that hidden states cross once.
        device: of the GPU.

    Raises:
        ValueError: `layers` are not the model's last ones, or the model has been placed before.
    """
    if not layers:
        return
    modules = decoder_layers(model)
    wanted = list(range(len(modules) - len(layers), len(modules)))
    if sorted(layers) != wanted:
        raise ValueError(f"layers must be the model's last ones, {wanted}, got {sorted(layers)}.")
    if getattr(model, "_dovetail_border", None) is not None:
        raise ValueError(f"layers of this {type(model).__name__} have been moved before; load it anew.")
    head = model.get_output_embeddings()
    home = head.weight.device
    border, back = Border(torch.device(device)), Border(home)
    norm = final_norm(model)
    for module in [*(modules[i] for i in wanted), *([] if norm is None else [norm])]:
        module.to(device)
        module.register_forward_pre_hook(border.enter, with_kwargs=True)
    head.register_forward_pre_hook(back.enter, with_kwargs=True)
    for each in (border, back):
        model.base_model.register_forward_pre_hook(each.new_pass)
    model._dovetail_border = border
