"""Which tokens a small model and its target have in common, found by the vocabularies of their tokenizers.

`shared_tokens` takes both vocabularies (token -> id) and the rows of both embedding tables, and returns `SharedTokens`:
what the small model reads a target's token as, and which of its logits may be drafted. Verification makes every draft
safe, so a token that one side lacks only costs speed. This module runs no model.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

Vocabulary = Mapping[str, int]
"""Token -> id, as `get_vocab` of a tokenizer returns it."""

PADDING = 0.02
"""Share of the target's rows by which two tables of one tokenizer may differ, because they are padded differently."""

REMEDY = "Use a small model of the target's own family, or PromptLookupDraft()."


@dataclass(frozen=True)
class SharedTokens:
    """The tokens of a pair; implements `DraftModel`.

    Attributes:
        vocab_size: tokens of the target (V).
        columns: the small model's logits that may be drafted: the first of them as a slice, or (v,) int64 ids.
        token_ids: (v,) int64 target token of each of these logits; None where the ids are the same.
        read_as: (V,) int64 small model's token for each of the target's; None where the ids are the same.
    """

    vocab_size: int
    columns: slice | Tensor
    token_ids: Tensor | None = None
    read_as: Tensor | None = None

    def to(self, device: torch.device) -> "SharedTokens":
        """Return the same with its tensors on `device`."""
        columns = self.columns.to(device) if isinstance(self.columns, Tensor) else self.columns
        token_ids, read_as = (None if ids is None else ids.to(device) for ids in (self.token_ids, self.read_as))
        return SharedTokens(self.vocab_size, columns, token_ids, read_as)

    def read(self, tokens: Tensor) -> Tensor:
        """Return the small model's tokens for those of the target; both of any shape, int64."""
        return tokens if self.read_as is None else self.read_as[tokens]

    def drafted(self, logits: Tensor) -> Tensor:
        """Return the logits (n, v) that may be drafted, of the small model's logits (n, rows)."""
        return logits[:, self.columns]

    # --- `DraftModel` protocol --------------------------------------------------------------------

    def project(self, features: Tensor) -> Tensor:
        """Return the features as they are; there are none."""
        return features

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """Return logits (n, V) over the target's tokens for those (n, v) that may be drafted; -inf for the others."""
        full = logits.new_full((logits.shape[0], self.vocab_size), float("-inf"))
        if self.token_ids is None:
            full[:, : logits.shape[1]] = logits
        else:
            full[:, self.token_ids] = logits
        return full


def shared_tokens(
    own: Vocabulary | None, target: Vocabulary | None, *, own_rows: int, target_rows: int, substitute: int
) -> SharedTokens:
    """Compare two vocabularies, and return what they share.

    A token is shared if both have it, also with different ids. If one of the vocabularies is unknown, all that can be
    compared is the number of rows: equal ids are taken for equal tokens if the numbers differ by padding only. A
    vocabulary for fewer than half of the rows counts as unknown, because transformers makes such a tokenizer where the
    files of the true one are missing.

    Args:
        own: vocabulary of the small model; None if it is unknown.
        target: vocabulary of the target; None if it is unknown.
        own_rows: rows of the small model's embedding table.
        target_rows: rows of the target's (V).
        substitute: small model's token that is read for tokens that it lacks.

    Raises:
        ValueError: most ids stand for different tokens, or the numbers of rows differ by more than padding.
    """
    if own is None or target is None or 2 * len(own) < own_rows or 2 * len(target) < target_rows:
        if abs(own_rows - target_rows) > PADDING * target_rows:
            raise ValueError(
                f"the small model has {own_rows} tokens and the target {target_rows}, so they have different "
                f"tokenizers, as far as can be known without the tokenizers of both. {REMEDY}"
            )
        same = torch.arange(min(own_rows, target_rows), device="cpu")
        return _from_pairs(same, same, own_rows, target_rows, substitute)
    _check_alike(own, target)
    pairs = {
        i: target[token] for token, i in own.items() if i < own_rows and target.get(token, target_rows) < target_rows
    }
    own_ids = torch.tensor(sorted(pairs), device="cpu")
    target_ids = torch.tensor([pairs[i] for i in sorted(pairs)], device="cpu")
    return _from_pairs(own_ids, target_ids, own_rows, target_rows, substitute)


def _check_alike(own: Vocabulary, target: Vocabulary) -> None:
    fewer = min(len(own), len(target))
    differing = [(token, i) for token, i in target.items() if own.get(token) != i]
    same = len(target) - len(differing)
    if 2 * same >= fewer:
        return
    token, i = min(differing, key=lambda item: item[1])
    other = next((repr(other) for other, index in own.items() if index == i), "nothing")
    raise ValueError(
        f"the small model's tokenizer is not the target's: only {same} of {fewer} token ids stand for the same token. "
        f"For example, {i} is {token!r} for the target ({len(target)} tokens) and {other} for the small model "
        f"({len(own)} tokens). {REMEDY}"
    )


def _from_pairs(own_ids: Tensor, target_ids: Tensor, own_rows: int, target_rows: int, substitute: int) -> SharedTokens:
    """Return what is shared if these ids (v,) of both sides, ascending in `own_ids`, stand for the same tokens."""
    count = len(own_ids)
    first = torch.arange(count, device="cpu")
    same = torch.equal(own_ids, target_ids)
    # A token that only the target has is read as what the small model has under this id, for example a renamed one.
    read_as = torch.arange(target_rows, device="cpu")
    read_as[own_rows:] = substitute
    read_as[target_ids] = own_ids
    return SharedTokens(
        target_rows,
        columns=slice(count) if torch.equal(own_ids, first) else own_ids,
        token_ids=None if same and torch.equal(own_ids, first) else target_ids,
        read_as=None if same and target_rows <= own_rows else read_as,
    )


def vocabulary_of(name: str, **arguments: Any) -> Vocabulary | None:
    """Return the vocabulary of a model's tokenizer, or None with a warning if it cannot be read.

    No code of the model's own is run for this, unless `trust_remote_code=True` is among the arguments.

    Args:
        name: directory or hub id.
        arguments: of `AutoTokenizer.from_pretrained`.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **arguments}).get_vocab()
    except Exception as error:  # the tokenizers library raises `Exception` itself for a file that it cannot read
        warnings.warn(
            f"the tokenizer of {name} cannot be read, so small model and target are compared by the number of their "
            f"tokens ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None
