"""`DraftNetwork`: the neural network of a draft. Target features and next tokens in, predicted features and logits out.

One step over a sequence, where f_t is the target's feature at position t and x_t its token:

    position        0        1        2      ...
    features       f_0      f_1      f_2
    input_ids      x_1      x_2      x_3              the NEXT token at every position
    out.features   ~f_1     ~f_2     ~f_3             predictions of the target's next features
    out.logits     ~x_2     ~x_3     ~x_4             through the target's own head

The embedding table and the head belong to the target and are borrowed; a checkpoint holds neither (an EAGLE-3 one
brings its own). This module knows nothing of trees, budgets, checkpoints or generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..runner import Pass
from .blocks import FUSIONS, Block, Eagle3Block, Eagle3Fusion, GatedFusion, RMSNorm, RotaryEmbedding
from .config import DovetailConfig
from .kv_rows import AttentionRows

ROPE_OF_LENGTH = ("dynamic", "longrope")
"""Rotary types whose tables depend on the length of the text, so that they cannot be cached."""

ROPE_AHEAD = 256
"""Number of positions of a cached rotary table."""


@dataclass
class DraftOutput(ModelOutput):
    """Result of one draft step over a sequence.

    Attributes:
        features: (B, T, H) predictions of the target's features at the next position.
        logits: (B, T, V) of the target's head on those features.
    """

    features: Tensor | None = None
    logits: Tensor | None = None


class DraftNetwork(PreTrainedModel):
    """Fusion, decoder blocks and head of a draft.

    Attributes:
        fusion: mixes features and embeddings, by `config.fusion`.
        layers: decoder blocks.
        embed_weight: (V, H) embedding table; None until a target is attached.
        head_weight: (V, H) head, or (v, H) for the tokens in `token_ids`; None until a target is attached.
        head_bias: (V,) or (v,) bias of the head, or None.
        token_ids: (v,) int64 tokens that a reduced head proposes, ascending; None means all tokens.
        embedding_device: device on which `embed_weight` stays, or None for that of the draft.
    """

    embedding_device: str | None = None

    embed_weight: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    token_ids: Tensor | None

    config_class = DovetailConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    # Reference checkpoints hold copies of the target's embedding and head; the target's own are used.
    _keys_to_ignore_on_load_unexpected = [r"^embed_tokens\.weight$", r"^lm_head\.weight$"]

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__(config)
        self.fusion = FUSIONS[config.fusion](config)
        eagle3 = config.fusion == "eagle3"
        blocks = [Eagle3Block(config)] if eagle3 else [Block(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.rotary = RotaryEmbedding(config)
        # Borrowed from the target: non-persistent, so that they follow `.to()` and never enter a checkpoint.
        for name in ("embed_weight", "head_weight", "head_bias", "token_ids"):  # token_ids: if the head is reduced
            self.register_buffer(name, None, persistent=False)
        # With `norm_output` the block holds the norm, because the next step reads what it gives.
        norm_here = eagle3 and not config.norm_output
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if norm_here else None
        if eagle3:
            self._make_own_tables()
        self._rope: tuple[int, Tensor, Tensor] | None = None  # first position, cosines, sines; see `rope_for`
        self.post_init()

    def _make_own_tables(self) -> None:
        """Make head, token ids and embedding table of an EAGLE-3 checkpoint, under the names of borrowed ones."""
        config = self.config
        size = config.draft_vocab_size or config.vocab_size
        del self.head_weight
        self.register_parameter("head_weight", nn.Parameter(torch.empty(size, config.hidden_size)))
        if config.draft_vocab_size is not None:
            del self.token_ids
            self.register_buffer("token_ids", torch.arange(size))
        if config.own_embedding:
            del self.embed_weight
            table = torch.empty(config.vocab_size, config.hidden_size)
            self.register_parameter("embed_weight", nn.Parameter(table))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        weights: list[Tensor] = []
        if isinstance(module, GatedFusion):
            weights = [module.W_1, module.W_2, module.W_z]
        if module is self:
            weights = [w for w in (self.embed_weight, self.head_weight) if isinstance(w, nn.Parameter)]
        for weight in weights:
            nn.init.normal_(weight, std=self.config.initializer_range)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return rows of the target's embedding table: (...) int64 -> (..., H).

        Raises:
            ValueError: no target is attached.
        """
        if self.embed_weight is None:
            raise ValueError(
                "this draft has no embedding table yet: it borrows the target's. Pass the draft to "
                "target.generate(assistant_model=draft), or call draft.attach(target) first."
            )
        if self.embedding_device is None:
            return F.embedding(tokens, self.embed_weight)
        rows = F.embedding(tokens.to(self.embed_weight.device), self.embed_weight)
        return rows.to(device=tokens.device, dtype=next(self.parameters()).dtype)

    def head(self, features: Tensor) -> Tensor:
        """Return the target's logits of predicted features: (..., H) -> (..., V), or (..., v).

        Raises:
            ValueError: no target is attached.
        """
        if self.head_weight is None:
            raise ValueError("this draft has no head yet: it borrows the target's. Call draft.attach(target) first.")
        if self.norm is not None:
            features = self.norm(features)
        logits = self.times_head(features)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def times_head(self, features: Tensor) -> Tensor:
        """Return the product of features (..., H) and the head: (..., V), or (..., v)."""
        assert self.head_weight is not None, "`head` has checked it"
        return F.linear(features, self.head_weight, self.head_bias)

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Return logits (..., V) of the whole vocabulary, with -inf for tokens that the head does not propose."""
        if self.token_ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return whole.index_copy(-1, self.token_ids, logits)

    # --- forward -------------------------------------------------------------------------------

    def rope_for(self, step: Pass, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rotary cosines and sines of a pass: (1, n, head_dim), or (1, 1, head_dim) of a tree level.

        For short passes they are views of a cached table over the next positions, because computing them in each pass
        would be a noticeable part of the time of a tree level.
        """
        count, device = 1 if step.is_level else step.rows, step.tokens.device
        first, end = step.position, step.position + count
        if count > ROPE_AHEAD // 4 or self.rotary.rope_type in ROPE_OF_LENGTH:
            return self.rope_at(torch.arange(first, end, device=device)[None], dtype)
        kept = self._rope
        if kept is None or kept[0] > first or kept[0] + ROPE_AHEAD < end or not _like(kept[1], device, dtype):
            with torch.inference_mode(False), torch.no_grad():
                ahead = torch.arange(first, first + ROPE_AHEAD, device=device)[None]
                kept = self._rope = (first, *self.rope_at(ahead, dtype))
        start, cos, sin = kept
        return cos[:, first - start : end - start], sin[:, first - start : end - start]

    def rope_at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rotary cosines and sines, (B, n, head_dim) each in `dtype`, of positions (B, n) int64."""
        return self.rotary(torch.empty(0, dtype=dtype, device=positions.device), positions)

    def project(self, features: Tensor) -> Tensor:
        """Turn features (..., F) of the target into those that `step` reads, (..., H)."""
        return self.fusion.project(features) if isinstance(self.fusion, Eagle3Fusion) else features

    def step(
        self,
        features: Tensor,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Sequence[AttentionRows] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the next features of n pairs (feature, next token).

        Args:
            features: (B, n, H) of the target (see `project`), or predictions fed back.
            tokens: (B, n) int64, the token after each feature.
            rope: from `rope_at`, for the position of each feature on the shifted sequence, from 0.
            rows: key/value storage of each block, which is appended to; None runs without a cache.
            mask: (n, m) additive over the m rows after appending; None means causal over n = m.

        Returns:
            (B, n, H) predictions of the features at the next positions.
        """
        x = self.fusion(features, self.embed(tokens))
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, None if rows is None else rows[index], mask)
        return x

    def forward(
        self, features: Tensor | None = None, input_ids: Tensor | None = None, position_ids: Tensor | None = None, **_
    ) -> DraftOutput:
        """Run one draft step over whole sequences, as training does (picture in the module docstring).

        Args:
            features: (B, T, F) target features f_0 .. f_{T-1}.
            input_ids: (B, T) int64 next tokens x_1 .. x_T.
            position_ids: (B, T) int64; default 0 .. T-1.

        Raises:
            ValueError: features are missing or shapes do not fit.
        """
        if features is None or input_ids is None:
            raise ValueError(
                "a DovetailDraft needs `features` of its target in addition to `input_ids`; it cannot generate alone. "
                "Use target.generate(..., assistant_model=draft)."
            )
        if features.shape[:2] != input_ids.shape or features.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"features must be (B, T, {self.config.feature_size}) with input_ids (B, T), got "
                f"{tuple(features.shape)} and {tuple(input_ids.shape)}."
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        rope = self.rope_at(position_ids, features.dtype)
        predicted = self.step(self.project(features), input_ids, rope)
        return DraftOutput(features=predicted, logits=self.head(predicted))


def _like(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    return (tensor.device, tensor.dtype) == (device, dtype)
