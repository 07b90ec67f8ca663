"""The fenced blocks of code on the pages of the documentation."""

import re
from dataclasses import dataclass

FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of code; `reason` says why it is not run, None if it is."""

    language: str
    code: str
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, or of a part of it."""
    return [Block(match["language"], match["code"], match["reason"]) for match in FENCE.finditer(text)]
