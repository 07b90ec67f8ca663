"""Checks drafts against plain `generate` on a tiny model, where the installed transformers was never tested.

A release of transformers may rename what the loop relies on without an error, and the text would be wrong. So before
the first draft is used with an untested version, texts of a tiny random model are compared token by token.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .. import compat
from ..drafts.base import Draft
from ..drafts.model import DovetailDraft
from ..drafts.prompt_lookup import PromptLookupDraft
from ..tree import TreeBudget

NEW_TOKENS = 24
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 3, 1, 4, 1]

_lock = threading.RLock()
_running = False
_result: str | None = None
"""None: not checked yet. "": texts are right. Else the first difference."""


Door = Callable[[Draft], dict[str, Any]]
"""Returns the arguments of `generate` by which a draft is used."""


def check_transformers(door: Door) -> None:
    """Refuse drafts if they give wrong text with an untested version of transformers. The check runs once.

    Args:
        door: the way by which drafts are used.

    Raises:
        RuntimeError: names both versions and the first difference.
    """
    global _result, _running
    if compat.is_tested():
        return
    with _lock:
        if _result is None and not _running:  # generations of the check itself pass
            _running = True
            try:
                _result = first_difference(door)
            except Exception as error:
                _result = f"the check fails ({type(error).__name__}: {error})"
            finally:
                _running = False
        if _result:
            raise RuntimeError(
                f"drafts do not work with transformers {transformers.__version__}: {_result}. Dovetail is tested with "
                f"versions {compat.dotted(compat.OLDEST)} to {compat.dotted(compat.NEWEST)}. Generate without "
                "assistant_model, or install a tested version."
            )


def first_difference(door: Door) -> str:
    """Compare drafted and plain texts of a tiny model; return the first difference in words, or an empty string."""
    if missing := compat.missing_names():
        return f"transformers lacks {', '.join(missing)}"
    with torch.random.fork_rng():  # of all devices, because `torch.manual_seed` sets all
        torch.manual_seed(0)
        target = _tiny_target()
        drafts: list[Draft] = [DovetailDraft.for_target(target), PromptLookupDraft(shortest=1)]
        for draft in drafts:
            draft.budget = TreeBudget(nodes=6, depth=3, top_k=2)
            for do_sample in (False, True):
                if difference := _compare(target, draft, door, do_sample):
                    return difference
    return ""


def _tiny_target() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _compare(target: PreTrainedModel, draft: Draft, door: Door, do_sample: bool) -> str:
    kind = f"{'sampled' if do_sample else 'greedy'} text with a {type(draft).__name__}"

    def generate(**kwargs: object) -> Tensor:
        torch.manual_seed(1)
        ids = torch.tensor([PROMPT])
        mask = torch.ones_like(ids)
        return target.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=do_sample, **kwargs)

    plain = generate()
    try:
        drafted = generate(**door(draft))
    except Exception as error:
        return f"{kind} fails ({type(error).__name__}: {error})"
    if draft.report is None or draft.report.warnings:
        return f"{kind} was not drafted ({draft.report.warnings if draft.report else 'no report'})"
    if plain.shape == drafted.shape and torch.equal(plain, drafted):
        return ""
    common = min(plain.shape[1], drafted.shape[1])
    differs = (plain[0, :common] != drafted[0, :common]).nonzero()
    if not len(differs):
        return f"{kind} has {drafted.shape[1]} tokens instead of {plain.shape[1]}"
    at = int(differs[0])
    return f"token {at} of a {kind} is {int(drafted[0, at])} instead of {int(plain[0, at])}"
