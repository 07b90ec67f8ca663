"""Generation with a draft. `generate` checks a call, `open` prepares it, `loop` runs it and `text` owns its tokens."""

from .generate import generate_plainly, generate_with_draft

__all__ = ["generate_plainly", "generate_with_draft"]
