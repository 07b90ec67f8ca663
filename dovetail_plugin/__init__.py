"""Speculative decoding for transformers: a small draft model makes a large target model faster, with the same text.

Importing this package registers drafts with transformers, so that `target.generate(..., assistant_model=draft)` works;
`hf.py` describes what exactly that changes. The public names are loaded when they are first used. If transformers has
not been imported yet, drafts are registered as soon as it is (see `_lazy.py`), so `import dovetail_plugin` alone is
fast.
"""

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from . import _lazy
from ._version import __version__

if TYPE_CHECKING:
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

_MODULE_OF = {
    "DeviceSplitPolicy": "policy.device_split",
    "DovetailCandidateGenerator": "generation.stock_loop",
    "DovetailConfig": "drafts.config",
    "DovetailDraft": "drafts.model",
    "DraftTree": "tree",
    "GenerationReport": "report",
    "PromptLookupDraft": "drafts.prompt_lookup",
    "SmallModelDraft": "drafts.small_model",
    "TreeBudget": "tree",
    "generate_with_draft": "generation.generate",
    "is_registered": "hf",
    "register": "hf",
    "unregister": "hf",
}


def __getattr__(name: str) -> Any:
    """Load a public name, or a module of the package, when it is first used."""
    if name in _MODULE_OF:
        _lazy.register()
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# In a checkout the adapters stand beside the package, in an installed copy inside it. Found by the package's own path,
# so that a checkout on PYTHONPATH takes its own adapters, whatever else is installed.
_beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_beside, "adapters", "stored_target.py")):
    __path__.append(_beside)

_lazy.register_when_needed()
