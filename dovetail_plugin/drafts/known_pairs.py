"""Which draft for which target: known pairs, what a target's config names, and loading whatever was named.

Enters: a target's config, or the name of a draft. Leaves: an `Draft`. The table holds published heads by hub id;
nothing of them ships with this package, and their licences are their authors'.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .base import Draft
from .checkpoints.read import UnknownFormat
from .compatibility import short_name
from .model import DovetailDraft
from .prompt_lookup import PromptLookupDraft
from .small_model import SmallModelDraft

LOOKUP = "lookup"
"""Names `PromptLookupDraft`, which is no checkpoint."""

CONFIG_FIELD = "dovetail_draft"
"""Of a target's config.json: the hub id or directory of its draft."""


@dataclass(frozen=True)
class Pair:
    """A target and a published draft for it, by hub id. licence: as its page states it, or where to look."""

    target: str
    draft: str
    format: str
    licence: str = "see its page"


KNOWN = (
    Pair("meta-llama/Llama-3.1-8B-Instruct", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "EAGLE-3"),
    Pair("meta-llama/Llama-3.3-70B-Instruct", "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B", "EAGLE-3"),
    Pair("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B", "EAGLE-3"),
    Pair("lmsys/vicuna-13b-v1.3", "yuhuili/EAGLE3-Vicuna1.3-13B", "EAGLE-3", "apache-2.0"),
    Pair("meta-llama/Meta-Llama-3-8B-Instruct", "yuhuili/EAGLE-LLaMA3-Instruct-8B", "EAGLE-1/2"),
    Pair("meta-llama/Meta-Llama-3-70B-Instruct", "yuhuili/EAGLE-LLaMA3-Instruct-70B", "EAGLE-1/2"),
    Pair("Qwen/Qwen2-7B-Instruct", "yuhuili/EAGLE-Qwen2-7B-Instruct", "EAGLE-1/2"),
    Pair("Qwen/Qwen2-72B-Instruct", "yuhuili/EAGLE-Qwen2-72B-Instruct", "EAGLE-1/2"),
    Pair("meta-llama/Llama-3.2-3B-Instruct", "Mayank6255/LLAMA-3.2-3B-EAGLE2-en", "EAGLE-1/2", "mit"),
    Pair("Qwen/Qwen3-8B", "RedHatAI/Qwen3-8B-speculator.eagle3", "speculators"),
)


def draft_name_for(config: PretrainedConfig) -> tuple[str, str]:
    """The draft for a target, and why it was chosen, in words.

    What the target's own config names comes first, then the table, then lookup in the text.
    """
    named = getattr(config, CONFIG_FIELD, None)
    if named:
        return named, f"the target's config names it ({CONFIG_FIELD})"
    own = short_name(config.name_or_path)
    for pair in KNOWN:
        if own and short_name(pair.target) == own:
            return pair.draft, f"a published {pair.format} head for {pair.target}, licence: {pair.licence}"
    return LOOKUP, "no draft is known for this target; train one with `dovetail train`"


def load_assistant(name: str, **kwargs: Any) -> Draft:
    """Load whatever `name` is: a draft of any known format, a small language model, or `lookup`.

    Args:
        kwargs: as `from_pretrained`, e.g. `dtype`, `device_map`.

    Raises:
        ValueError, OSError: see `DovetailDraft.from_pretrained` and `SmallModelDraft`.
    """
    if name == LOOKUP:
        return PromptLookupDraft()
    try:
        return DovetailDraft.from_pretrained(name, **kwargs)
    except UnknownFormat as error:
        if not error.is_language_model:
            raise
    return SmallModelDraft.from_pretrained(name, **kwargs)
