"""What runs a target: torch for transformers' own models, an adapter for those of other libraries.

An `Engine` knows one model: whether it can be verified, its embedding table and head, its kind of cache, and
how to open a `Target` session for one generation. `engine_of` finds it. Nothing above this module asks what
kind of model a target is.
"""

import importlib
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from .cache import refuse_reason
from .target import Target, TorchTarget

ADAPTERS = {
    "optimum.intel.openvino": "dovetail_plugin.adapters.openvino",
    "optimum.onnxruntime": "dovetail_plugin.adapters.onnxruntime",
}
"""Package of a model's class -> module of ours with `engine_for(model)`; imported when such a model comes."""

_engines: weakref.WeakKeyDictionary[Any, "Engine"] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Tables:
    """What a draft borrows. embedding, head: (V, H), any float dtype; bias: (V,) or None.

    `head` is `embedding` itself where the two are tied.
    """

    embedding: Tensor
    head: Tensor
    bias: Tensor | None


class Engine(Protocol):
    """One model and what it takes to draft for it."""

    config: PretrainedConfig

    @property
    def rounding(self) -> torch.dtype:
        """The coarsest float type that results pass through; torch.float32 where texts must be identical."""

    runs_in_torch: bool
    """Whether passes need torch's threads."""

    def check(self) -> None:
        """Refuse a model that cannot be verified, before any long work.

        Raises:
            ValueError: with the reason and the remedy.
        """

    def tables(self) -> Tables:
        """Embedding table and head."""

    def cache(self, given: Any) -> Any:
        """The cache to generate with: `given` by the caller, or a new one if None; knows `get_seq_length()`.

        Raises:
            ValueError: the given one cannot take back rejected rows.
        """

    def draft_runner(self, draft: Any) -> Any:
        """A `DraftRunner` of this engine's for a `DovetailDraft` on the CPU, or None to run it in torch."""

    def session(
        self,
        cache: Any,
        *,
        max_length: int,
        max_nodes: int,
        prefill_chunk: int | None,
        model_kwargs: dict[str, Any],
        feature_layers: tuple[int, ...] | None = None,
    ) -> AbstractContextManager[Target]:
        """A target for one generation that goes on behind the rows of `cache`.

        Args:
            max_length: tokens the text may reach.
            max_nodes: rows of the largest tree.
            prefill_chunk: prompt rows in one pass; None leaves it to the engine.
            model_kwargs: further arguments of the model's forward pass.
            feature_layers: see `TorchTarget`.

        Raises:
            ValueError: the engine cannot read these layers, or an argument of the forward pass.
        """


def engine_of(model: Any) -> Engine:
    """The engine of a model, the same one every time."""
    engine = _engines.get(model)
    if engine is None:
        engine = _engines[model] = _find_engine(model)
    return engine


def _find_engine(model: Any) -> Engine:
    own = getattr(model, "dovetail_engine", None)
    if own is not None:
        return own
    for base in type(model).__mro__:
        for package, adapter in ADAPTERS.items():
            if base.__module__.startswith(package):
                return importlib.import_module(adapter).engine_for(model)
    return TorchEngine(model)


class TorchEngine:
    """A transformers model, run by torch and unmodified."""

    runs_in_torch = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)  # the engine is remembered by its model and must not keep it alive
        self.config = model.config

    @property
    def model(self) -> PreTrainedModel:
        """The model, which is there as long as somebody asks for its engine."""
        model = self._model()
        assert model is not None
        return model

    @property
    def rounding(self) -> torch.dtype:
        """The model's dtype."""
        return self.model.dtype

    def check(self) -> None:
        """As `Engine.check`: encoder-decoder, state-space or hybrid models, weights that are not in memory."""
        model, name = self.model, type(self.model).__name__
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder model; drafting works with decoder-only targets.")
        if model._is_stateful or not model._supports_default_dynamic_cache():
            raise ValueError(
                f"{name} keeps a recurrent state that cannot be rolled back when drafted tokens are rejected; "
                "generate without a draft."
            )
        reason = refuse_reason(DynamicCache(config=model.config.get_text_config(decoder=True)))
        if reason:
            raise ValueError(f"{name} cannot take back rejected tokens: {reason}. Generate without a draft.")
        off = [key for key, parameter in model.named_parameters() if parameter.device.type == "meta"]
        if off:
            raise ValueError(
                f"{len(off)} weights of {name} are not in memory (meta device or offloaded to disk), {off[0]} for "
                'one. Load the target with device_map="cpu"; on a CPU there is nothing to gain from offloading.'
            )
        if model.base_model is model:
            raise ValueError(f"{name} has no base model under its head, so its features cannot be read.")
        self.tables()

    def tables(self) -> Tables:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for what, module in (("input embedding", embedding), ("output head", head)):
            weight = getattr(module, "weight", None)
            if weight is None or not weight.is_floating_point():
                raise ValueError(f"the target's {what} has no floating-point weight that the draft could share.")
        tied = head.weight.data_ptr() == embedding.weight.data_ptr() and head.weight.device.type != "meta"
        return Tables(
            embedding.weight.detach(),
            embedding.weight.detach() if tied else head.weight.detach(),
            None if getattr(head, "bias", None) is None else head.bias.detach(),
        )

    def cache(self, given: Cache | None) -> Cache:
        if given is None:
            return DynamicCache(config=self.config.get_text_config(decoder=True))
        reason = "it is a static cache" if isinstance(given, StaticCache) else refuse_reason(given)
        if reason:
            raise ValueError(
                f"past_key_values ({type(given).__name__}) cannot be used with a draft: {reason}. Pass a DynamicCache."
            )
        return given

    def draft_runner(self, draft: Any) -> None:
        """None: the draft's own modules."""

    def session(
        self,
        cache: Cache,
        *,
        max_length: int,
        max_nodes: int,
        prefill_chunk: int | None,
        model_kwargs: dict[str, Any],
        feature_layers: tuple[int, ...] | None = None,
    ) -> TorchTarget:
        return TorchTarget(
            self.model,
            cache,
            max_length=max_length,
            max_nodes=max_nodes,
            prefill_chunk=prefill_chunk,
            model_kwargs=model_kwargs,
            feature_layers=feature_layers,
        )


@torch.inference_mode()
def next_logits(model: Any, input_ids: Tensor) -> Tensor:
    """A plain run over `input_ids` (1, T) from scratch: the logits (1, V) of the last row."""
    engine = engine_of(model)
    session = engine.session(
        engine.cache(None), max_length=input_ids.shape[1], max_nodes=1, prefill_chunk=None, model_kwargs={}
    )
    with session as target:
        return target.prefill(input_ids, None).logits
