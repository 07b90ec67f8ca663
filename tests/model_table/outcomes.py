"""Compares drafted with plain text on one tiny model, and puts what happened into words.

An outcome of a draft is "right", "refused: REASON" (a ValueError of ours before the model ran), or a failure:
"different text ...", "stopped: WARNING", "slow ..." (the oracle was not accepted) or "error: ...". transformers' own
prompt lookup is judged as well: where it is right, a refusal is a failure, too.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dovetail_plugin
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
FOLDER = dovetail_plugin.__path__[0]


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
    repetition_penalty=2.0,  # without it, half of all random models repeat one token, whatever went before
    eos_token_id=None,
    pad_token_id=0,
    suppress_tokens=[*range(SPECIAL), *range(VOCAB - LAST_SPECIAL, VOCAB)],
)


def compare(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Outcomes, bool]:
    """Outcomes for a prompt, and whether a difference may be due to a tie."""
    outcomes = Outcomes()
    try:
        output: Any = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True, output_scores=True)
        plain, scores = output.sequences, torch.cat(output.scores)
        if not bool(scores.isfinite().any(dim=-1).all()) or bool(scores.isnan().any()):
            raise ValueError("logits are not finite")
    except Exception as error:
        outcomes.plain = described(error)
        return outcomes, False
    best = scores.topk(2).values
    margins = best[:, 0] - best[:, 1]
    start = plain.shape[1] - len(margins)
    outcomes.variety = len(set(plain[0, start:].tolist()))
    tie = False

    def judge(text: Tensor) -> str:
        nonlocal tie
        wanted = plain[0, : text.shape[1]]
        if text.shape[1] == len(wanted) and torch.equal(text[0], wanted):
            return "right"
        at = int((text[0, : len(wanted)] != wanted).nonzero()[0]) if text.shape[1] else 0
        tie |= at >= start and float(margins[at - start]) < TIE
        return f"different text from new token {at - start}"

    outcomes.stock = attempt(model, lambda: judge(model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3)))
    oracle = OracleDraft(plain[0].tolist(), VOCAB)
    outcomes.drafts["oracle"] = attempt(model, lambda: drafted(model, inputs, oracle, judge))
    outcomes.drafts["untrained"] = attempt(
        model, lambda: drafted(model, inputs, untrained(model), judge, max_new_tokens=UNTRAINED_TOKENS)
    )
    outcomes.drafts["lookup"] = attempt(model, lambda: drafted(model, inputs, lookup(), judge))
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


def drafted(
    model: PreTrainedModel, inputs: dict[str, Tensor], draft: Draft, judge: Callable[[Tensor], str], **options: Any
) -> str:
    """The outcome of a generation with a draft that was not refused."""
    verdict = judge(model.generate(**inputs, **(OPTIONS | options), assistant_model=draft))
    if verdict == "right" and (draft.report is None or draft.report.warnings):
        return f"stopped: {draft.report.warnings[0] if draft.report else 'no report'}"
    return verdict


def attempt(model: PreTrainedModel, run: Callable[[], str]) -> str:
    """What `run` returns, or the error that it ends in."""
    with passes_of(model) as passes:
        try:
            return run()
        except ValueError as error:
            if not passes and traceback.extract_tb(error.__traceback__)[-1].filename.startswith(FOLDER):
                return f"refused: {error}"
            return f"error: {described(error)}"
        except Exception as error:
            return f"error: {described(error)}"


@contextmanager
def passes_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list that gets an entry for every pass of the model in the block."""
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


def described(error: BaseException) -> str:
    """Kind, message and place of an error, in one line without paths of this machine."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(frame.filename.split("/")[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place}:{frame.lineno})"
