"""Generation with a draft: checks and preparation (`generate`), the loop (`loop`), the text (`text`)."""

from .generate import generate_plainly, generate_with_draft

__all__ = ["generate_plainly", "generate_with_draft"]
