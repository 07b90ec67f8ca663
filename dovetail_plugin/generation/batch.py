"""Batches: one sequence after another, each with the draft, put together as plain `generate` returns them.

Sequences of a batch do not see each other, so each alone gives the tokens that it gives in the batch. A sequence that
ends early is padded until the longest one has ended.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from .. import compat
from ..cache import cache_of_sequence, join_caches
from ..report import GenerationReport
from .refusal import CannotDraft
from .text import Text


@dataclass(frozen=True)
class Row:
    """One sequence of a batch.

    Attributes:
        input_ids: (1, T) int64, padding included.
        processors: for this sequence.
        model_kwargs: of its passes, with a cache for it.
    """

    input_ids: Tensor
    processors: LogitsProcessorList
    model_kwargs: dict[str, Any]


def rows_of(input_ids: Tensor, processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> Iterator[Row]:
    """Split what `generate` prepared for a batch.

    Args:
        input_ids: (B, T) int64.
        processors: of the batch.
        model_kwargs: of the batch.

    Raises:
        CannotDraft: an argument cannot be divided among the sequences, for example the patches of several images.
    """
    batch = input_ids.shape[0]
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and _batch_dimension(name, value, batch) is None:
            raise CannotDraft(
                "batch",
                f"{name} of shape {tuple(value.shape)} cannot be divided among the {batch} sequences of the batch. "
                "Call generate once for each sequence, or leave out assistant_model.",
            )
    for index in range(batch):
        kwargs = dict(model_kwargs)
        cache = compat.take_cache(kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                dimension = _batch_dimension(name, value, batch)
                assert dimension is not None, "checked above"
                kwargs[name] = value.narrow(dimension, index, 1) if value.dim() else value
        kwargs[compat.CACHE] = None if cache is None else cache_of_sequence(cache, index)
        yield Row(input_ids[index : index + 1], processors_of(processors, index), kwargs)


def _batch_dimension(name: str, value: Tensor, batch: int) -> int | None:
    """Return the dimension that counts sequences; None if there is none. Numbers belong to all sequences."""
    if not value.dim() or value.shape[0] == batch:
        return 0
    if name == "position_ids" and value.dim() == 3 and value.shape[1] == batch:
        return 1
    return None


def processors_of(processors: LogitsProcessorList, index: int) -> LogitsProcessorList:
    """Return copies of the processors for one sequence, since some remember what they saw.

    Args:
        processors: of the batch.
        index: of the sequence.
    """
    return LogitsProcessorList([compat.processor_of_sequence(copy.copy(one), index) for one in processors])


def joined(texts: list[Text], config: GenerationConfig, caches: list[Any], given: Any, report: GenerationReport) -> Any:
    """Return what `generate` returns for a batch.

    Behind the end of a sequence, processed scores are 0 for the padding token and minus infinity for others, and logits
    are 0.

    Args:
        texts: of the sequences, complete.
        config: as `generate` prepared it.
        caches: of the sequences.
        given: the cache of the batch, which gets the rows of all sequences; or None.
        report: of all sequences.

    Returns:
        Ids (B, length) int64, or a `GenerateDecoderOnlyOutput`.
    """
    length = max(text.length for text in texts)
    pad = _padding(config)
    ids = texts[0].ids.new_full((len(texts), length), pad)
    for row, text in zip(ids, texts, strict=True):
        row[: text.length] = text.ids[0]
    if given is not None:
        join_caches(given, caches)
    if not config.return_dict_in_generate:
        return ids
    steps = length - texts[0].prompt_tokens

    def stacked(which: str, fill: float) -> tuple[Tensor, ...] | None:
        columns = [getattr(text, which) for text in texts]
        if columns[0] is None:
            return None
        behind = torch.full_like(columns[0][0], fill)
        behind[:, pad] = 0.0
        rows = [(*column, *[behind] * (steps - len(column))) for column in columns]
        return tuple(torch.cat(step) for step in zip(*rows, strict=True))

    return compat.output_of_generate(ids, stacked("scores", -torch.inf), stacked("logits", 0.0), given, report)


def _padding(config: GenerationConfig) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(config, name)
        if token is not None:
            return token[0] if isinstance(token, list) else int(token)
    return 0
