"""One call of `generate`: its arguments, the passes of its prompt and of further tokens, its options and its result."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.masking_utils import create_masks_for_generate

from .names import CACHE, CACHE_NAMES

# --- arguments ---------------------------------------------------------------------------------------------

MODE_ARGUMENTS = ("self", "generation_mode", "generation_config", "generation_mode_kwargs")
LOOP_ARGUMENTS = ("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config")
CANDIDATE_ARGUMENTS = ("self", "generation_config", "input_ids", "inputs_tensor", "logits_processor", "model_kwargs")
PIPELINE_ARGUMENTS = ("model", "assistant_model", "assistant_tokenizer")
"""Parameters of the functions that `hf.py` wraps, in their order."""


def bound_arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], order: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a call by name, as `function`'s signature binds them; extra keywords are merged in.

    Args:
        function: that is called, perhaps a wrapper that hides the names of its parameters.
        args: by position.
        kwargs: by name.
        order: names of those arguments by position that the signature does not name.

    Raises:
        TypeError: the call does not fit the signature.
    """
    signature = inspect.signature(function)
    arguments = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = arguments.pop(name, ())
            arguments |= dict(zip(order[len(args) - len(rest) :], rest, strict=False))
    return arguments


def not_sampling(mode: Any) -> tuple[str, str] | None:
    """Return (kind, reason) why a mode of `generate` runs another loop than greedy search and sampling, or None."""
    name = getattr(mode, "value", str(mode))
    if name in ("greedy_search", "sample"):
        return None
    if name == "assisted_generation":
        return name, "the call asks for another way of drafting (prompt_lookup_num_tokens, for example)."
    return name, f"drafting works with greedy search and sampling, and the call asks for {name.replace('_', ' ')}."


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from arguments of `generate` or forward, under whatever name, and return it or None."""
    found = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
    return next((cache for cache in found if cache is not None), None)


def cache_argument(model: nn.Module) -> str:
    """Return the name of the cache among the arguments of a model's forward method."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, *CACHE_NAMES) if name in parameters), CACHE)


# --- passes ------------------------------------------------------------------------------------------------


def run_prompt(
    model: PreTrainedModel,
    input_ids: Tensor,
    kwargs: dict[str, Any],
    *,
    cached: int,
    chunk: int | None,
) -> Any:
    """Run the prompt's passes as plain `generate` does, and return the output of the last one.

    Args:
        model: the target.
        input_ids: (1, T) int64, the whole prompt, or what is new of it.
        kwargs: of the forward pass, as `generate` prepared them, with the cache. Changed in place.
        cached: tokens at the start of `input_ids` whose rows the cache holds.
        chunk: rows of a pass, or None.
    """
    config = GenerationConfig(prefill_chunk_size=chunk)
    config._mask_length = input_ids.shape[1] if cached else -1  # tells the whole text from what is new of it
    if cached and kwargs.get("attention_mask") is None:  # before 5.23 only the mask tells
        kwargs["attention_mask"] = torch.ones_like(input_ids)
    return model._prefill(input_ids, config, kwargs)


def position_ids_for(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the position ids that `generate` makes for a prompt (1, T) whose caller gives none: (..., 1, T) int64."""
    return model._prepare_position_ids_for_generation(input_ids, kwargs)


def with_next_tokens(model: PreTrainedModel, output: Any, kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """Return arguments of the forward pass for a text that is `count` tokens longer, as plain `generate` updates them.

    Args:
        model: the target.
        output: of the latest pass.
        kwargs: of the text so far; not changed.
        count: number of further tokens, 0 or more.
    """
    kwargs = dict(kwargs)
    update = model._update_model_kwargs_for_generation
    own = getattr(update, "__func__", None) is not GenerationMixin._update_model_kwargs_for_generation
    if own or kwargs.get("token_type_ids") is not None:  # these repeat the last value only one by one
        for _ in range(count):
            kwargs = update(output, kwargs, is_encoder_decoder=False)
    elif count:
        kwargs = update(output, kwargs, num_new_tokens=count)
    return kwargs


def masks_of_pass(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, rows: int) -> dict[str, Tensor | None]:
    """Return the 4-D masks that a model makes for a pass, by type of layer; None where a row sees all rows before it.

    Args:
        model: the target.
        inputs: of the pass, from the model's `prepare_inputs_for_generation`.
        cache: of the pass.
        rows: rows of the pass.
    """
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    names = ("position_ids", "token_type_ids", "mm_token_type_ids", "block_sequence_ids")
    masks = make(
        config=model.config,
        inputs_embeds=torch.empty(1, rows, 0, dtype=model.dtype, device=model.device),
        attention_mask=inputs.get("attention_mask"),
        **{CACHE: cache},
        **{name: inputs[name] for name in names if inputs.get(name) is not None},
    )
    return masks if isinstance(masks, dict) else {"all": masks}


# --- options -----------------------------------------------------------------------------------------------


OF_OTHER_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")
"""Options of `generate` that ask for another way of drafting."""

OF_ASSISTANTS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "max_matching_ngram_size",
)
"""Options of `generate` for transformers' own assisted loop."""


def options_set(config: GenerationConfig, names: Sequence[str]) -> list[str]:
    """Return those options of a prepared config whose value is not the default."""
    defaults = config._get_default_generation_params()
    return [n for n in names if getattr(config, n, None) not in (None, False, defaults.get(n))]


def mask_length(config: GenerationConfig, default: int) -> int:
    """Return the length of the attention mask that `generate` dropped because it was all ones; `default` if unknown."""
    return getattr(config, "_mask_length", default)


def processor_of_sequence(processor: Any, index: int) -> Any:
    """Let a copy of a logits processor of a batch serve one of its sequences alone, and return it.

    Args:
        processor: a copy; changed in place.
        index: of the sequence in the batch.
    """
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor._prefix_allowed_tokens_fn = lambda _batch, ids: allowed(index, ids)
    elif isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        processor.encoder_input_ids = processor.encoder_input_ids[index : index + 1]
    elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        processor.generated_ngrams, processor.batch_size = [processor.generated_ngrams[index]], 1
    elif isinstance(ignored := getattr(processor, "prompt_ignore_length", None), Tensor):  # padding, since 5.24
        processor.prompt_ignore_length = ignored[index : index + 1]
    return processor


def ends_one_by_one(criteria: StoppingCriteriaList) -> bool:
    """Return whether a sequence of a batch is padded once it has stopped, as `generate` does if there is an end token.

    Without one, a sequence that has stopped goes on until all have. Then only a common length ends them alike.
    """
    return any(isinstance(c, EosTokenCriteria) for c in criteria) or all(
        isinstance(c, MaxLengthCriteria) for c in criteria
    )


def hands_features_to_generators() -> bool:
    """Return whether the assisted loop gives the target's outputs to candidate generators (transformers 5.8)."""
    return hasattr(CandidateGenerator, "requires_model_outputs")


# --- result ------------------------------------------------------------------------------------------------


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """Result of `generate` with `return_dict_in_generate=True`, and the report of the call.

    Attributes:
        report: a `GenerationReport`.
    """

    report: Any = None


def output_of_generate(
    sequences: Tensor, scores: tuple[Tensor, ...] | None, logits: tuple[Tensor, ...] | None, cache: Any, report: Any
) -> DraftedOutput:
    """Return what `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: (B, T) int64.
        scores: processed scores (B, V) of each new token, or None.
        logits: raw logits (B, V) of each new token, or None.
        cache: keys and values of the text.
        report: of the call.
    """
    return DraftedOutput(sequences=sequences, scores=scores, logits=logits, report=report, **{CACHE: cache})
