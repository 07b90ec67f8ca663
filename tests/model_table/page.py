"""Writes docs/models.md from the committed table."""

from pathlib import Path
from typing import Any

from .discovery import family_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

HEAD = """# Models

Which targets work with drafts, for every causal language model and vision-language model of transformers {version}.
This page is written by `make models-page`, and `make test-families` checks it.

For each family the tests build a tiny random model in fp32 and compare greedy text, token by token: plain `generate`
against a draft that knows long parts of the text, an untrained `DovetailDraft` and a `PromptLookupDraft`. The texts are
longer than every window and attention chunk. A family is right with all of them, or it is refused before any work.

| | families |
|---|---|
{counts}
"""

RIGHT = """
## Drafted

With **trees**, a draft may propose several continuations in a round; with **chains** only one. "Image" is the same with
an image in the prompt, where a tiny image prompt can be made without the files of a checkpoint.

| model type | class | text | image |
|---|---|---|---|
"""

REFUSED = """
## Refused

`generate` with a draft raises a `ValueError` with this reason. Plain `generate` works.

| model type | class | reason |
|---|---|---|
"""

UNTESTED = """
## Not in the table

| model type | class | why |
|---|---|---|
"""

FAILS = """
## Known failures

| model type | class | what happens |
|---|---|---|
"""


def write(table: dict[str, Any]) -> None:
    """Write the page.

    Args:
        table: as `table.load` returns it.
    """
    PAGE.write_text(text_of(table), encoding="utf-8")


def text_of(table: dict[str, Any]) -> str:
    """The page's Markdown."""
    right, refused, untested, fails = [], [], [], []
    for name, verdicts in table["verdicts"].items():
        text, image = verdicts["text"], verdicts.get("image", "")
        if failed := [f"{kind}: {v.removeprefix('fails: ')}" for kind, v in verdicts.items() if v.startswith("fails")]:
            fails.append(row(name, "; ".join(failed)))
        elif text.startswith("untested") and not image.startswith(("trees", "chains")):
            untested.append(row(name, text.removeprefix("untested: ")))
        elif text == "encoder-decoder":
            untested.append(row(name, "encoder-decoder model; drafting works with decoder-only targets"))
        elif text.startswith("refused"):
            refused.append(row(name, text.removeprefix("refused: ")))
        else:
            shown = [value if value.startswith(("trees", "chains")) else "" for value in (text, image)]
            right.append(row(name, *shown))
    parts = {"drafted": right, "refused": refused, "not in the table": untested, "known failures": fails}
    counts = "\n".join(f"| {name} | {len(rows)} |" for name, rows in parts.items() if rows)
    page = [HEAD.format(version=table["transformers"], counts=counts)]
    for head, rows in zip((RIGHT, FAILS, REFUSED, UNTESTED), (right, fails, refused, untested), strict=True):
        if rows:
            page.append(head + "\n".join(rows) + "\n")
    return "".join(page)


def row(name: str, *cells: str) -> str:
    """One row, with the family's type, variant and class."""
    family = family_of(name)
    kind = f"{family.model_type} ({family.variant})" if family.variant else family.model_type
    cleaned = [" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return f"| {kind} | {family.class_name} | {' | '.join(cleaned)} |"
