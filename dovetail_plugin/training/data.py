"""Turns text into training sequences: reads JSON lines and returns token ids with a mask.

A line is one of
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "completion": ...}
    {"text": ...}
The mask marks the tokens that the target itself would write: assistant turns, completions, or all of a plain text.
This module does not use models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.json_lines import half_character, read_rows
from ..errors import InputError
from .chats import encode_unmarked


@dataclass(frozen=True)
class Sequence:
    """One tokenized row.

    Attributes:
        input_ids: (T,) int64.
        written: (T,) bool, True for tokens that the target writes.
    """

    input_ids: Tensor
    written: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class Batch:
    """Several sequences, padded on the right.

    Attributes:
        input_ids: (B, T) int64.
        written: (B, T) bool, True for tokens that the target writes, False for padding.
        lengths: (B,) int64, tokens of each sequence without padding.
    """

    input_ids: Tensor
    written: Tensor
    lengths: Tensor


def read_jsonl(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read all rows of the files, in order. Blank lines, and a byte order mark at the start, are skipped.

    Raises:
        InputError: a line is not UTF-8, or not a JSON object with known fields of the right type (the message names
            file and line), or the files have no rows.
        MissingFileError: there is no such file.
    """
    files, rows = tuple(files), []
    for file in files:
        for place, row in read_rows(file):
            problem = _problem(row)
            if problem:
                raise InputError(f"{place}: {problem}.")
            rows.append(row)
    if not rows:
        raise InputError(f"no rows in {', '.join(str(f) for f in files)}. Add at least one line.")
    return rows


def _problem(row: Any) -> str | None:
    """Describe what is wrong with a row; None for a valid row."""
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if good and any(m["role"] == "assistant" for m in messages):
            return half_character(text for m in messages for text in (m["role"], m["content"]))
        return '"messages" must be a list of {"role": text, "content": text} with at least one message of the assistant'
    for fields in (("text",), ("prompt", "completion")):
        if isinstance(row, dict) and row.keys() >= set(fields):
            wrong = [f'"{name}" must be text' for name in fields if not isinstance(row[name], str)]
            return " and ".join(wrong) or half_character(row[name] for name in fields)
    found = ", ".join(sorted(row))[:200] if isinstance(row, dict) else type(row).__name__
    return f'expected "messages", "prompt" and "completion", or "text", got {found or "an empty object"}'


def encode(row: dict[str, Any], tokenizer: Any, max_length: int) -> Sequence:
    """Tokenize one row and cut it to `max_length` tokens.

    Raises:
        InputError: the row has messages and the tokenizer does not have a chat template, or one that refuses them.
    """
    if "messages" in row:
        ids, written = _encode_chat(row["messages"], tokenizer, max_length)
    elif "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        written = [1] * len(ids)
    else:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            completion = [*completion, tokenizer.eos_token_id]
        ids, written = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    return Sequence(torch.tensor(ids[:max_length]), torch.tensor(written[:max_length], dtype=torch.bool))


def _encode_chat(messages: list[dict[str, str]], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Ids and mask of a chat, whose first `max_length` tokens count.

    A template with generation marks gives the mask itself. Otherwise `chats.py` finds what the assistant's messages add
    to the text.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "rows with messages need a chat template, and the tokenizer has none. Use prompt and completion instead."
        )
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(out["input_ids"]), list(out["assistant_masks"])
        return encode_unmarked(messages, tokenizer, max_length)
    except Exception as error:  # a template is a program, which can raise anything
        raise InputError(f"the chat template refuses a chat of {len(messages)} messages ({error}).") from error


def collate(sequences: list[Sequence], pad_id: int) -> Batch:
    """Put sequences into one batch, padded on the right with `pad_id` to the longest of them."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        pad([s.input_ids for s in sequences], batch_first=True, padding_value=pad_id),
        pad([s.written for s in sequences], batch_first=True, padding_value=False),
        torch.tensor([len(s) for s in sequences]),
    )


def batch_order(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """The batches of one epoch in random order, each with sequences of similar length.

    Sequences are shuffled, sorted by length within pools of 50 batches, and cut into batches. The order depends only
    on the arguments, so a run can be resumed from its step number alone.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences per batch. Incomplete batches are dropped, unless all are incomplete.
        seed: of the order.

    Returns:
        Batches of sequence numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 50 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size] or batches
    return [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
