"""The model card of a draft: what a hub shows about it, and how it is used, in a README.md.

Takes the config of the draft and what its maker knows, and returns Markdown. Configs and cards come from strangers too,
so only names that a hub accepts get into a card.
"""

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .config import DovetailConfig

CARD = "README.md"
"""Name of the card. One that exists is never replaced: its author may have written it."""

KINDS = {"dgf": "Dynamic Gating Fusion", "concat": "the fusion of EAGLE-1 and EAGLE-2", "eagle3": "EAGLE-3"}
"""Fusion of a draft -> its name."""

TEMPLATE = """\
---
library_name: dovetail-plugin
tags:
- speculative-decoding
- dovetail
{fields}---

# Draft for {target}

This is a draft model for speculative decoding. It proposes tokens for {target}, which verifies several of them in one
pass, so the text is the same as without it. It has {blocks} and {kind}. {made}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from dovetail_plugin import AutoDraft

target = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{path}")
draft = AutoDraft.from_pretrained("path-or-hub-id-of-this-draft", device_map="auto")

inputs = tokenizer("How much is 17 times 3?", return_tensors="pt")
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(draft.report)
```
"""

_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([a-z0-9][a-z0-9.-]{0,60})[\"']?[ \t]*\r?$", re.MULTILINE)


def model_card(config: DovetailConfig, *, made: str = "", license: str | None = None) -> str:
    """Return the card of a draft.

    Args:
        config: of the draft.
        made: sentences that say how it was made.
        license: identifier of its license; None if it is not known.
    """
    target = usable_name(config.target_name_or_path)
    fields = f"base_model: {target}\n" if target is not None and "/" in target else ""
    fields += f"license: {license}\n" if license is not None else ""
    blocks = config.num_hidden_layers
    card = TEMPLATE.format(
        fields=fields,
        target="its target" if target is None else f"`{target}`",
        path=target or "path-or-hub-id-of-the-target",
        blocks=f"{blocks} decoder block{'s' if blocks > 1 else ''}",
        kind=KINDS[config.fusion],
        made=made,
    )
    return re.sub(r"[ \t]+$", "", card, flags=re.MULTILINE)


def usable_name(name: str | None) -> str | None:
    """Return a name as it is if a hub would accept it as that of a model, with an owner or without; otherwise None."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def license_in(card: str) -> str | None:
    """Return the license that a card names; None if it names none, or one that has to be read elsewhere."""
    head = _FRONT_MATTER.match(card)
    found = None if head is None else _LICENSE.search(head[1])
    return None if found is None or found[1] in ("other", "unknown") else found[1]
