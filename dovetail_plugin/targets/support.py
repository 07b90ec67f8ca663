"""Finds out what the passes of a transformers model can do, on the model itself.

Verification runs several rows in one pass, and lets the rows of a tree see their ancestors only. Most models do that
exactly. Some do not: attention that ignores a mask, activations that are scaled over all rows of a pass, models that
number their rows themselves. Names and types do not tell, since anyone may register attention and replace layers. So
the first session of a model compares short passes: tokens one by one, a tree, and a chain if the tree is wrong.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import attention_of
from ..tree import DraftTree
from . import row_exact

TREE_ATTENTION = ("sdpa", "eager", row_exact.NAME)
"""Attention implementations that accept a 4-D mask."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest mean difference of two rows of logits that is rounding, in standard deviations of the logits."""

LOW_PRECISION = 0.1
"""The same for the other dtypes."""


@dataclass(frozen=True)
class Support:
    """The shapes that passes may have.

    Attributes:
        trees: whether the rows may be a tree with branches; else a chain.
        limitation: why a pass may have one row only, or None.
        inference_mode: whether passes may run in torch's inference mode, where weights of foreign tensor classes, such
            as quanto's, fail.
    """

    trees: bool = True
    limitation: str | None = None
    inference_mode: bool = True


_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, Support]] = weakref.WeakKeyDictionary()


def support_of(model: PreTrainedModel, open_session: Callable[[Support], Any]) -> Support:
    """Return what a model supports. The first call runs a few short passes of it.

    Args:
        model: the target.
        open_session: opens a session with an empty cache.
    """
    config = model.config.get_text_config(decoder=True)
    state = (attention_of(config), model.training, model.dtype, model.device)
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = state, _found(model, config, open_session)
    return known[1]


def _found(model: PreTrainedModel, config: Any, open_session: Callable[[Support], Any]) -> Support:
    full = Support(inference_mode=all(type(p) in (nn.Parameter, Tensor) for p in model.parameters()))
    with torch.random.fork_rng(devices=[]):  # a model in training draws numbers
        try:
            tokens = _tokens(model.config, config.vocab_size).to(model.device)
            wanted, reads_past = _one_by_one(tokens, full, open_session)
        except Exception as error:  # whatever a model raises that was never tried
            raise ValueError(
                f"{type(model).__name__} cannot be a target: a text of seven tokens fails with {type(error).__name__}: "
                f"{error}. Generate without a draft."
            ) from error
        forms = [_CHAIN]
        if attention_of(config) in TREE_ATTENTION and not _masks_by_row(model, config):
            forms.insert(0, _TREE)
        problems: list[str] = []
        if reads_past:
            forms, problems = [], ["its layers read earlier rows of the cache before they add those of the pass"]
        for form in forms:
            if _agrees(form, tokens, wanted, full, open_session, model, problems):
                return replace(full, trees=form is _TREE)
    return replace(
        full,
        trees=False,
        limitation=f"{type(model).__name__} cannot verify several tokens in one pass ({problems[-1]})",
    )


def _one_by_one(tokens: Tensor, full: Support, open_session: Callable[[Support], Any]) -> tuple[Tensor, bool]:
    """Return the logits (3, V) of the last three tokens, each run alone, as plain generation does.

    The second is whether the model reads its cache apart from adding to it (`cache.TextState.reads_past`).
    """
    rows = []
    with open_session(full) as session:
        session.prefill(tokens[None, :4], None)
        for token in tokens[4:].tolist():
            rows.append(session.score(DraftTree.root(token)).logits)
            session.keep([0])
        return torch.cat(rows), session.rows.reads_past


def _agrees(
    form: tuple[list[int], list[int], list[int]],
    tokens: Tensor,
    wanted: Tensor,
    full: Support,
    open_session: Callable[[Support], Any],
    model: PreTrainedModel,
    problems: list[str],
) -> bool:
    """Return whether a pass of this form gives the wanted logits (3, V); if not, add the problem."""
    parents, depths, rows = form
    drafted = torch.stack([tokens[4], tokens[3], tokens[5], tokens[6]]) if form is _TREE else tokens[4:]
    tree = DraftTree(
        drafted,
        torch.tensor(parents, device=model.device),
        torch.tensor(depths, device=model.device),
        torch.zeros_like(drafted).float(),
    )
    try:
        with open_session(full) as session:
            session.prefill(tokens[None, :4], None)
            got = session.score(tree).logits[rows]
    except Exception as error:  # the model's own code; another form may work
        problems.append(f"{type(error).__name__}: {error}")
        return False
    if _same(got, wanted, model.dtype):
        return True
    problems.append("the rows of a pass influence each other")
    return False


_TREE = [-1, 0, 0, 2], [0, 1, 1, 2], [0, 2, 3]
"""Parents and depths of a root with two children, the second of which has a child; and the rows of that path."""

_CHAIN = [-1, 0, 1], [0, 1, 2], [0, 1, 2]


def _masks_by_row(model: PreTrainedModel, config: Any) -> bool:
    """Return whether attention keeps its causal mask in a square table, in which rows are numbered one by one."""
    positions = getattr(config, "max_position_embeddings", None)
    return any(b.dim() > 1 and b.shape[-1] == b.shape[-2] == positions for b in model.buffers())


def _tokens(config: Any, vocab_size: int) -> Tensor:
    """Return seven tokens (7,) int64 without special ones, some of which ask for images."""
    special = {value for name, value in _numbers(config) if name.endswith("token_id") or name.endswith("token_index")}
    usual = [token for token in range(vocab_size // 2, vocab_size // 2 + 400) if token % vocab_size not in special]
    chosen = usual[:: max(len(usual) // 7, 1)][:7]
    return torch.tensor(chosen, device="cpu") % vocab_size


def _numbers(config: Any) -> list[tuple[str, Any]]:
    """Return names and values of a config and of the configs in it, lists unpacked."""
    found: list[tuple[str, Any]] = []
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            found += _numbers(value)
        else:
            found += [(name, one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
    return found


def _same(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    got, wanted = got.float(), wanted.float()
    difference = (got - wanted).abs().mean(-1) / wanted.std(-1).clamp(min=1e-12)
    return bool((difference <= TOLERANCE.get(dtype, LOW_PRECISION)).all())
