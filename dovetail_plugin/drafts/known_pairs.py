"""Finds a draft for a target by name; `auto.py` loads it.

`draft_name_for` takes a target's config and looks in the config itself and in a table of published drafts. The table
contains hub ids only; the drafts are not part of this package and have their own licenses.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from .compatibility import short_name

LOOKUP = "lookup"
"""Name of `PromptLookupDraft`, which has no checkpoint."""

CONFIG_FIELD = "dovetail_draft"
"""Field of a target's config.json that contains the hub id or directory of its draft."""


@dataclass(frozen=True)
class Pair:
    """A target and a published draft for it.

    Attributes:
        target: hub id of the target.
        draft: hub id of the draft.
        format: format of the draft, in words.
        license: license of the draft as its page states it.
    """

    target: str
    draft: str
    format: str
    license: str = "see its page"


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
    """Return the name of a draft for a target, and the reason for this choice in words.

    The name in the target's config comes first, then the table, then `LOOKUP`.
    """
    named = getattr(config, CONFIG_FIELD, None)
    if named:
        return named, f"the target's config names it ({CONFIG_FIELD})"
    own = short_name(config.name_or_path)
    for pair in KNOWN:
        if own and short_name(pair.target) == own:
            return pair.draft, f"a published {pair.format} head for {pair.target}, license: {pair.license}"
    return LOOKUP, "no draft is known for this target; `dovetail train` makes one"
