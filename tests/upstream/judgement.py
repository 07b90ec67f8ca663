"""Puts what happened to each test into one word or a few, and finds what `differences.py` does not explain.

An outcome is "passed", "refused" or "passed, refused" (all or some calls) with the keys of the reasons in brackets,
"failed: ..." or "skipped: ...". A test that failed or was skipped in the baseline has nothing to compare with.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from . import ways

DOWNLOAD = re.compile(
    r"outgoing traffic has been disabled|couldn't connect to|offline mode|LocalEntryNotFound|Max retries exceeded|"
    r"Cannot send a request|Name or service not known|OfflineModeIsEnabled"
)
"""What errors of tests say that need a download."""

STATES = "states of plain text"
"""Key of outcomes where attentions or hidden states came from plain generation."""


@dataclass(frozen=True)
class Difference:
    """A test that passes in the baseline and not with some drafts, and why that is right.

    Attributes:
        tests: pattern of names.
        ways: pattern of ways, see `ways.WAYS`.
        outcome: pattern of the outcome.
        reason: for readers.
    """

    tests: str
    ways: str
    outcome: str
    reason: str

    def explains(self, test: str, way: str, outcome: str) -> bool:
        """Whether this is about an outcome."""
        return fnmatch(test, self.tests) and fnmatch(way, self.ways) and fnmatch(outcome, self.outcome)


def baseline(record: dict[str, Any]) -> str:
    """The outcome of a test without a draft; tests that are left out begin with "left out: "."""
    if record["outcome"] == "failed":
        if DOWNLOAD.search(record["text"]):
            return "left out: needs a download"
        return f"failed: {last_line(record['text'])}"
    if record["outcome"] == "skipped":
        return f"left out: {record['text'].removeprefix('Skipped: ')}"
    return "passed"


def drafted(record: dict[str, Any], refusals: dict[str, str]) -> str:
    """The outcome of a test with a draft.

    Args:
        record: of the plugin.
        refusals: key -> pattern of the message of a known refusal.
    """
    if record["faults"]:  # a test that is repeated until it passes may hide them
        return f"failed: {record['faults'][0]}"
    if record["outcome"] == "failed":
        return f"failed: {last_line(record['text'])}"
    if record["outcome"] == "skipped":
        return f"skipped: {record['text'].removeprefix('Skipped: ')}"
    keys = sorted({key_of(message, refusals) for message in record["refused"]})
    if record["without_states"]:
        keys.append(STATES)
    if not record["drafted"] and not keys:
        return "failed: no call was drafted"
    word = "passed" if not record["refused"] else "passed, refused" if record["drafted"] else "refused"
    return f"{word} ({', '.join(keys)})" if keys else word


def key_of(message: str, refusals: dict[str, str]) -> str:
    """The key of a refusal; the message itself if it is not a known one."""
    return next((key for key, pattern in refusals.items() if fnmatch(message, pattern)), f"unknown: {message}")


def last_line(text: str) -> str:
    """The line of a report that names the error, without places."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines[-1] if lines else text.strip().rpartition("\n")[2])[:200]


def problems(tests: dict[str, dict[str, str]], differences: Iterable[Difference]) -> list[str]:
    """Return what is wrong, in words.

    Args:
        tests: name -> way -> outcome.
        differences: the known ones. One that explains nothing is a problem too.
    """
    used, found = set(), []
    for test, outcomes in tests.items():
        if outcomes[ways.STOCK] != "passed":
            continue
        for way, outcome in outcomes.items():
            if outcome.startswith(("passed", "refused")) and "unknown: " not in outcome:
                continue
            explaining = [d for d in differences if d.explains(test, way, outcome)]
            used.update(explaining)
            if not explaining:
                found.append(f"{test} with {way}: {outcome}")
    return found + [f"explains nothing any more: {d.tests} ({d.reason})" for d in differences if d not in used]
