"""Layers of a target on the GPU: the VRAM that the draft leaves holds the target's last layers, with their cache.

Input: a transformers model on the CPU and the layers to move. Output: a handle that undoes it. The model stays the
same object and `generate` runs as before: its modules are moved and hooks carry tensors across the border. Unlike an
offloaded model's weights, these never move during a pass; layers on the CPU compute there. Hidden states, masks and
rotary tables cross once per pass, however many layers are on the GPU.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..kernels.linear import PackedLinear
from .features import decoder_layers


class Border:
    """Carries tensors to a device, for one model, and remembers what crossed in this pass: nothing crosses twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._crossed: dict[int, tuple[Any, Any]] = {}  # id -> the value itself, which keeps the id taken, and its copy

    def new_pass(self, *_: Any) -> None:
        """Forward pre-hook of the base model: forget the last pass."""
        self._crossed.clear()

    def cross(self, value: Any) -> Any:
        """`value` with its tensors on the device, or `value` itself if it holds no tensors."""
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


class PlacedLayers:
    """Handle of `place_layers`. `remove()`, or the end of a `with` block, undoes the placement.

    Attributes:
        border: the way to the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.border = Border(device)
        self._homes: list[tuple[nn.Module, torch.device]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "PlacedLayers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks and move the modules back; does nothing the second time. Caches stay where they are."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._homes:
            module, home = self._homes.pop()
            module.to(home)

    @property
    def active(self) -> bool:
        """Whether modules are placed now."""
        return bool(self._hooks)


_placed: "weakref.WeakKeyDictionary[PreTrainedModel, PlacedLayers]" = weakref.WeakKeyDictionary()


def place_layers(model: PreTrainedModel, layers: Sequence[int], device: torch.device | str) -> PlacedLayers:
    """Move these decoder layers, and the final norm with the last of them, to `device`.

    The head stays on the CPU: it reads as many bytes as several layers, and its logits are needed there.

    Args:
        model: on the CPU.
        layers: indices of the model's last layers, so that hidden states cross once; empty moves nothing.
        device: the GPU.

    Returns:
        A handle; `remove()` puts everything back.

    Raises:
        ValueError: `layers` are not the model's last ones, layers of the model are placed already, or their weights
            are packed for the CPU.
    """
    placed = PlacedLayers(torch.device(device))
    if not layers:
        return placed
    modules = decoder_layers(model)
    wanted = list(range(len(modules) - len(layers), len(modules)))
    if sorted(layers) != wanted:
        raise ValueError(f"layers must be the model's last ones, {wanted}, got {sorted(layers)}.")
    if any(isinstance(part, PackedLinear) for index in wanted for part in modules[index].modules()):
        raise ValueError(
            "the weights of these layers are packed for the CPU. Load the target without CpuWeights to put layers on "
            "a GPU."
        )
    if model in _placed and _placed[model].active:
        raise ValueError(
            f"layers of this {type(model).__name__} are placed already. Call remove() on what place_layers returned."
        )
    head, norm = model.get_output_embeddings(), final_norm(model)
    back = Border(head.weight.device)
    try:
        for module in [*(modules[i] for i in wanted), *([] if norm is None else [norm])]:
            placed._homes.append((module, next(module.parameters(), head.weight).device))
            module.to(device)
            placed._hooks.append(module.register_forward_pre_hook(placed.border.enter, with_kwargs=True))
        placed._hooks.append(head.register_forward_pre_hook(back.enter, with_kwargs=True))
        for border in (placed.border, back):
            placed._hooks.append(model.base_model.register_forward_pre_hook(border.new_pass))
    except BaseException:  # the GPU is full, or the user interrupts
        placed.remove()
        raise
    _placed[model] = placed
    return placed


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm behind the last layer, whose output is the draft's feature; None if the model has none by that name."""
    children = [child for name, child in model.base_model.named_children() if "norm" in name or name == "ln_f"]
    return children[-1] if children else None


def parts_of(model: nn.Module, layers: Sequence[nn.Module], norm: nn.Module | None) -> dict[str, int | str]:
    """Module names that cover a model, none of them inside another.

    Args:
        layers: the decoder layers; their names get their index.
        norm: the final norm; its name gets "norm". All other names get "rest".
    """
    special: dict[int, int | str] = {id(layer): index for index, layer in enumerate(layers)}
    if norm is not None:
        special[id(norm)] = "norm"

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, int | str]]:
        for name, child in module.named_children():
            if id(child) in special:
                yield prefix + name, special[id(child)]
            elif any(id(inside) in special for inside in child.modules()):
                yield from walk(child, f"{prefix}{name}.")
            else:
                yield prefix + name, "rest"
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield prefix + name, "rest"

    return dict(walk(model, ""))
