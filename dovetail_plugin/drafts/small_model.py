"""Drafting with a small language model that has the target's tokenizer: trees from its logits, with its own cache.

```python
draft = SmallModelDraft.from_pretrained("Qwen/Qwen3-0.6B", device_map="auto")
out = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
```

A small model reads tokens where a `DovetailDraft` reads pairs of feature and token. Everything else is the same, so
trees grow through the same `FeatureDrafter`. Token t of the text has position t here, and the first token is run too.
"""

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..cache import TextRows
from ..compat import DynamicCache, attention_of, cache_argument, layers_for
from ..report import PhaseClock
from ..runner import Pass, Predicted
from ..targets.base import Engine, TargetModel
from ..targets.engine import engine_of
from ..targets.support import TREE_ATTENTION
from .base import Draft, Drafter, DraftError
from .checkpoints.load import hub_arguments
from .feature_drafter import FeatureDrafter


class SmallModelRows:
    """Key/value rows of one text under a cache that the model takes; implements `RowStorage`.

    Args:
        model: the small model.

    Attributes:
        text: the rows, with a cache over them for the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.text = TextRows(DynamicCache(), layers_for(model.config.get_text_config(decoder=True)))

    @property
    def length(self) -> int:
        """Rows in use."""
        return self.text.length

    @length.setter
    def length(self, length: int) -> None:
        self.text.lengths = [length] * len(self.text.lengths)


class SmallModelRunner:
    """Runs a causal language model as a `DraftRunner`. It ignores features and predicts none.

    Args:
        model: decoder-only model.
        vocab_size: tokens that model and target share (V).
    """

    runs_in_torch = True
    weights: str | None = None

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        config = model.config.get_text_config(decoder=True)
        self._positions = getattr(config, "max_position_embeddings", None)
        self._cache_name = cache_argument(model)

    def new_rows(self, capacity: int) -> SmallModelRows:  # noqa: ARG002 - rows are reserved as the text grows
        """Make rows for each layer."""
        return SmallModelRows(self._model)

    def run(self, step: Pass, rows: SmallModelRows) -> Predicted:
        """Run the model over the pass.

        Raises:
            DraftError: the text has outgrown the model's positions.
        """
        count, mask = step.rows, step.mask
        if self._positions is not None and rows.length + count > self._positions:
            raise DraftError(f"the text has outgrown the {self._positions} positions of the small model")
        if mask is not None:
            mask = mask.clamp(min=torch.finfo(self.dtype).min)[None, None]
        rows.text.begin_pass()
        output = self._model(
            input_ids=step.tokens[None],
            attention_mask=mask,
            position_ids=step.positions()[None],
            use_cache=True,
            logits_to_keep=count - step.logits_from,
            **{self._cache_name: rows.text.cache},
        )
        rows.text.keep(range(count), count)
        logits = output.logits[0, -(count - step.logits_from) :]
        return Predicted(step.features.new_empty(count, 0), logits[:, : self._vocab_size])


class SmallModelDrafter(FeatureDrafter):
    """`FeatureDrafter` that reads tokens alone. The first token is run as well, although no feature belongs to it."""

    def begin(self, features: Tensor, input_ids: Tensor) -> None:
        """Start a text with all its tokens, or continue with a turn. See `Drafter.begin`."""
        first = not self.committed and not self._pending
        self.advance(features, input_ids if first else input_ids[1:])

    def advance(self, features: Tensor, tokens: Tensor) -> None:
        """Remember the tokens that the text gained. See `Drafter.advance`."""
        super().advance(features.new_empty(len(tokens), 0), tokens)


class SmallModelDraft(Draft):
    """A small causal language model as draft, made from a loaded model or by `from_pretrained`.

    Args:
        model: decoder-only, full attention, on any device.
        vocabulary: token -> id of its tokenizer, to compare with the target's; None compares sizes only.

    Raises:
        ValueError: the model cannot draft trees because of its attention or cache.
    """

    token_ids: Tensor | None = None  # the whole vocabulary, in order

    def __init__(self, model: PreTrainedModel, vocabulary: dict[str, int] | None = None) -> None:
        engine_of(model).check()
        name, config = type(model).__name__, model.config.get_text_config(decoder=True)
        if any(getattr(layer, "is_sliding", False) for layer in layers_for(config)):
            raise ValueError(f"{name} has sliding-window layers. Small models that draft need full attention.")
        attention = attention_of(config)
        if attention not in TREE_ATTENTION:
            raise ValueError(
                f"{name} was loaded with attn_implementation={attention!r}. Drafting trees needs "
                f"one of {', '.join(TREE_ATTENTION)}."
            )
        self.model, self.vocabulary, self.config = model.eval(), vocabulary, model.config
        self._checked: weakref.ref[TargetModel] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "SmallModelDraft":
        """Load a model and its tokenizer, both from the same source.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            kwargs: arguments of `AutoModelForCausalLM.from_pretrained`. Those that select where files come from
                (`revision`, `token`, `cache_dir`, `subfolder`, ...) and `trust_remote_code` hold for the tokenizer too.

        Raises:
            OSError: there is no such model.
            ValueError: the model cannot draft trees.
        """
        kwargs.setdefault("dtype", "auto")
        source = hub_arguments(kwargs)
        if "trust_remote_code" in kwargs:
            source["trust_remote_code"] = kwargs["trust_remote_code"]
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(model, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **source).get_vocab())

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def num_parameters(self) -> int:
        """Return the number of weights of the model."""
        return self.model.num_parameters()

    def check_target(self, target: TargetModel) -> None:
        """Refuse a target with another tokenizer. The padding of the two vocabularies may differ.

        Raises:
            ValueError: the tokenizers differ.
        """
        if self._checked is not None and self._checked() is target:
            return
        own, seen = self.config.get_text_config(decoder=True).vocab_size, _vocab_size(target.config)
        vocabulary = _vocabulary_of(target)
        if self.vocabulary is not None and vocabulary is not None:
            differing = [token for token, index in vocabulary.items() if self.vocabulary.get(token) != index]
            if differing or len(vocabulary) != len(self.vocabulary):
                shown = ", ".join(repr(token) for token in differing[:3]) or "the number of tokens"
                raise ValueError(
                    f"the small model's tokenizer is not the target's: {shown} differ. A draft must share it. Use a "
                    "small model of the target's own family, or PromptLookupDraft()."
                )
        elif abs(own - seen) > 0.02 * seen:
            raise ValueError(
                f"the small model has {own} tokens and the target {seen}, so they have different tokenizers. Use a "
                "small model of the target's own family, or PromptLookupDraft()."
            )
        self._checked = weakref.ref(target)

    def identity(self) -> list[Any]:
        """Return config, device and dtype of the model."""
        return [
            "small model",
            self.config.to_json_string(use_diff=False),
            str(self.model.device),
            str(self.model.dtype),
        ]

    def new_drafter(self, engine: Engine, *, capacity: int, clock: PhaseClock) -> SmallModelDrafter:
        """Make a drafter that proposes tokens of both vocabularies."""
        own = self.config.get_text_config(decoder=True).vocab_size
        runner = SmallModelRunner(self.model, min(own, _vocab_size(engine.config)))
        return SmallModelDrafter(self, runner, capacity=capacity, clock=clock)

    def can_resume(self, drafter: Drafter, engine: Engine) -> bool:
        """Return whether the model is still on the device and in the dtype of the drafter's rows."""
        assert isinstance(drafter, FeatureDrafter), "new_drafter made it"
        return drafter.fits(SmallModelRunner(self.model, _vocab_size(engine.config)))

    # --- `DraftModel` protocol --------------------------------------------------------------------

    def project(self, features: Tensor) -> Tensor:
        """Return the features as they are; there are none."""
        return features

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Return the logits as they are."""
        return logits


def _vocab_size(config: PretrainedConfig) -> int:
    return config.get_text_config(decoder=True).vocab_size


def _vocabulary_of(target: TargetModel) -> dict[str, int] | None:
    """Return the vocabulary of the target's tokenizer, or None if it cannot be read."""
    name = target.config.name_or_path
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        warnings.warn(f"the target's tokenizer cannot be compared with the small model's ({error}).", stacklevel=2)
        return None
