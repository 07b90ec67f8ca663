"""Prompts for benchmarks as token ids: from files of chats or questions, or random tokens."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .json_lines import half_character, read_rows

Messages = list[dict[str, Any]]


def load_prompts(file: Path | None, tokenizer: Any, count: int) -> list[Tensor]:
    """Read prompts from a file and encode them, with the chat template if the tokenizer has one.

    Args:
        file: see `read_chats`.
        tokenizer: of the target.
        count: number of prompts to read at most.

    Returns:
        The first `count` prompts, each (1, T) int64.

    Raises:
        InputError: see `read_chats` and `encode_chats`.
        MissingFileError: there is no such file.
    """
    return encode_chats(read_chats(file, count), tokenizer)


def read_chats(file: Path | None, count: int) -> list[tuple[str, Messages]]:
    """Read the chats of a file, each with its place ("FILE, line N"), ready for the assistant's turn.

    Args:
        file: JSON lines with `prompt`, `question`, `turns` or `messages`. None reads the GSM8K test questions that come
            with the package.
        count: number of chats to read at most.

    Raises:
        InputError: a line is not JSON in UTF-8 or has none of these fields (the message names file and line), or the
            file is empty or a directory.
        MissingFileError: there is no such file.
    """
    file = file or Path(__file__).parent.parent / "prompts" / "gsm8k-test.jsonl"
    chats: list[tuple[str, Messages]] = []
    for place, row in itertools.islice(read_rows(file), count):
        try:
            chats.append((place, _messages(row)))
        except ValueError as error:
            raise InputError(f"{place}: {error}.") from error
    if not chats:
        raise InputError(f"no prompts in {file}. Add at least one line with a prompt.")
    return chats


def encode_chats(chats: list[tuple[str, Messages]], tokenizer: Any) -> list[Tensor]:
    """Encode the chats that `read_chats` gives, each (1, T) int64.

    Raises:
        InputError: the chat template fails; the message names file and line.
    """
    prompts = []
    for place, messages in chats:
        try:
            prompts.append(encode_prompt(messages, tokenizer))
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error
    return prompts


def random_prompts(count: int, vocab_size: int, *, tokens: int = 96, seed: int = 0) -> list[Tensor]:
    """Random prompts for targets without a tokenizer.

    Args:
        count: number of prompts.
        vocab_size: tokens are drawn uniformly below this.
        tokens: length of each prompt. The default is about that of a GSM8K question in a chat template.
        seed: of the random tokens.

    Returns:
        `count` prompts, each (1, tokens) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (1, tokens), generator=generator) for _ in range(count)]


def _messages(row: Any) -> Messages:
    """The chat of one line, ready for the assistant's turn.

    A chat that ends with the assistant's answer, as training data does, is cut before the assistant's first turn.

    Raises:
        ValueError: says what is wrong with the row.
    """
    row = row if isinstance(row, dict) else {}
    if row.get("messages"):
        chat = row["messages"]
        if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
            raise ValueError('"messages" must be a list of objects with "role" and "content"')
        if chat[-1].get("role") == "assistant":
            chat = list(itertools.takewhile(lambda message: message.get("role") != "assistant", chat))
        if not chat:
            raise ValueError("the chat starts with the assistant's turn, so there is no prompt")
        return _whole(chat)
    turns = row.get("turns")
    text = row.get("prompt") or row.get("question") or (turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(text, str):
        raise ValueError('expected text under "prompt", "question", "turns" or "messages"')
    return _whole([{"role": "user", "content": text}])


def _whole(chat: Messages) -> Messages:
    """Return a chat if all of its texts can be encoded.

    Raises:
        ValueError: one has half of a character.
    """
    problem = half_character(value for message in chat for value in message.values() if isinstance(value, str))
    if problem is not None:
        raise ValueError(problem)
    return chat


def encode_prompt(messages: Messages, tokenizer: Any) -> Tensor:
    """Encode a chat up to the assistant's answer.

    Args:
        messages: of the chat. Without a chat template only the last one is encoded.
        tokenizer: of the target.

    Returns:
        (1, T) int64.

    Raises:
        ValueError: the chat template fails.
    """
    try:
        if tokenizer.chat_template is None:
            return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template is a program, which may raise anything
        raise ValueError(
            f"the tokenizer cannot encode the chat ({type(error).__name__}: {error}). Check its chat template and "
            "the roles of the messages."
        ) from error
    return torch.tensor([ids])
