"""Attention and activations whose rows do not depend on each other, to the bit, for models with packed weights.

Packed linear layers, norms and rotary embeddings treat each row alone. With the attention and the activations of this
module a node of a tree, a row of a chain and the lone row of plain generation have the same bits. The attention is
registered in transformers under the name `NAME`; `make_row_exact` gives both to a model.

What the kernels do not compute runs in torch: gradients, traces, other devices, and long prompts. Which of the two it
is depends on nothing that a draft changes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .. import compat
from ..kernels.library import NUMBER_TYPES, library

NAME = "dovetail"
"""Name of the attention implementation in transformers."""

LONG_PROMPT = 1024
"""Rows beyond which the pass over the beginning of a text runs in torch, whose matrix products are faster there."""

LARGEST_HEAD = 512
"""Most numbers of a head that the kernels take."""


def make_row_exact(model: PreTrainedModel) -> None:
    """Give a model attention and activations whose rows do not depend on each other, where it can have them.

    A model that uses eager attention keeps it, unless the reason is that torch's has no softcap. Without the kernels
    nothing changes.
    """
    if library() is None:
        return
    attention = compat.attention_of(model.config.get_text_config(decoder=True))
    capped = attention == "eager" and not compat.has_torch_attention(model) and _has_softcap(model)
    if (attention == "sdpa" or capped) and compat.can_set_attention(model):
        model.set_attn_implementation(_implementations(model))
    for name, module in list(model.named_modules()):
        activation = compat.activation_of(module)
        if activation is not None:
            model.set_submodule(name, Activation(module, activation))


def _implementations(model: PreTrainedModel) -> str | dict[str, str]:
    """Return a model's attention: `NAME`, but other parts, such as towers for images, keep one that is not sdpa."""
    text, parts = model.config.get_text_config(decoder=True), compat.parts_of(model.config)
    found = {key: part for key, part in parts.items() if part is not text and compat.attention_of(part) != "sdpa"}
    kept = {key: compat.attention_of(part) or "eager" for key, part in found.items()}
    return {"": NAME, **dict.fromkeys(parts, NAME), **kept} if kept else NAME


def _has_softcap(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


class Activation(nn.Module):
    """An activation function in which the result of a number does not depend on where it stands.

    Args:
        original: module that is used where the kernels are not.
        name: of the function, one of `kernels.library.ACTIVATIONS`.
    """

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__()
        self.original, self.name = original, name

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x), in the shape and dtype of x."""
        kernels = library() if _fits_kernels(x) else None
        return self.original(x) if kernels is None else kernels.activate(x.contiguous(), self.name)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention; called by models of transformers.

    Args:
        module: attention layer.
        query: (B, H, N, D).
        key: (B, K, L, D), where K divides H.
        value: (B, K, L, E).
        attention_mask: (B or 1, 1, N, L) bool, True where a key is seen, or numbers that are added; or None.
        dropout: share of weights that are dropped in training.
        scaling: factor of the scores; D^-1/2 if it is None.
        is_causal: without a mask, whether rows see no later keys; the layer's own if it is None.
        kwargs: "softcap", "s_aux" (sinks) and "position_bias" as transformers passes them; others change nothing.

    Returns:
        (B, N, H, E), and None for the weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernels = library() if not dropout and _fits(query, key, value, attention_mask, causal, kwargs) else None
    if kernels is None and (softcap is not None or sinks is not None):
        mask = _causal_mask(query, key) if attention_mask is None and causal else attention_mask
        return _in_torch(query, key, value, mask, dropout, scaling, softcap, sinks), None
    if kernels is None:
        forward = AttentionInterface()["sdpa"]
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return forward(module, query, key, value, attention_mask, **options)
    out = []
    for b in range(query.shape[0]):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query[b], key[b], value[b]))
        mask = None if attention_mask is None else _mask_of(attention_mask, b)
        options = {"scale": scaling, "softcap": softcap or 0.0, "sinks": sinks}
        out.append(kernels.attention(q, k, v, mask, causal=causal and q.shape[1] > 1, **options))
    return out[0][None] if len(out) == 1 else torch.stack(out), None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]) -> bool:
    """Return whether the kernels compute this. Nothing here may depend on how many rows a draft adds to a pass."""
    if not all(_fits_kernels(tensor) for tensor in (query, key, value)) or kwargs.get("position_bias") is not None:
        return False
    (batch, heads, rows, size), (_, key_heads, cached, value_size) = query.shape, value.shape
    if (
        not batch
        or heads % key_heads
        or max(size, value_size) > LARGEST_HEAD
        or not cached
        or rows == cached > LONG_PROMPT
    ):
        return False
    if len({query.dtype, key.dtype, value.dtype}) > 1 or key.shape != (batch, key_heads, cached, size):
        return False
    if mask is None:
        return rows in (1, cached) or not causal  # torch means another thing by causal rows of a longer text
    known = mask.dtype == torch.bool or mask.dtype in NUMBER_TYPES
    return known and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, rows, cached)


def _fits_kernels(x: Tensor) -> bool:
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in NUMBER_TYPES:
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def _mask_of(mask: Tensor, sequence: int) -> Tensor:
    own = mask[sequence if mask.shape[0] > 1 else 0, 0]
    return own if own.stride(-1) == 1 else own.contiguous()


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    rows, cached = query.shape[2], key.shape[2]
    return torch.ones(rows, cached, dtype=torch.bool, device=query.device).tril(cached - rows)


def _in_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention with a softcap or sinks, which torch's own function has not; arguments as `attention`."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
