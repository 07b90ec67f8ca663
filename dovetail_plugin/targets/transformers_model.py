"""Transformers models as targets, run by torch without modification.

`TorchEngine` checks a model and opens sessions. `TorchSession` puts preallocated storage under the model's cache and
scores a tree with a 4-D mask and explicit positions. It reads features through forward hooks: the output of the base
model (after the final norm) or hidden states of several layers. This module does not know drafts, sampling or the text.
"""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache import TreeLayer, borrow, refuse_reason
from ..compat import (
    Cache,
    DynamicCache,
    StaticCache,
    attention_of,
    cache_argument,
    keeps_recurrent_state,
    layers_for,
)
from ..tree import DraftTree, ancestor_mask
from .base import Tables, TargetOutput

TREE_ATTENTION = ("sdpa", "eager")
"""Attention implementations of transformers that accept a 4-D additive mask."""


class TorchSession:
    """One generation of a transformers model; implements `TargetSession`. Use it as a context manager.

    Args:
        model: decoder-only model, used with batch size 1.
        cache: transformers cache, empty or with the rows of earlier turns. The same object contains transformers' own
            layers again after the `with` block.
        max_length: number of tokens that the text may have, for the size of the storage.
        max_nodes: rows of the largest tree (N).
        prefill_chunk: prompt rows per pass; None runs the prompt at once.
        model_kwargs: further keyword arguments of the prompt's forward pass.
        feature_layers: hidden states whose concatenation is the feature, in transformers' numbering (0 is the
            embeddings, i the output of decoder layer i - 1); None is the state after the final norm.

    Attributes:
        supports_tree: False if the model's attention does not accept a 4-D mask, or the model does not accept position
            ids. Such a model gets chains only.
        max_length: the model's `max_position_embeddings`, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        max_length: int,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        self.model = model
        self.feature_layers = feature_layers
        self.cache = cache
        self._visible: Tensor | None = None  # (1, tokens so far) bool where the prompt is padded
        self.prefill_chunk = prefill_chunk
        self.model_kwargs = model_kwargs or {}
        self._capacity, self._max_nodes = max_length + max_nodes, max_nodes
        config = model.config.get_text_config(decoder=True)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._template = layers_for(config)
        self._layer_types = getattr(config, "layer_types", None) or ["all"] * len(self._template)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self.supports_tree = self._takes_positions and attention_of(config) in TREE_ATTENTION
        self._cache_name = cache_argument(model)
        self._features: list[Tensor] = []

    def __enter__(self) -> "TorchSession":
        with ExitStack() as stack:
            self.layers: list[TreeLayer] = stack.enter_context(
                borrow(self.cache, self._template, self._capacity, self._max_nodes)
            )
            for module in self._feature_modules():
                stack.enter_context(captured_outputs(module, self._features))
            self._exit = stack.pop_all()
        self.committed = self.layers[0].get_seq_length()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._exit.close()

    # --- TargetSession protocol -----------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> TargetOutput:
        """Run the part (1, T) of the prompt that is not in the cache. The features include those of padding."""
        first, total = self.committed, self.committed + input_ids.shape[1]
        positions = torch.arange(total, device=input_ids.device)[None]
        if attention_mask is not None and not bool(attention_mask.all()):
            self._visible = attention_mask.bool()
            positions = (self._visible.long().cumsum(-1) - 1).clamp(min=0)
        chunk = self.prefill_chunk or input_ids.shape[1]
        features, logits = [], input_ids.new_empty(0)
        for start in range(first, total, chunk):
            end = min(start + chunk, total)
            mask = None if self._visible is None else self._visible[:, :end].long()
            rows = input_ids[:, start - first : end - first]
            output = self._forward(rows, mask, positions[:, start:end], logits_to_keep=1, **self.model_kwargs)
            logits = output.logits[-1:]
            features.append(output.features)
        self.committed = total
        self.position = int(positions[0, -1]) + 1
        return TargetOutput(logits, torch.cat(features) if len(features) > 1 else features[0])

    @torch.inference_mode()
    def score(self, tree: DraftTree) -> TargetOutput:
        """Score a tree, which may be on any device."""
        device = self.model.device
        depths = tree.depths.to(device)
        if self.supports_tree:
            mask = self._tree_mask(tree)
        else:
            mask = self._padding_mask(len(tree))
        output = self._forward(tree.tokens.to(device)[None], mask, (self.position + depths)[None])
        return output

    def keep(self, path: list[int]) -> None:
        """Commit these rows of the last `score`, in order; drop the others."""
        count = len(path)
        moved = next((i for i, node in enumerate(path) if node != i), count)  # earlier rows do not move
        index = None
        if moved < count:
            index = torch.tensor(path[moved:], device=self.model.device) - moved
        for layer in self.layers:
            layer.keep(self.committed + moved, index, count - moved)
        self.committed += count
        self.position += count

    # --- one pass ------------------------------------------------------------------------------

    def _forward(self, input_ids: Tensor, mask: Any, positions: Tensor, **kwargs: Any) -> TargetOutput:
        if self._takes_positions:
            kwargs["position_ids"] = positions
        if not self._takes_logits_to_keep:
            kwargs.pop("logits_to_keep", None)
        self._features.clear()
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **{self._cache_name: self.cache},
            **kwargs,
        )
        return TargetOutput(output.logits[0], self._take_features())

    def _feature_modules(self) -> list[nn.Module]:
        """Return the modules whose outputs make up the features, in the order in which a pass runs them."""
        if self.feature_layers is None:
            return [self.model.base_model]
        layers = decoder_layers(self.model)
        embedding = self.model.get_input_embeddings()
        return [layers[state - 1] if state else embedding for state in sorted(self.feature_layers)]

    def _take_features(self) -> Tensor:
        """Return the features (n, F) of the latest pass."""
        if self.feature_layers is None:
            return self._features.pop()[0]
        order = sorted(self.feature_layers)
        device = self._features[-1].device
        return torch.cat([self._features[order.index(s)][0].to(device) for s in self.feature_layers], dim=-1)

    def _padding_mask(self, new_rows: int) -> Tensor | None:
        """Return (1, committed + new) int64 for models that build their own causal mask; None without padding."""
        if self._visible is None:
            return None
        ones = self._visible.new_ones(1, self.committed + new_rows - self._visible.shape[1])
        return torch.cat([self._visible, ones], dim=1).long()

    def _tree_mask(self, tree: DraftTree) -> Any:
        """Return the 4-D additive mask of a tree, or a dict by layer type where layers differ in what they see."""
        first_of = {name: index for index, name in reversed(list(enumerate(self._layer_types)))}
        masks = {name: self._layer_mask(tree, index) for name, index in first_of.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _layer_mask(self, tree: DraftTree, index: int) -> Tensor:
        """Return an additive mask (1, 1, N, rows that the layer returns) in the model's dtype.

        The window is taken from the model and not from the cache, because a cache that was created without the model's
        config keeps all rows of sliding layers.
        """
        layer, window = self.layers[index], getattr(self._template[index], "sliding_window", None)
        device, dtype, nodes = self.model.device, self.model.dtype, len(tree)
        width, first = layer.get_mask_sizes(nodes)
        depths = tree.depths.to(device)
        seen = torch.ones(nodes, width, dtype=torch.bool, device=device)
        seen[:, width - nodes :] = ancestor_mask(tree.parents.to(device), int(tree.depths.max()))
        if self._visible is not None:
            prompt = self._visible[0, first:]
            seen[:, : prompt.shape[0]] &= prompt
        if window is not None:
            committed = torch.arange(first, self.committed, device=device)
            columns = torch.cat([committed, self.committed + depths])
            seen &= columns[None] > (self.committed + depths)[:, None] - window
        mask = torch.zeros(nodes, width, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


@contextmanager
def captured_outputs(module: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """Append the last hidden state (B, n, F) of every forward pass of `module` to `into`, while the block runs."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            into.append(output[0])
        else:
            into.append(output if isinstance(output, Tensor) else output.last_hidden_state)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        into.clear()


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
        if model.base_model is model:
            raise ValueError(f"{name} has no base model under its head, so its features cannot be read.")
        self.tables()

    def num_parameters(self) -> int:
        """Return the number of parameters of the model."""
        return self.model.num_parameters()

    def tables(self) -> Tables:
        """Return the embedding table and the head, without copies.

        Raises:
            ValueError: one of them is quantized or missing.
        """
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

    def draft_runner(self, draft: nn.Module) -> None:
        """Return None: torch runs the draft's own modules."""

    def session(
        self,
        cache: Cache,
        *,
        max_length: int,
        max_nodes: int,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> TorchSession:
        """Open a session; see `Engine.session`."""
        return TorchSession(
            self.model,
            cache,
            max_length=max_length,
            max_nodes=max_nodes,
            prefill_chunk=prefill_chunk,
            model_kwargs=model_kwargs,
            feature_layers=feature_layers,
        )
