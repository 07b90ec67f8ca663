"""`DovetailDraft`: the draft model. Target features and next tokens in, predicted features and logits out.

One step over a sequence, where f_t is the target's feature at position t and x_t its token:

    position        0        1        2      ...
    features       f_0      f_1      f_2
    input_ids      x_1      x_2      x_3              the NEXT token at every position
    out.features   ~f_1     ~f_2     ~f_3             predictions of the target's next features
    out.logits     ~x_2     ~x_3     ~x_4             through the target's own head

The embedding table and the head are the target's and are borrowed with `attach`; a checkpoint holds
neither. This module knows nothing of trees, budgets or generation; `drafting.py` does that.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..cache import KVRows
from ..targets.base import Tables
from ..targets.engine import engine_of
from .base import Assistant
from .blocks import FUSIONS, Block, Eagle3Block, Eagle3Fusion, GatedFusion, RMSNorm, RotaryEmbedding
from .checkpoints.load import HUB_KWARGS, check_loaded, dtype_for, foreign_arguments, frequent_tokens
from .checkpoints.read import load_checkpoint, read_config
from .compatibility import check_fits, note_positions, warn_of_other_target
from .config import DovetailConfig


@dataclass
class DraftOutput(ModelOutput):
    """Of one draft step over a sequence.

    features: (B, T, H) predictions of the target's features at the next position.
    logits: (B, T, V) of the target's head on those features.
    """

    features: Tensor | None = None
    logits: Tensor | None = None


class DovetailDraft(PreTrainedModel, Assistant):
    """A draft model for one target: pass it as `assistant_model` to the target's `generate`.

    ```python
    target = AutoModelForCausalLM.from_pretrained("path-or-hub-id", dtype="auto")
    draft = DovetailDraft.from_pretrained("path-or-hub-id", device_map="auto")
    out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
    print(draft.report)
    ```

    Attributes beside those of `Assistant`:
        runner: `"auto"` (the fastest way of the device: CUDA graphs on a GPU, the target's engine on a CPU where that
            has one) or `"torch"`.
        embedding_device: where the target's embedding table stays, if not beside the draft; `"cpu"` saves its bytes
            on a small GPU and costs a short wait a level.
        draft_vocab_size: the draft proposes only this many tokens, the most frequent ones of its training, which
            saves bytes and time of the head; None proposes all.

    The last two count when the draft meets its target.
    """

    runner: Literal["auto", "torch"] = "auto"
    embedding_device: str | None = None
    draft_vocab_size: int | None = None

    embed_weight: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    token_ids: Tensor | None

    config_class = DovetailConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    # The embedding and head of reference checkpoints are the target's own and are taken from there.
    _keys_to_ignore_on_load_unexpected = [r"^embed_tokens\.weight$", r"^lm_head\.weight$"]

    def __init__(self, config: DovetailConfig) -> None:
        super().__init__(config)
        self.fusion = FUSIONS[config.fusion](config)
        eagle3 = config.fusion == "eagle3"
        blocks = [Eagle3Block(config)] if eagle3 else [Block(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.rotary = RotaryEmbedding(config)
        # The target's: non-persistent, so they follow `.to()` and never enter a checkpoint.
        for name in ("embed_weight", "head_weight", "head_bias", "token_ids"):  # the last: where the head is cut
            self.register_buffer(name, None, persistent=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if eagle3 else None
        if eagle3:
            self._make_own_tables()
        self._attached_to: weakref.ref[PreTrainedModel] | None = None
        self.post_init()

    def _make_own_tables(self) -> None:
        """Head, token ids and embedding table of an EAGLE-3 checkpoint's own, under the borrowed ones' names."""
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

    # --- the target's tables -------------------------------------------------------------------

    @classmethod
    def for_target(
        cls, target: PreTrainedModel, *, blocks: int = 1, fusion: Literal["dgf", "concat"] = "dgf", **overrides: Any
    ) -> "DovetailDraft":
        """An untrained draft that fits `target`, attached to it, on its device and in its dtype.

        Args:
            target: a decoder-only model with a head.
            blocks: decoder blocks of the draft.
            fusion: see `DovetailConfig`.
            overrides: single fields of `DovetailConfig`, e.g. `intermediate_size=1024`.
        """
        config = DovetailConfig.for_target(target.config, blocks=blocks, fusion=fusion, **overrides)
        draft = cls(config).to(device=target.device, dtype=target.dtype)
        draft.attach(target)
        return draft

    @property
    def is_attached(self) -> bool:
        """Whether the target's embedding table and head are here."""
        return self.embed_weight is not None

    def attach(self, target: PreTrainedModel) -> None:
        """Take embedding table and head from `target`, in this draft's dtype and on its device.

        Where device and dtype are the target's the tensors are shared, not copied. Warns if the draft was
        trained for another target.

        Raises:
            ValueError: the target's vocabulary or hidden size is not this draft's, or it has no usable tables;
                `draft_vocab_size` is no part of the vocabulary.
        """
        check_fits(self.config, target.config)
        note_positions(self.config, target.config)
        if isinstance(target, PreTrainedModel):  # an exported one is named by its directory, whatever it was before
            warn_of_other_target(self.config, target.config)
        tables = engine_of(target).tables()
        if not self.config.own_embedding:
            self._borrow_embedding(tables)
        if self.config.fusion != "eagle3":
            self._borrow_head(tables)
        self._attached_to = weakref.ref(target)

    def _borrow_embedding(self, tables: Tables) -> None:
        if tables.embedding.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"the target embeds tokens in {tables.embedding.shape[1]} dimensions and the draft reads "
                f"{self.config.hidden_size}; such targets are not supported."
            )
        weight = next(self.layers.parameters())
        if self.embedding_device is None:
            self.embed_weight = tables.embedding.to(device=weight.device, dtype=weight.dtype)
        else:  # in the target's dtype, so that on its device it is the target's own
            self.embed_weight = tables.embedding.to(self.embedding_device)

    def _borrow_head(self, tables: Tables) -> None:
        weight = next(self.layers.parameters())
        head, bias, self.token_ids = tables.head, tables.bias, None
        if self.draft_vocab_size is not None:
            ids = frequent_tokens(self.name_or_path, self.draft_vocab_size, self.config.vocab_size).to(head.device)
            head, bias = head[ids], None if bias is None else bias[ids]
            self.token_ids = ids.to(weight.device)
        tied = head is tables.embedding and self.embedding_device is None
        self.head_weight = self.embed_weight if tied else head.to(device=weight.device, dtype=weight.dtype)
        self.head_bias = None if bias is None else bias.to(device=weight.device, dtype=weight.dtype)

    def check_target(self, target: PreTrainedModel) -> None:
        """As `Assistant.check_target`."""
        check_fits(self.config, target.config)

    def identity(self) -> list[Any]:
        """As `Assistant.identity`; the device may be another one in the next generation."""
        weight = next(self.parameters())
        return ["dovetail", self.config.to_json_string(use_diff=False), str(weight.device), str(weight.dtype)]

    def attach_once(self, target: PreTrainedModel) -> None:
        """`attach`, unless `target` is the one this draft is attached to already."""
        if self._attached_to is None or self._attached_to() is not target:
            self.attach(target)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the target's embedding table: (...) int64 -> (..., H).

        Raises:
            ValueError: no target is attached; random tables would draft noise.
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
        """The target's logits of predicted features: (..., H) -> (..., V), or those of `token_ids` where it is cut.

        Raises:
            ValueError: no target is attached.
        """
        if self.head_weight is None:
            raise ValueError("this draft has no head yet: it borrows the target's. Call draft.attach(target) first.")
        if self.norm is not None:
            features = self.norm(features)
        logits = F.linear(features, self.head_weight, self.head_bias)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits (..., V) of the whole vocabulary: tokens that a cut head does not propose get -inf."""
        if self.token_ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return whole.index_copy(-1, self.token_ids, logits)

    # --- forward -------------------------------------------------------------------------------

    def rope_at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines, (B, n, head_dim) each in `dtype`, of positions (B, n) int64."""
        return self.rotary(torch.empty(0, dtype=dtype, device=positions.device), positions)

    def project(self, features: Tensor) -> Tensor:
        """Features (..., F) of the target -> what `step` reads of them, (..., H)."""
        return self.fusion.project(features) if isinstance(self.fusion, Eagle3Fusion) else features

    def step(
        self,
        features: Tensor,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: list[KVRows] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the next features of n pairs (feature, next token).

        Args:
            features: (B, n, H) of the target (see `project`), or predictions fed back.
            tokens: (B, n) int64, the token after each feature.
            rope: of `rope_at`, for the position of each feature on the shifted sequence, from 0.
            rows: key/value storage of each block, appended to; None runs without a cache.
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
        """One draft step over whole sequences, as training uses it (picture in the module docstring).

        Args:
            features: (B, T, F) target features f_0 .. f_{T-1}.
            input_ids: (B, T) int64 next tokens x_1 .. x_T.
            position_ids: (B, T) int64; default 0 .. T-1.

        Raises:
            ValueError: features are missing or shapes do not fit.
        """
        if features is None or input_ids is None:
            raise ValueError(
                "a DovetailDraft needs `features` of its target beside `input_ids`; it cannot generate alone. "
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

    # --- checkpoints ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a draft of this project or the Dovetail paper's, an EAGLE-1, 2 or 3 head, or speculators' eagle3.

        Every tensor of the architecture must be there in its shape. Accepts what transformers' `from_pretrained`
        accepts (`dtype`, `device_map`, `revision`, ...).

        Raises:
            ValueError: the format is unknown, tensors are missing, extra or misshapen (all are named), or a file
                cannot be read.
            OSError: no such directory or hub repository.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("dtype", "auto")
        name, source = pretrained_model_name_or_path, [pretrained_model_name_or_path]
        if name is not None and "config" not in kwargs and "state_dict" not in kwargs:
            hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if kwargs.get(key) is not None}
            stored = read_config(str(name), **hub_kwargs)
            if stored.get("model_type") != cls.config_class.model_type:
                source = [None]
                kwargs |= foreign_arguments(load_checkpoint(str(name), stored, **hub_kwargs))
        try:
            draft, info = super().from_pretrained(
                *source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{name}: a weight file is truncated or not safetensors ({error}); "
                "copy or download the checkpoint again."
            ) from error
        check_loaded(name, info)
        if source == [None] and name is not None:
            draft.name_or_path = draft.config.name_or_path = str(name)
        if kwargs["dtype"] == "auto":
            draft.to(dtype_for(draft.dtype, draft.device))
        return (draft, info) if wants_info else draft
