"""mkdocs hook: puts a table of the fields of `TrainingConfig` into the training reference.

Each field is described by its `metadata["help"]`, which docstrings do not show. The file of `TrainingConfig` needs only
the standard library, so it is loaded alone: the environment of the documentation has no torch.
"""

import dataclasses
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

PAGE = "reference/training.md"
MARK = "<!-- settings of a training run -->"
SOURCE = Path(__file__).parents[2] / "dovetail_plugin" / "training" / "config.py"


def table() -> str:
    """Return the fields as a Markdown table: name, type or choices, default, description."""
    spec = importlib.util.spec_from_file_location("dovetail_training_config", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rows = ["| field | type | default | description |", "|---|---|---|---|"]
    for field in dataclasses.fields(module.TrainingConfig):
        choices = ", ".join(f"`{choice!r}`" for choice in field.metadata.get("choices", ()))
        kind = choices or f"`{inspect.formatannotation(field.type)}`".replace("pathlib.", "").replace(" | ", " or ")
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | {kind} | {default} | {field.metadata['help']} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the mark on the training page; mkdocs calls this for every page."""
    return markdown.replace(MARK, table()) if page.file.src_uri == PAGE else markdown
