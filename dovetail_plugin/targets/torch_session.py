"""One generation of a transformers model, run by torch without modification.

What a pass gets besides the tokens is the model's own business: `prepare_inputs_for_generation` makes it, from what
`generate` and its caller passed, as in plain generation. A chain is a pass over the next tokens, so it runs as the
model prepares it. For a tree with branches the model prepares a chain as deep as the tree. Each node then takes the
inputs and the mask of the chain's row at its own depth, and sees its ancestors only. This module does not know drafts,
sampling or how the text is chosen.
"""

import inspect
import threading
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import compat
from ..tree import DraftTree, ancestor_mask
from .base import TargetOutput
from .features import FeatureReader
from .positions import dynamic_from, levels_within, long_from, table_length
from .support import Support
from .text_rows import TextRows

PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs with a value for each row of a pass in their last dimension."""

_making = threading.Lock()
_locks: weakref.WeakKeyDictionary[PreTrainedModel, threading.RLock] = weakref.WeakKeyDictionary()


def pass_lock(model: PreTrainedModel) -> threading.RLock:
    """Return the lock that is held during one pass of a model; passes at the same time would share its cores."""
    with _making:
        return _locks.setdefault(model, threading.RLock())


class TorchSession:
    """One generation of a transformers model; implements `TargetSession`. Use it as a context manager.

    Args:
        model: decoder-only model, used with batch size 1.
        cache: transformers cache, empty or with the rows of earlier turns. It keeps its own layers until the block
            ends. Then it gets the text's rows, whatever ended the block.
        support: what the model's passes can do.
        prefill_chunk: prompt rows per pass; None runs the prompt at once.
        model_kwargs: further keyword arguments of the forward pass, as `generate` prepared them.
        feature_layers: see `FeatureReader`.

    Attributes:
        supports_tree: whether trees may have branches.
        limitation: why a pass may have one row only, or None.
        max_length: tokens up to which a pass may have several rows, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: compat.Cache,
        *,
        support: Support,
        prefill_chunk: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        feature_layers: tuple[int, ...] | None = None,
    ) -> None:
        self.model = model
        self.supports_tree, self.limitation = support.trees, support.limitation
        self.prefill_chunk = prefill_chunk
        self._given = cache
        self._kwargs = dict(model_kwargs or {})
        self._reader = FeatureReader(model, feature_layers)
        config = model.config.get_text_config(decoder=True)
        self._template = compat.layers_in(cache, config)
        self.max_length = min(filter(None, (table_length(model), dynamic_from(config))), default=None)
        self._boundary = long_from(config)
        self._mode = torch.inference_mode if support.inference_mode else torch.no_grad
        self._parameters = inspect.signature(model.forward).parameters
        self._lock = pass_lock(model)

    def __enter__(self) -> "TorchSession":
        with ExitStack() as stack:
            stack.enter_context(self._reader.installed())
            self.rows = TextRows(self._given, self._template)
            self._cache: Any = self.rows.cache  # what the model gets
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.rows.hand_back(self._given)
        finally:
            self._exit.close()

    # --- TargetSession protocol -----------------------------------------------------------------------

    @property
    def committed(self) -> int:
        """Rows of the text in the cache."""
        return self.rows.length

    def levels_left(self) -> int | None:
        """See `TargetSession.levels_left`."""
        # The prompt may have been only what is new, and models look at either length.
        lengths = (self._ids.shape[1] + 1, self.committed + 1)
        levels = (levels_within(self._boundary, length, self.committed) for length in lengths)
        return min((level for level in levels if level is not None), default=None)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, cached: int = 0) -> TargetOutput:
        """Run the part of the prompt that is not in the cache. The features include those of padding.

        Args:
            input_ids: see `TargetSession.prefill`.
            attention_mask: see `TargetSession.prefill`.
            cached: see `TargetSession.prefill`.
        """
        kwargs, new = self._kwargs, input_ids.shape[1] - cached
        kwargs[compat.CACHE] = self._cache
        kwargs["use_cache"] = True
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        if "position_ids" in self._parameters and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = compat.position_ids_for(self.model, input_ids, kwargs)
        if "logits_to_keep" in self._parameters:
            kwargs["logits_to_keep"] = 1
        with self._lock, self._reader.reading(), self._mode():
            self.rows.begin_pass(keeps_all=True)
            output = compat.run_prompt(self.model, input_ids, kwargs, cached=cached, chunk=self.prefill_chunk)
        self._adopt(output)
        self.rows.keep(range(new), new)
        self._ids = input_ids
        self._next(output, 1)
        return TargetOutput(output.logits[0, -1:], self._reader.take(new))

    def score(self, tree: DraftTree) -> TargetOutput:
        """Score a tree, which may be on any device."""
        return self.extend(tree, 0)

    def extend(self, tree: DraftTree, scored: int) -> TargetOutput:
        """Score a part of a tree; see `ExtendingSession.extend`. With 0 nodes scored it may be a chain everywhere."""
        new, depth = len(tree) - scored, int(tree.depths.max())
        chain = depth + 1 == len(tree) and not scored
        tokens = tree.tokens.to(self._ids.device)
        line = tokens if chain else tokens[_deepest_path(tree)]
        with self.rows.without_pass():
            inputs = self._prepare(torch.cat([self._ids, line[None]], dim=1), depth)
            if not chain:
                self._branch(inputs, tree, tokens, depth, scored)
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = new
        with self._lock, self._reader.reading(), self._mode():
            self.rows.begin_pass(extended=scored)
            output = self.model(**inputs, return_dict=True)
        if self._adopt(output) and len(tree) > 1:
            raise RuntimeError("the model began a new cache in a pass over several rows")
        self._scored, self._output = tokens, output
        return TargetOutput(output.logits[0, -new:], self._reader.take(new))

    def keep(self, path: list[int]) -> None:
        """Commit these rows of the last `score`, in order; drop the others."""
        self.rows.keep(path, len(self._scored))
        self._ids = torch.cat([self._ids, self._scored[path][None]], dim=1)
        self._next(self._output, len(path))

    # --- one pass ------------------------------------------------------------------------------

    def _next(self, output: Any, tokens: int) -> None:
        """Let the model's arguments describe the text with its next tokens, of which the last is the next root."""
        self._kwargs = compat.with_next_tokens(self.model, output, self._kwargs, tokens)
        self._kwargs[compat.CACHE] = self._cache
        self._output = output

    def _prepare(self, ids: Tensor, depth: int) -> dict[str, Any]:
        """Return the model's inputs for the last depth + 1 tokens of `ids`."""
        kwargs = compat.with_next_tokens(self.model, self._output, self._kwargs, depth)
        kwargs[compat.CACHE] = self._cache
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=depth + 1, **kwargs)
        device = self.model.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def _branch(self, inputs: dict[str, Any], tree: DraftTree, tokens: Tensor, depth: int, scored: int) -> None:
        """Turn the inputs of a chain of depth + 1 rows into those of a tree, whose first `scored` nodes are not run."""
        device = self.model.device
        depths, rows = tree.depths.to(device), depth + 1
        masks = compat.masks_of_pass(self.model, inputs, self._cache, rows)
        if "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(self.committed, self.committed + rows, device=device)[None]
        for name, dimension in self._dimensions_of_rows(inputs, depth).items():
            before = inputs[name].shape[dimension] - rows  # some inputs have entries for the whole text
            entries = torch.cat([torch.arange(before, device=device), before + depths]) if before else depths[scored:]
            inputs[name] = inputs[name].index_select(dimension, entries)
        inputs["input_ids"] = tokens.to(device)[None, scored:]
        ancestors = ancestor_mask(tree.parents.to(device), depth)
        made = {name: _tree_mask(mask, ancestors, depths, rows)[:, :, scored:] for name, mask in masks.items()}
        inputs["attention_mask"] = made if len(made) > 1 else next(iter(made.values()))

    def _dimensions_of_rows(self, inputs: dict[str, Any], depth: int) -> dict[str, int]:
        """Return the dimensions in which inputs, other than tokens and mask, have an entry for each row of the pass.

        Models may make inputs that nobody else knows. Their dimension is the one that a pass with one more row changes.
        """
        found = {name: -1 for name in PER_TOKEN if isinstance(inputs.get(name), Tensor)}
        known = {*found, "input_ids", "attention_mask"}
        others = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and name not in known and value is not self._kwargs.get(name)
        }
        if others:
            ids = torch.cat([self._ids, self._ids.new_zeros(1, depth + 2)], dim=1)
            longer = self._prepare(ids, depth + 1)
            for name, value in others.items():
                changed = [d for d, (a, b) in enumerate(zip(value.shape, longer[name].shape, strict=True)) if a != b]
                found |= {name: changed[0]} if changed else {}
        return found

    def _adopt(self, output: Any) -> bool:
        """Continue with another cache if the model made one.

        Phi-3 begins a new one where its rotary embedding changes. Models with cross attention put a cache for it around
        the one that they were given.

        Returns:
            Whether the model began a new one.
        """
        returned = next((output[name] for name in compat.CACHE_NAMES if output.get(name) is not None), self._cache)
        if returned is self._cache:
            return False
        wraps = getattr(returned, "self_attention_cache", None) is self.rows.cache
        if wraps:
            self._cache = returned
        else:
            self.rows = TextRows(returned, self._template)  # its rows are the text's already
            self._cache = self.rows.cache
        return not wraps


def _tree_mask(mask: Any, ancestors: Tensor, depths: Tensor, rows: int) -> Tensor:
    """Return the mask (1, 1 or heads, N, m + N) of a tree, in the form of a chain's mask.

    Args:
        mask: (1, 1 or heads, rows, m + rows) of the chain, bool or additive.
        ancestors: (N, N) bool.
        depths: (N,) int64.
        rows: rows of the chain, one for each depth.

    Raises:
        TypeError: the model makes another kind of mask.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TypeError("the model makes no 4-D mask")
    before = mask.shape[-1] - rows
    columns = torch.cat([torch.arange(before, device=depths.device), before + depths])
    mask = mask[..., depths, :][..., columns]
    hidden = torch.cat([ancestors.new_zeros(len(depths), before), ~ancestors], dim=1)
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _deepest_path(tree: DraftTree) -> Tensor:
    """Return the nodes from the root to one of the deepest nodes: (depth + 1,) int64."""
    node, path = int(tree.depths.argmax()), []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return torch.tensor(path[::-1], device="cpu")
