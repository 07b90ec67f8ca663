"""Runs a Python program of the documentation in this process, with its drafts and again without them."""

import contextlib
import gc
import io
import sys
from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin

from dovetail_plugin import Draft, detach_draft
from dovetail_plugin.report import GenerationReport


@dataclass(frozen=True)
class Outcome:
    """What a program printed with its drafts and without, and the reports of its drafts."""

    drafted: str
    plain: str
    reports: list[GenerationReport]


def run(code: str, *arguments: str) -> Outcome:
    """Run a program twice.

    Args:
        code: of the program.
        arguments: of its command line.
    """
    before, targets = _drafts(), []

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        targets.append(self)  # which keeps the draft that it has loaded
        return generate(self, *args, **kwargs)

    def plainly(self: Any, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        detach_draft(self)
        return generate(self, *args, **kwargs)

    generate = GenerationMixin.generate
    try:
        GenerationMixin.generate = noted
        drafted, _kept = _run(code, arguments)
        reports = [draft.report for draft in _drafts() if not any(draft is other for other in before)]
        GenerationMixin.generate = plainly
        plain, _ = _run(code, arguments)
    finally:
        GenerationMixin.generate = generate
    return Outcome(drafted, plain, reports)


def _run(code: str, arguments: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Return what a program prints, and its namespace."""
    printed, namespace, own = io.StringIO(), {"__name__": "__main__"}, sys.argv
    sys.argv = ["program.py", *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "a block of the page", "exec"), namespace)
    finally:
        sys.argv = own
    return printed.getvalue(), namespace


def _drafts() -> list[Draft]:
    """All drafts of this process that have generated, texts' and attached ones too."""
    found = [one for one in gc.get_objects() if issubclass(type(one), Draft)]
    return [draft for draft in found if draft.report is not None]
