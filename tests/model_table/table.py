"""The committed table: one verdict for each family and kind of prompt, made from outcomes, in table.json.

A verdict is "trees" or "chains" (right with all drafts, in this shape), "refused: REASON", "trees; DovetailDraft
refused: REASON", "encoder-decoder", "untested: REASON", or "fails: ..." for everything that must not be: other text, an
error that is not a clear refusal, drafting that stops, or a refusal where transformers' own prompt lookup is right.
"""

import json
from pathlib import Path
from typing import Any

from .discovery import Family
from .exceptions import (
    LONGROPE_BEFORE_5_24,
    NO_IMAGE,
    NOT_BUILT,
    ONE_TOKEN_A_PASS,
    REFUSED_ALTHOUGH_STOCK_IS_RIGHT,
)
from .outcomes import ENCODER_DECODER

FILE = Path(__file__).with_name("table.json")
KINDS = {"oracle": "long acceptances", "untrained": "DovetailDraft", "lookup": "PromptLookupDraft"}

CAN_BE_BUILT = "fails: it can be built, so it must leave the list of those that cannot"


def cases(families: list[Family]) -> list[tuple[str, str]]:
    """(name, kind of prompt) of all that is tried."""
    return [(f.name, kind) for f in families for kind in ("text", "image") if kind == "text" or f.sees_images]


def verdict(name: str, kind: str, outcomes: dict[str, Any], *, older: bool = False) -> str:
    """The verdict on one family with one kind of prompt.

    Args:
        name: of the family.
        kind: "text" or "image".
        outcomes: fields of `Outcomes`.
        older: whether they are of an older transformers than the table.
    """
    untested = NOT_BUILT if kind == "text" else NOT_BUILT | NO_IMAGE
    if outcomes["plain"] == ENCODER_DECODER:
        return ENCODER_DECODER
    if outcomes["plain"]:
        return f"untested: {untested[name]}" if name in untested else f"fails: plain text: {outcomes['plain']}"
    if name in (NOT_BUILT if kind == "text" else NO_IMAGE):
        return CAN_BE_BUILT
    drafts = dict(outcomes["drafts"])
    one_token_a_pass = name in ONE_TOKEN_A_PASS or (older and name in LONGROPE_BEFORE_5_24)
    if one_token_a_pass and drafts["oracle"].startswith("slow"):
        drafts["oracle"] = "right"
    if any(o != "right" and not o.startswith("refused") for o in drafts.values()):
        return f"fails: {in_words(drafts)}"
    refused = {draft: outcome for draft, outcome in drafts.items() if outcome != "right"}
    if not refused:
        return outcomes["shape"]
    if outcomes["stock"] == "right" and name not in REFUSED_ALTHOUGH_STOCK_IS_RIGHT:
        return f"fails: prompt_lookup_num_tokens is right, but {next(iter(refused.values()))}"
    if len(refused) == len(drafts):
        return refused["oracle"]
    return "; ".join([outcomes["shape"], *(f"{KINDS[draft]} {outcome}" for draft, outcome in refused.items())])


def in_words(drafts: dict[str, str]) -> str:
    """What went wrong with which draft."""
    wrong = {draft: outcome for draft, outcome in drafts.items() if outcome != "right"}
    if len(wrong) == len(drafts) and len(set(wrong.values())) == 1:
        return f"with every draft: {wrong['oracle']}"
    return "; ".join(f"{KINDS[draft]}: {outcome}" for draft, outcome in wrong.items())


def load() -> dict[str, Any]:
    """The committed table: "transformers" with its version, and "verdicts": name -> kind of prompt -> verdict."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def save(version: str, verdicts: dict[str, dict[str, str]]) -> None:
    """Write the table."""
    FILE.write_text(json.dumps({"transformers": version, "verdicts": verdicts}, indent=1) + "\n", encoding="utf-8")
