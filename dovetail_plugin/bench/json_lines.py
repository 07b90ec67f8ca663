"""Reads files of JSON lines that users write: prompts of benchmarks and training data.

Such files come out of editors and spreadsheets in any encoding. Every mistake is an error of one line that names file
and line and says what to do. What the rows mean is left to the caller.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingFileError


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place ("FILE, line N"), which is for messages.

    Blank lines, and a byte order mark at the start, are skipped.

    Raises:
        InputError: a line is not JSON in UTF-8, or the path is a directory.
        MissingFileError: there is no such file.
    """
    for number, line in enumerate(_lines(file), 1):
        place = f"{file}, line {number}"
        text = _decoded(line, place)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except RecursionError as error:
            raise InputError(f"{place}: its JSON is nested too deeply.") from error
        except ValueError as error:  # also a number of thousands of digits
            raise InputError(f"{place}: not valid JSON ({error}).") from error
        yield place, row


def _lines(file: Path) -> Iterator[bytes]:
    """Lines of a file, without a byte order mark of UTF-8.

    Raises:
        InputError: it is a directory, or UTF-16.
        MissingFileError: it does not exist.
    """
    if file.is_dir():
        raise InputError(f"{file} is a directory. Name its files.")
    if not file.exists():
        raise MissingFileError(f"{file}: there is no such file.")
    with open(file, "rb") as opened:
        for number, line in enumerate(opened):
            if number == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{file}, line 1: the file is UTF-16. Save it as UTF-8.")
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _decoded(line: bytes, place: str) -> str:
    """A line as text.

    Raises:
        InputError: it is not UTF-8, or has zero bytes.
    """
    if 0 in line:
        raise InputError(f"{place}: there are zero bytes, as in UTF-16. Save the file as UTF-8.")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8. Save the file as UTF-8."
        ) from error


def half_character(texts: Iterable[str]) -> str | None:
    """Describe the first escape such as \\ud83d without its other half, which no tokenizer takes; None without any."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"{text[error.start]!a} is half of a character. Write both halves, or the character itself"
    return None
