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
from ..report import GenerationReport
from .batch_caches import cache_of_sequence, join_caches
from .refusal import CannotDraft
from .text import Text

OF_THE_ENCODER = ("last_hidden_state", "hidden_states", "attentions")
"""Outputs of an encoder of images that no language model reads: it gets `pooler_output`."""


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
    kwargs, batch = dict(model_kwargs), input_ids.shape[0]
    cache = compat.take_cache(kwargs)
    parts = {name: _parts(name, value, batch) for name, value in kwargs.items()}
    for index in range(batch):
        row = {name: of_sequence[index] for name, of_sequence in parts.items()}
        row[compat.CACHE] = None if cache is None else cache_of_sequence(cache, index)
        yield Row(input_ids[index : index + 1], processors_of(processors, index), row)


def _parts(name: str, value: Any, batch: int) -> list[Any]:
    """Return what of an argument belongs to each sequence. Numbers, texts and None belong to all of them.

    Raises:
        CannotDraft: see `rows_of`.
    """
    if isinstance(value, Tensor) and value.dim():
        dimension = 1 if name == "position_ids" and value.dim() == 3 else 0
        if value.shape[dimension] != batch:
            raise _indivisible(f"{name} of shape {tuple(value.shape)}", batch)
        return list(value.split(1, dimension))
    if isinstance(value, dict):  # such as the features of images, which `generate` computes before the prompt's pass
        unread = OF_THE_ENCODER if value.get("pooler_output") is not None else ()
        of_keys = {key: _parts(f"{name}[{key!r}]", v, batch) for key, v in value.items() if key not in unread}
        return [type(value)(**{key: parts[index] for key, parts in of_keys.items()}) for index in range(batch)]
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, dict, list, tuple)) for item in value):
        if len(value) != batch:
            raise _indivisible(f"{name} with {len(value)} items", batch)
        return [value[index : index + 1] for index in range(batch)]
    return [value] * batch


def _indivisible(argument: str, batch: int) -> CannotDraft:
    return CannotDraft(
        "batch",
        f"{argument} cannot be divided among the {batch} sequences of the batch. Call generate once for each sequence, "
        "or leave out assistant_model.",
    )


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
