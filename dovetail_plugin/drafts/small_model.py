"""Drafting with a small language model of the target's tokenizer: trees from its logits, with a cache of its own.

```python
draft = SmallModelDraft.from_pretrained("Qwen/Qwen3-0.6B", device_map="auto")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

A small model reads tokens where a `DovetailDraft` reads pairs of feature and token; all else is the same, so trees grow
through the same `FeatureDrafter`. Token t of the text stands at position t here, the first one included.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from ..cache import KVRows, TreeLayer
from ..report import PhaseClock
from ..targets.engine import engine_of
from ..targets.transformers_model import TREE_ATTENTION
from .base import Assistant, DraftError
from .feature_drafter import FeatureDrafter


class SmallModelRunner:
    """Runs a causal language model as a `DraftRunner`: features are ignored, "rope" is the positions."""

    runs_in_torch = True
    weights: str | None = None

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self.device, self.dtype = model.device, model.dtype
        self._positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def new_rows(self, capacity: int) -> list[KVRows]:
        """As `DraftRunner.new_rows`: one for each layer, under a cache that the model takes."""
        layers = self._model.config.get_text_config(decoder=True).num_hidden_layers
        self._cache = DynamicCache()
        self._cache.layers = [TreeLayer(capacity) for _ in range(layers)]
        return [layer.rows for layer in self._cache.layers]

    def run(
        self,
        features: Tensor,
        tokens: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: list[KVRows],
        mask: Tensor | None,
        logits_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """As `DraftRunner.run`; predicted features are empty.

        Raises:
            DraftError: the text has outgrown the model's positions.
        """
        count, live = len(tokens), rows[0].length
        if self._positions is not None and live + count > self._positions:
            raise DraftError(f"the text has outgrown the {self._positions} positions of the small model")
        if mask is not None:
            mask = mask.clamp(min=torch.finfo(self.dtype).min)[None, None]
        output = self._model(
            input_ids=tokens[None],
            attention_mask=mask,
            position_ids=rope[0].expand(1, count),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=count - logits_from,
        )
        logits = output.logits[0, -(count - logits_from) :]
        return features.new_empty(count, 0), logits[:, : self._vocab_size]


class SmallModelDrafter(FeatureDrafter):
    """`FeatureDrafter` that reads tokens alone: no feature belongs to the first one, and it is run as well."""

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """As `Drafter.begin`."""
        first = not self.committed and not self._pending
        self.advance(features, input_ids if first else input_ids[1:])

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """As `Drafter.advance`."""
        super().advance(features.new_empty(len(tokens), 0), tokens)


class SmallModelDraft(Assistant):
    """A small causal language model as draft; made from a loaded model, or by `from_pretrained`.

    Args:
        model: decoder-only, full attention, any device.
        vocabulary: of its tokenizer, to compare with the target's; None compares sizes only.

    Raises:
        ValueError: the model cannot draft trees (its attention or cache does not allow it).
    """

    token_ids: Tensor | None = None  # the whole vocabulary, in order

    def __init__(self, model: PreTrainedModel, vocabulary: dict[str, int] | None = None) -> None:
        engine_of(model).check()
        name, config = type(model).__name__, model.config.get_text_config(decoder=True)
        if any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers):
            raise ValueError(f"{name} has sliding-window layers; small models that draft need full attention.")
        if config._attn_implementation not in TREE_ATTENTION:
            raise ValueError(
                f"{name} was loaded with attn_implementation={config._attn_implementation!r}; drafting trees needs "
                f"one of {', '.join(TREE_ATTENTION)}."
            )
        self.model, self.vocabulary, self.config = model.eval(), vocabulary, model.config
        self._vocab_size = config.vocab_size
        self._checked: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "SmallModelDraft":
        """Load model and tokenizer; arguments as `AutoModelForCausalLM.from_pretrained`.

        Raises:
            OSError: no such model. ValueError: see the class.
        """
        kwargs.setdefault("dtype", "auto")
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(model, AutoTokenizer.from_pretrained(pretrained_model_name_or_path).get_vocab())

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    def num_parameters(self) -> int:
        """Of the model."""
        return self.model.num_parameters()

    def check_target(self, target: Any) -> None:
        """As `Assistant.check_target`: the tokenizers must be the same, padding of the vocabularies may differ.

        Raises:
            ValueError: they are not.
        """
        own, seen = self.config.get_text_config(decoder=True).vocab_size, _vocab_size(target)
        vocabulary = None if self._checked is target else _vocabulary_of(target)
        if self.vocabulary is not None and vocabulary is not None:
            differing = [token for token, index in vocabulary.items() if self.vocabulary.get(token) != index]
            if differing or len(vocabulary) != len(self.vocabulary):
                shown = ", ".join(repr(token) for token in differing[:3]) or "the number of tokens"
                raise ValueError(
                    f"the small model's tokenizer is not the target's: {shown} differ. A draft must share it; take a "
                    "small model of the target's own family, or PromptLookupDraft()."
                )
        elif abs(own - seen) > 0.02 * seen:
            raise ValueError(
                f"the small model has {own} tokens, the target {seen}: they have different tokenizers. Take a small "
                "model of the target's own family, or PromptLookupDraft()."
            )
        self._checked, self._vocab_size = target, min(own, seen)

    def identity(self) -> list[Any]:
        """As `Assistant.identity`."""
        return [
            "small model",
            self.config.to_json_string(use_diff=False),
            str(self.model.device),
            str(self.model.dtype),
        ]

    def new_drafter(self, capacity: int, clock: PhaseClock) -> SmallModelDrafter:
        """For one text."""
        return SmallModelDrafter(self, capacity, clock, SmallModelRunner(self.model, self._vocab_size))

    # --- what `FeatureDrafter` asks of a draft ---------------------------------------------------

    def rope_at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The positions (1, n) themselves, twice; the model turns them into what it needs."""
        return positions, positions

    def project(self, features: Tensor) -> Tensor:
        """Features as they are: none."""
        return features

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits as they are."""
        return logits


def _vocab_size(target: Any) -> int:
    return target.config.get_text_config(decoder=True).vocab_size


def _vocabulary_of(target: Any) -> dict[str, int] | None:
    """Of the tokenizer beside the target; None if none can be read."""
    name = target.config.name_or_path
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        warnings.warn(f"the target's tokenizer cannot be compared with the small model's ({error}).", stacklevel=2)
        return None
