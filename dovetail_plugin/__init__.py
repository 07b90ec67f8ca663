"""Dovetail: a draft model on a small GPU makes a large model on the CPU talk faster, and say the same.

Importing this package registers drafts with transformers, so that
`target.generate(..., assistant_model=draft)` works; see `hf.py` for what exactly that touches.
"""

import os

from ._version import __version__
from .drafts.base import Draft, Drafter
from .drafts.config import DovetailConfig
from .drafts.model import DovetailDraft
from .drafts.prompt_lookup import PromptLookupDraft
from .drafts.small_model import SmallModelDraft
from .generation.generate import generate_with_draft
from .generation.stock_loop import DovetailCandidateGenerator
from .hf import is_registered, register, unregister
from .policy.device_split import DeviceSplitPolicy
from .report import GenerationReport
from .tree import DraftTree, TreeBudget

__all__ = [
    "DeviceSplitPolicy",
    "DovetailCandidateGenerator",
    "DovetailConfig",
    "DovetailDraft",
    "Draft",
    "DraftTree",
    "Drafter",
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

# In a checkout the adapters stand beside the package, in an installed copy inside it. Found by the package's own path,
# so that a checkout on PYTHONPATH takes its own adapters, whatever else is installed.
_beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_beside, "adapters", "stored_target.py")):
    __path__.append(_beside)

register()
