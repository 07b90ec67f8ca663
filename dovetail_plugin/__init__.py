"""Speculative decoding for transformers: a small draft model makes a large target model faster, with the same text.

Importing this package registers drafts with transformers, so that `target.generate(..., assistant_model=draft)` works;
`hf.py` describes what exactly that changes. In the process of the `dovetail` command transformers is loaded only when a
public name is used, so that `dovetail --help` is fast.
"""

import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the build reads this line without importing the package, so it stays a literal

if TYPE_CHECKING:
    from .drafts.auto import AutoDraft
    from .drafts.base import Draft, Drafter
    from .drafts.config import DovetailConfig
    from .drafts.model import DovetailDraft
    from .drafts.prompt_lookup import PromptLookupDraft
    from .drafts.small_model import SmallModelDraft
    from .errors import DovetailError
    from .generation.attached import attach_draft, detach_draft
    from .generation.generate import generate_with_draft
    from .generation.stock_loop import DovetailCandidateGenerator
    from .hf import is_registered, register, unregister
    from .policy.device_split import DeviceSplitPolicy
    from .report import GenerationReport
    from .targets.cpu_weights import CpuWeights
    from .targets.gguf import load_gguf
    from .targets.save_packed import save_packed
    from .tree import DraftTree, TreeBudget

__all__ = [
    "AutoDraft",
    "CpuWeights",
    "DeviceSplitPolicy",
    "DovetailCandidateGenerator",
    "DovetailConfig",
    "DovetailDraft",
    "DovetailError",
    "Draft",
    "DraftTree",
    "Drafter",
    "GenerationReport",
    "PromptLookupDraft",
    "SmallModelDraft",
    "TreeBudget",
    "__version__",
    "attach_draft",
    "detach_draft",
    "generate_with_draft",
    "is_registered",
    "load_gguf",
    "register",
    "save_packed",
    "unregister",
]

_MODULE_OF = {
    "AutoDraft": "drafts.auto",
    "CpuWeights": "targets.cpu_weights",
    "DeviceSplitPolicy": "policy.device_split",
    "DovetailCandidateGenerator": "generation.stock_loop",
    "DovetailConfig": "drafts.config",
    "DovetailDraft": "drafts.model",
    "DovetailError": "errors",
    "Draft": "drafts.base",
    "DraftTree": "tree",
    "Drafter": "drafts.base",
    "GenerationReport": "report",
    "PromptLookupDraft": "drafts.prompt_lookup",
    "SmallModelDraft": "drafts.small_model",
    "TreeBudget": "tree",
    "attach_draft": "generation.attached",
    "detach_draft": "generation.attached",
    "generate_with_draft": "generation.generate",
    "is_registered": "hf",
    "load_gguf": "targets.gguf",
    "register": "hf",
    "save_packed": "targets.save_packed",
    "unregister": "hf",
}


def __getattr__(name: str) -> Any:
    """Load a public name, or a module of the package, when it is first used."""
    if name in _MODULE_OF:
        _register_once()
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


def _is_command() -> bool:
    """Return whether this is the process of the `dovetail` command, or of `python -m dovetail_plugin`."""
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module to run
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return after[:1] == [__name__]
    script = os.path.abspath(sys.argv[0]) if sys.argv else ""
    directory, name = os.path.split(script)
    return name.removesuffix(".exe") == "dovetail" and directory == os.path.abspath(sysconfig.get_path("scripts"))


@functools.cache
def _register_once() -> None:
    """Register drafts with transformers, which loads it; later calls do nothing, so that `unregister` lasts."""
    importlib.import_module(f"{__name__}.hf").register()


if not _is_command():
    _register_once()
