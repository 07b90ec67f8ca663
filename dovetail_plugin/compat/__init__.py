"""The one place that names what transformers does not promise to keep: private or recently changed names.

Everything else in the package goes through `compat`, so a new release of transformers that changes one of them fails
in `missing_names` (and its test) first. This folder uses nothing of the rest of the package:

- `names`: the names that are used, and whether the installed version has them;
- `gguf`: what transformers knows about GGUF files;
- `generate`: arguments, passes, options and the result of one call;
- `models`: configs, layers of caches, and files of repositories.

The versions are here, because an old one is refused before a name that it lacks is looked for. Tested versions are
`OLDEST` to `NEWEST`.
"""

# ruff: noqa: E402 - the refusal comes before the imports that need a newer version

import logging

import torch
import transformers

logger = logging.getLogger(__name__)

OLDEST, NEWEST = (5, 5), (5, 24)
"""First and last minor version that the tests run with."""

OLDEST_TORCH = (2, 10)
"""First torch whose restricted unpickling is safe with hostile files (CVE-2026-24747)."""


def version_of(text: str) -> tuple[int, int]:
    """Return major and minor number of a version such as "5.24.0.dev0"."""
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def refuse_old(package: str, installed: str, oldest: tuple[int, int]) -> None:
    """Refuse a package that is older than `oldest`.

    Raises:
        ImportError: names both versions.
    """
    if version_of(installed) < oldest:
        raise ImportError(
            f"Dovetail needs {package} {dotted(oldest)} or later, and {installed} is installed. "
            f"Upgrade it with `pip install -U {package}`."
        )


def dotted(version: tuple[int, int]) -> str:
    """Return a version as text, for example "5.24"."""
    return ".".join(map(str, version))


def is_tested(installed: str = transformers.__version__) -> bool:
    """Return whether a transformers version is one that the tests run with."""
    return OLDEST <= version_of(installed) <= NEWEST


def warn_untested() -> None:
    """Warn if the installed transformers is newer than the tested versions."""
    if not is_tested():
        logger.warning(
            "transformers %s is newer than the versions Dovetail is tested with (%s to %s). Drafts are checked against "
            "plain generation on a tiny model before the first one is used.",
            transformers.__version__,
            dotted(OLDEST),
            dotted(NEWEST),
        )


refuse_old("torch", torch.__version__, OLDEST_TORCH)
refuse_old("transformers", transformers.__version__, OLDEST)

from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache
from transformers.core_model_loading import ConversionOps
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.pipelines import base as pipelines

from .generate import (
    CANDIDATE_ARGUMENTS,
    LOOP_ARGUMENTS,
    MODE_ARGUMENTS,
    OF_ASSISTANTS,
    OF_OTHER_DRAFTS,
    PIPELINE_ARGUMENTS,
    DraftedOutput,
    bound_arguments,
    cache_argument,
    ends_one_by_one,
    hands_features_to_generators,
    mask_length,
    masks_of_pass,
    not_sampling,
    options_set,
    output_of_generate,
    position_ids_for,
    processor_of_sequence,
    run_prompt,
    take_cache,
    with_next_tokens,
)
from .gguf import (
    GGUF_FUNCTIONS,
    GgufNames,
    gguf_architectures,
    gguf_names,
    is_known_gguf,
    missing_gguf_functions,
)
from .models import (
    IndexedLayer,
    SharedLayer,
    activation_of,
    attention_of,
    can_set_attention,
    commit_of,
    find_file,
    has_torch_attention,
    keeps_recurrent_state,
    layers_for,
    layers_in,
    mark_initialized,
    modules_in_float32,
    parts_of,
    records_past,
    register_experts,
    require_file,
    stock_indexed_layer,
    stock_layer,
    stock_sliding_layer,
    tied_copies,
    tied_names,
    was_loaded,
)
from .names import CACHE, CACHE_NAMES, NAMES, missing_names

__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "CANDIDATE_ARGUMENTS",
    "GGUF_FUNCTIONS",
    "LOOP_ARGUMENTS",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODE_ARGUMENTS",
    "NAMES",
    "NEWEST",
    "OF_ASSISTANTS",
    "OF_OTHER_DRAFTS",
    "OLDEST",
    "OLDEST_TORCH",
    "PIPELINE_ARGUMENTS",
    "Cache",
    "CandidateGenerator",
    "ConversionOps",
    "DraftedOutput",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GgufNames",
    "IndexedLayer",
    "LlamaRotaryEmbedding",
    "SharedLayer",
    "StaticCache",
    "activation_of",
    "apply_rotary_pos_emb",
    "attention_of",
    "bound_arguments",
    "cache_argument",
    "can_set_attention",
    "commit_of",
    "dotted",
    "ends_one_by_one",
    "find_file",
    "gguf_architectures",
    "gguf_names",
    "hands_features_to_generators",
    "has_torch_attention",
    "is_known_gguf",
    "is_tested",
    "keeps_recurrent_state",
    "layers_for",
    "layers_in",
    "mark_initialized",
    "mask_length",
    "masks_of_pass",
    "missing_gguf_functions",
    "missing_names",
    "modules_in_float32",
    "not_sampling",
    "options_set",
    "output_of_generate",
    "parts_of",
    "pipelines",
    "position_ids_for",
    "processor_of_sequence",
    "records_past",
    "refuse_old",
    "register_experts",
    "require_file",
    "run_prompt",
    "stock_indexed_layer",
    "stock_layer",
    "stock_sliding_layer",
    "take_cache",
    "tied_copies",
    "tied_names",
    "version_of",
    "warn_untested",
    "was_loaded",
    "with_next_tokens",
]
