"""Transformers models as targets, run by torch without modification: what is checked, borrowed and opened."""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..cache import refuse_reason
from ..compat import Cache, DynamicCache, StaticCache, keeps_recurrent_state, layers_for
from ..kernels.linear import PackedLinear
from .base import Tables
from .features import feature_module
from .positions import table_length
from .support import support_of
from .torch_session import TorchSession

REFUSED = {
    "doge": "what a token attends to beyond keep_window_size depends on the number of tokens in a pass",
}
"""Type of a text model -> why drafts are refused. A short pass does not show it."""


class TorchEngine:
    """A transformers model, run by torch; implements `Engine`."""

    runs_in_torch = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)  # engines are cached by model and must not keep it alive
        self.config = model.config

    @property
    def model(self) -> PreTrainedModel:
        """The model. Callers of an engine hold a reference to it."""
        model = self._model()
        assert model is not None
        return model

    @property
    def position_limit(self) -> int | None:
        """Positions that the model has a table for; None where they are computed."""
        return table_length(self.model)

    @property
    def rounding(self) -> torch.dtype:
        """The model's dtype."""
        return self.model.dtype

    def check(self) -> None:
        """Refuse encoder-decoder, state-space and hybrid models, and weights that are not in memory.

        Raises:
            ValueError: with the reason and the remedy.
        """
        model, name = self.model, type(self.model).__name__
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder model; drafting works with decoder-only targets.")
        if keeps_recurrent_state(model):
            raise ValueError(
                f"{name} keeps a recurrent state that cannot be rolled back when drafted tokens are rejected; "
                "generate without a draft."
            )
        reason = refuse_reason(layers_for(model.config.get_text_config(decoder=True)))
        if reason:
            raise ValueError(f"{name} cannot take back rejected tokens: {reason}. Generate without a draft.")
        off = [key for key, parameter in model.named_parameters() if parameter.device.type == "meta"]
        if off:
            raise ValueError(
                f"{len(off)} weights of {name} are not in memory (meta device or offloaded to disk), for "
                f'example {off[0]}. Load the target with device_map="cpu".'
            )
        reason = REFUSED.get(model.config.get_text_config(decoder=True).model_type)
        if reason:
            raise ValueError(f"{name} cannot be verified: {reason}. Generate without a draft.")
        if model.training and getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"{name} is in training with gradient checkpointing, where it keeps no key/value cache. Call "
                "model.eval() first."
            )
        feature_module(model)
        self._table_modules()

    def num_parameters(self) -> int:
        """Return the number of parameters of the model."""
        return self.model.num_parameters()

    def tables(self) -> Tables:
        """Return the embedding table and the head. Only a head with packed weights is copied.

        Raises:
            ValueError: one of them is quantized by something else, or missing.
        """
        embedding, head = self._table_modules()
        table, bias = embedding.weight.detach(), getattr(head, "bias", None)
        weight = head.unpacked(head.weight.dtype) if isinstance(head, PackedLinear) else head.weight.detach()
        tied = weight.data_ptr() == table.data_ptr() and weight.device.type != "meta"
        return Tables(table, table if tied else weight, None if bias is None else bias.detach())

    def _table_modules(self) -> tuple[Any, Any]:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for what, module in (("input embedding", embedding), ("output head", head)):
            weight = getattr(module, "weight", None)
            if weight is None or not weight.is_floating_point():
                raise ValueError(f"the target's {what} has no floating-point weight that the draft could share.")
        return embedding, head

    def cache(self, given: Cache | None) -> Cache:
        """Return `given`, or a new `DynamicCache`.

        Raises:
            ValueError: `given` is static, or has layers that cannot drop rejected rows.
        """
        if given is None:
            return DynamicCache(config=self.config.get_text_config(decoder=True))
        reason = "it is a static cache" if isinstance(given, StaticCache) else refuse_reason(given.layers)
        if reason:
            raise ValueError(
                f"the cache ({type(given).__name__}) cannot be used with a draft: {reason}. Pass a DynamicCache."
            )
        return given

    def packed_head(self) -> PackedLinear | None:
        """Return the head if its weights are packed; see `Engine.packed_head`."""
        head = self.model.get_output_embeddings()
        packed = head.packed_weight if isinstance(head, PackedLinear) else None
        return head if packed is not None and packed.device.type == "cpu" else None

    def draft_runner(self, draft: nn.Module) -> None:
        """Return None: drafts run in torch."""

    def session(
        self,
        cache: Cache,
        *,
        max_nodes: int,  # noqa: ARG002 - rows are reserved as the text grows
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> TorchSession:
        """Open a session; see `Engine.session`."""
        model = self.model
        return TorchSession(
            model,
            cache,
            support=support_of(model, lambda support: TorchSession(model, self.cache(None), support=support)),
            prefill_chunk=prefill_chunk,
            model_kwargs=model_kwargs,
            feature_layers=feature_layers,
        )
