"""Dovetail: a draft model on a small GPU makes a large model on the CPU talk faster, and say the same.

Importing this package registers drafts with transformers, so that
`target.generate(..., assistant_model=draft)` works; see `hf.py` for what exactly that touches.
"""

from ._version import __version__
from .candidates import DovetailCandidateGenerator
from .configuration import DovetailConfig
from .generation import generate_with_draft
from .hf import is_registered, register, unregister
from .lookup import PromptLookupDraft
from .modeling import DovetailDraft
from .policy import DeviceSplitPolicy
from .report import GenerationReport
from .small_model import SmallModelDraft
from .tree import DraftTree, TreeBudget

__all__ = [
    "DeviceSplitPolicy",
    "DovetailCandidateGenerator",
    "DovetailConfig",
    "DovetailDraft",
    "DraftTree",
    "GenerationReport",
    "PromptLookupDraft",
    "SmallModelDraft",
    "TreeBudget",
    "__version__",
    "generate_with_draft",
    "is_registered",
    "register",
    "unregister",
]

register()
