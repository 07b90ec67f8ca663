"""Reads features of a transformers model: hidden states that forward hooks see while a pass of one session runs.

Several threads may run one model at once. A hook therefore looks at the thread: it takes the states of the pass that
its own session runs, and no others.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class FeatureReader:
    """Collects the features of the passes of one session. The hooks stay on the model while `installed` lasts.

    Args:
        model: the target.
        layers: hidden states whose concatenation is the feature, in transformers' numbering (0 is the embeddings, i the
            output of decoder layer i - 1); None is the state after the final norm; () reads nothing.

    Raises:
        ValueError: the model's decoder layers cannot be identified.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...] | None) -> None:
        self._device = model.device
        if layers is None:
            self._modules: list[nn.Module] = [feature_module(model)]
            self._order = [0]
            return
        self._order = []
        self._modules = []
        if not layers:
            return
        decoder, embedding = decoder_layers(model), model.get_input_embeddings()
        states = sorted(set(layers))
        self._modules = [decoder[state - 1] if state else embedding for state in states]
        self._order = [states.index(state) for state in layers]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the hooks on the model while the block runs.

        If an interrupt comes while they are being removed, they go with the reader.
        """
        self._states: list[list[Tensor]] = [[] for _ in self._modules]
        self._thread: int | None = None
        handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, handles).atexit = False
        try:
            for index, module in enumerate(self._modules):
                handles.append(module.register_forward_hook(_hook(weakref.ref(self), index)))
            yield
        finally:
            _remove(handles)
            self._states.clear()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Collect the states of the passes that this thread runs in the block."""
        for states in self._states:
            states.clear()
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def take(self, rows: int) -> Tensor:
        """Return the features (rows, F) of the last rows of the passes in `reading`."""
        if not self._modules:
            return torch.empty(rows, 0, device=self._device)
        states = [torch.cat(s) if len(s) > 1 else s[0] for s in self._states]
        device = states[-1].device
        chosen = [states[index][-rows:].to(device) for index in self._order]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def _hook(reference: "weakref.ref[FeatureReader]", index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        reader = reference()
        if reader is None or reader._thread != threading.get_ident():
            return
        state = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        reader._states[index].append((output[0] if state is None else state)[0])

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def feature_module(model: PreTrainedModel) -> nn.Module:
    """Return the module whose output is the last hidden state, after the final norm.

    Raises:
        ValueError: the model has no such module.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    # Within the decoder first: a vision tower may have as many layers, and no text passes through it.
    holders = itertools.chain(_holders_of_layers(model, decoder), _holders_of_layers(model, model))
    for module in itertools.chain((decoder, model.base_model), holders):
        if module is not model and head not in module.modules():
            return module
    raise ValueError(f"{type(model).__name__} has no decoder apart from its head, so its features cannot be read.")


def _holders_of_layers(model: PreTrainedModel, part: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a part in which a list of as many layers as the decoder's lies, from the outside in."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in sorted(part.named_modules(), key=lambda named: named[0].count(".")):
        if name and any(isinstance(m, nn.ModuleList) and len(m) == count for m in list(module.modules())[1:]):
            yield module


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of a model's decoder layers.

    Raises:
        ValueError: the model has no such list, or more than one.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {count} modules, so its decoder layers cannot be "
            "identified. They cannot be moved to a GPU, and EAGLE-3 drafts cannot read features from them."
        )
    return lists[0]
