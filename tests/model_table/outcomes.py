"""Compares drafted with plain text on one tiny model, and puts what happened into words.

An outcome of a draft is "right", "refused: REASON" (a ValueError of ours before the model ran), or a failure:
"different text ...", "stopped: WARNING", "slow ..." (the oracle was not accepted) or "error: ...". transformers' own
prompt lookup is judged as well: where it is right, a refusal is a failure, too.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from support.refusals import is_refusal, passes_of
from torch import Tensor
from transformers import PreTrainedModel

from dovetail_plugin import DovetailDraft, Draft, PromptLookupDraft, TreeBudget

from .build import build
from .discovery import family_of
from .images import image_prompt
from .oracle import OracleDraft
from .shrink import VOCAB

PROMPT_TOKENS, NEW_TOKENS, UNTRAINED_TOKENS = 24, 56, 20
SPECIAL = 10
"""The first and the last tokens of the vocabulary that texts do not contain, because some have a meaning."""
LAST_SPECIAL = 24
ACCEPTANCE = 3.0
"""Tokens per round that an oracle must exceed."""
TIE = 1e-4
"""Logits that differ by less are a tie: rounding may decide, and another model is tried."""
ENCODER_DECODER = "encoder-decoder"
NOT_REPEATED = "plain `generate` gives another text the second time, so there is none to compare with"
"""Rotary embeddings with dynamic NTK before transformers 5.24 keep the frequencies of the longest text so far."""


@dataclass
class Outcomes:
    """What happened to one family with one kind of prompt.

    Attributes:
        plain: "" or why plain `generate` does not work.
        stock: "right", "different text" or "error: ..." with transformers' own prompt lookup.
        drafts: kind of draft -> outcome.
        shape: "trees" or "chains", as the target asked the oracle; "" if it was refused.
        acceptance: tokens per round of the oracle.
        variety: different tokens among the new ones.
    """

    plain: str = ""
    stock: str = ""
    drafts: dict[str, str] = field(default_factory=dict)
    shape: str = ""
    acceptance: float = 0.0
    variety: int = 0


def outcomes_of(name: str, prompt_kind: str = "text") -> Outcomes:
    """Build the family's model and try all drafts on it. A text with a tie is replaced by one of another model."""
    for seed in range(3):
        try:
            model = build(family_of(name), seed)
            if model.config.is_encoder_decoder:
                return Outcomes(plain=ENCODER_DECODER)
            if prompt_kind == "text":
                inputs = text_prompt(seed)
            else:
                inputs = image_prompt(model)
        except Exception as error:
            return Outcomes(plain=f"not built: {described(error)}")
        outcomes, tie = compare(model, inputs)
        if not tie:
            break
    return outcomes


def text_prompt(seed: int = 0) -> dict[str, Tensor]:
    """Random tokens whose first half comes twice, so that lookup finds some."""
    generator = torch.Generator().manual_seed(seed + 1)
    half = torch.randint(SPECIAL, VOCAB // 2, (1, PROMPT_TOKENS // 2), generator=generator)
    ids = half.repeat(1, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


OPTIONS: dict[str, Any] = dict(
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
    num_beams=1,
    eos_token_id=None,
    pad_token_id=0,
    suppress_tokens=[*range(SPECIAL), *range(VOCAB - LAST_SPECIAL, VOCAB)],
)
VARIED = OPTIONS | dict(repetition_penalty=2.0)
"""Without the penalty, half of all random models repeat one token, whatever went before. Lookup needs repetitions."""


@dataclass(frozen=True)
class PlainText:
    """A text of plain `generate`.

    Args:
        ids: (1, T) int64.
        margins: of each new token, by which its logit was above the second best.
    """

    ids: Tensor
    margins: Tensor

    @property
    def new(self) -> list[int]:
        """The new tokens."""
        return self.ids[0, -len(self.margins) :].tolist()

    def difference(self, other: Tensor) -> int | None:
        """The first new token that another text (1, T or less) has differently, or None."""
        common = min(other.shape[1], self.ids.shape[1])
        differs = (other[0, :common] != self.ids[0, :common]).nonzero()
        return int(differs[0]) - (self.ids.shape[1] - len(self.margins)) if len(differs) else None


def plain_text(model: PreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any]) -> PlainText:
    """Generate plainly.

    Raises:
        ValueError: logits are not finite.
    """
    output: Any = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    scores = torch.cat(output.scores)
    if bool(scores.isnan().any()) or not bool(scores.isfinite().any(dim=-1).all()):
        raise ValueError("logits are not finite")
    best = scores.topk(2).values
    return PlainText(output.sequences, best[:, 0] - best[:, 1])


def compare(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Outcomes, bool]:
    """Outcomes for a prompt, and whether a difference may be due to a tie."""
    outcomes, tie = Outcomes(), False
    try:
        varied, repeated = (plain_text(model, inputs, options) for options in (VARIED, OPTIONS))
    except Exception as error:
        outcomes.plain = described(error)
        return outcomes, False

    def verdict(plain: PlainText, options: dict[str, Any], draft: Draft | None = None, **how: Any) -> str:
        nonlocal tie
        text: Any = model.generate(**inputs, **options, **how, **({"assistant_model": draft} if draft else {}))
        if (at := plain.difference(text)) is not None:
            if plain.difference(model.generate(**inputs, **options)) is not None:
                outcomes.plain = NOT_REPEATED
            tie |= at >= 0 and float(plain.margins[at]) < TIE
            return f"different text from new token {at}"
        if (new := text.shape[1] - inputs["input_ids"].shape[1]) != options["max_new_tokens"]:
            return f"different text: {new} new tokens"
        if draft is not None and (draft.report is None or draft.report.warnings):
            warning = draft.report.warnings[0] if draft.report else "no report"
            return f"refused: {warning}" if "one token at a time" in warning else f"stopped: {warning}"
        return "right"

    oracle = OracleDraft(varied.ids[0].tolist(), VOCAB)
    short = VARIED | dict(max_new_tokens=UNTRAINED_TOKENS)
    outcomes.drafts["oracle"] = attempt(model, lambda: verdict(varied, VARIED, oracle))
    outcomes.drafts["untrained"] = attempt(model, lambda: verdict(varied, short, untrained(model)))
    outcomes.drafts["lookup"] = attempt(model, lambda: verdict(repeated, OPTIONS, lookup()))
    outcomes.stock = attempt(model, lambda: verdict(repeated, OPTIONS, prompt_lookup_num_tokens=3))
    outcomes.variety = len(set(varied.new))
    if oracle.report is not None:
        outcomes.acceptance = round(oracle.report.acceptance_length, 2)
        outcomes.shape = "trees" if oracle.branches else "chains"
    if outcomes.drafts["oracle"] == "right" and outcomes.acceptance <= ACCEPTANCE:
        outcomes.drafts["oracle"] = f"slow: acceptance length {outcomes.acceptance}"
    return outcomes, tie


def untrained(model: PreTrainedModel) -> DovetailDraft:
    """A draft that is almost never right."""
    torch.manual_seed(7)
    draft = DovetailDraft.for_target(model, blocks=2)
    draft.budget = TreeBudget(12, 3, 4)
    return draft


def lookup() -> PromptLookupDraft:
    """A draft that is right now and then."""
    draft = PromptLookupDraft(shortest=1)
    draft.budget = TreeBudget(16, 6, 8)
    return draft


def attempt(model: PreTrainedModel, run: Callable[[], str]) -> str:
    """What `run` returns, or the error that it ends in."""
    with passes_of(model) as passes:
        try:
            return run()
        except Exception as error:
            return f"refused: {error}" if is_refusal(error, passes) else f"error: {described(error)}"


def described(error: BaseException) -> str:
    """Kind, message and place of an error, in one line without paths of this machine."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(frame.filename.split("/")[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place}:{frame.lineno})"
