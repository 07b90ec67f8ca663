"""Dovetail: a draft model on a small GPU makes a large model on the CPU talk faster, and say the same.

Importing this package registers drafts with transformers, so that
`target.generate(..., assistant_model=draft)` works; see `hf.py` for what exactly that touches.
"""

from ._version import __version__
from .candidates import DovetailCandidateGenerator
from .configuration import DovetailConfig
from .generation import generate_with_draft
from .hf import is_registered, register, unregister
from .modeling import DovetailDraft
from .report import GenerationReport
from .tree import DraftTree, TreeBudget

__all__ = [
    "DovetailCandidateGenerator",
    "DovetailConfig",
    "DovetailDraft",
    "DraftTree",
    "GenerationReport",
    "TreeBudget",
    "__version__",
    "generate_with_draft",
    "is_registered",
    "register",
    "unregister",
]

register()
