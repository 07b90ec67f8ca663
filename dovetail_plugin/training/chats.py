"""Finds which tokens of a chat the assistant writes, for chat templates without generation marks.

Such a template shows it only by what it adds: the answer is what a chat that ends with it has beyond the chat before
it, with the generation prompt. To render a chat up to each answer would take the square of its messages. So the chat is
rendered twice, as it is and with marks in place of the contents, which gives the template's own text between contents:

    <|user|>   content 0   <|end|><|assistant|>   content 1   <|end|><|user|>   content 2 ...
    pieces[0]              pieces[1]                          pieces[2]

Chats up to an answer are rendered once for each kind of pieces around an answer, of which there are few. Where a
template changes contents, growing beginnings of the chat are encoded instead.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

MARK, MARKED = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")
"""Stands for the content of a message; the characters are for private use, so templates do not have them."""

MOST_KINDS = 32
"""Kinds of text around answers. A template that numbers its messages would have one for each."""

Messages = list[dict[str, str]]
Render = Callable[..., str]


def encode_unmarked(messages: Messages, tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Encode a chat.

    Args:
        messages: of the chat.
        tokenizer: with a chat template without generation marks.
        max_length: number of tokens that count.

    Returns:
        Ids, and for each of them 1 if the assistant writes it, otherwise 0.
    """

    def render(part: Messages, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    text = render(messages)
    answers = answer_spans(text, messages, render) if tokenizer.is_fast else None
    if answers is None:
        return _by_beginnings(messages, tokenizer, max_length)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    written = bytearray(len(text) + 1)
    for start, end in answers:
        written[start:end] = b"\1" * (end - start)
    # A token over the start of an answer belongs to it, one over its end does not.
    return list(encoded["input_ids"]), [written[max(start, end - 1)] for start, end in encoded["offset_mapping"]]


def answer_spans(text: str, messages: Messages, render: Render) -> list[tuple[int, int]] | None:
    """Return where the answers of the assistant are in the text of a chat, as (start, end) of characters.

    Args:
        text: of the whole chat.
        messages: of the chat.
        render: makes text of messages, with the generation prompt if its second argument is true.

    Returns:
        One pair for each answer whose text is the one that was written; None if the template changes contents.
    """
    marked = [message | {"content": MARK.format(number)} for number, message in enumerate(messages)]
    pieces = _pieces(render(marked), len(messages))
    contents = None if pieces is None else _content_spans(text, messages, pieces)
    if pieces is None or contents is None:
        return None
    kinds: dict[tuple[Any, ...], tuple[int, int] | None] = {}
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        roles = [other["role"] for other in messages[max(number - 1, 0) : number + 2]]
        kind = (number == 0, number == len(messages) - 1, *roles, pieces[number], pieces[number + 1])
        if kind not in kinds:
            if len(kinds) == MOST_KINDS:
                return None
            kinds[kind] = _around(number, marked, pieces, render)
        around = kinds[kind]
        if around is not None:
            start, end = contents[number]
            spans.append((start - around[0], end + around[1]))
    return spans


def _pieces(text: str, count: int) -> list[str] | None:
    """Return the text before, between and after `count` marks; None if they are not all there, once and in order."""
    parts = MARKED.split(text)
    return parts[::2] if parts[1::2] == [str(number) for number in range(count)] else None


def _content_spans(text: str, messages: Messages, pieces: list[str]) -> list[tuple[int, int]] | None:
    """Return where each message's content is, which templates may strip; None if the text is another one."""
    if not text.startswith(pieces[0]):
        return None
    spans, at = [], len(pieces[0])
    for message, after in zip(messages, pieces[1:], strict=True):
        content = message["content"]
        for found in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(found, at) and text.startswith(after, at + len(found)):
                spans.append((at, at + len(found)))
                at += len(found) + len(after)
                break
        else:
            return None
    return spans if at == len(text) else None


def _around(number: int, marked: Messages, pieces: list[str], render: Render) -> tuple[int, int] | None:
    """Return how many characters before and after the content the assistant writes.

    None if the template writes the answer differently once other messages follow.
    """
    until = _pieces(render(marked[: number + 1]), number + 1)
    if until is None or until[number] != pieces[number]:
        return None
    after = _common(until[-1], pieces[number + 1])
    if number == 0:  # no chat comes before it whose end could show the generation prompt
        return 0, after
    opened = MARKED.split(render(marked[:number], True))[-1]
    return len(pieces[number]) - _common(opened, pieces[number]), after


def _by_beginnings(messages: Messages, tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Encode growing beginnings of the chat, up to `max_length` tokens, and mark what an answer adds."""
    ids: list[int] = []
    written: list[int] = []
    for end, message in enumerate(messages, 1):
        opens = message["role"] == "assistant" and end > 1  # before a first answer nothing shows the generation prompt
        if opens:
            opened = tokenizer.apply_chat_template(messages[: end - 1], return_dict=False, add_generation_prompt=True)
            ids, written = _extended(ids, written, opened, 0)
        until = tokenizer.apply_chat_template(messages[:end], return_dict=False)
        ids, written = _extended(ids, written, until, int(opens))
        if len(ids) >= max_length and end < len(messages):
            return _extended(ids, written, tokenizer.apply_chat_template(messages, return_dict=False), 0)
    return ids, written


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common beginning."""
    both = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def _extended(ids: list[int], written: list[int], longer: list[int], mark: int) -> tuple[list[int], list[int]]:
    """Extend the mask of `ids` to `longer`: the old mask as far as the two agree, and `mark` after that.

    They can diverge before the end of `ids`, if tokens merge across the boundary or if the template renders earlier
    turns differently later on (for example without their reasoning).
    """
    same = _common(ids, longer)
    return list(longer), written[:same] + [mark] * (len(longer) - same)
