"""Prompts for benchmarks as token ids: from files of chats or questions, or random tokens."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_prompts(file: Path | None, tokenizer: Any, count: int) -> list[Tensor]:
    """Read prompts from a file and encode them, with the chat template if the tokenizer has one.

    Args:
        file: JSON lines with `prompt`, `question`, `turns` or `messages`. None reads the GSM8K test questions that come
            with the package.
        tokenizer: of the target.
        count: number of prompts to read at most.

    Returns:
        The first `count` prompts, each (1, T) int64.

    Raises:
        ValueError: a line is not JSON in UTF-8 or has none of these fields (the message names file and line), the
            file is empty, or the chat template fails.
    """
    file = file or Path(__file__).parent.parent / "prompts" / "gsm8k-test.jsonl"
    prompts: list[Tensor] = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if len(prompts) == count:
                break
            if not line.strip():
                continue
            try:
                messages = _messages(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, or without a prompt
                raise ValueError(f"{file}, line {number}: {error}.") from error
            prompts.append(encode_prompt(messages, tokenizer))
    if not prompts:
        raise ValueError(f"no prompts in {file}. Add at least one line with a prompt.")
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


def _messages(row: Any) -> list[dict[str, str]]:
    """The chat of one line, ready for the assistant's turn.

    A chat that ends with the assistant's answer, as training data does, is cut before the assistant's first turn.
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
        return chat
    turns = row.get("turns")
    text = row.get("prompt") or row.get("question") or (turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(text, str):
        raise ValueError('expected text under "prompt", "question", "turns" or "messages"')
    return [{"role": "user", "content": text}]


def encode_prompt(messages: list[dict[str, str]], tokenizer: Any) -> Tensor:
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
