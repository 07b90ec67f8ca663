"""Registers drafts with transformers without making `import dovetail_plugin` load torch and transformers.

`register_when_needed` is called when the package is imported. If transformers is loaded already, it registers drafts
at once. Otherwise it installs an import hook, which registers them as soon as transformers has been imported, by
whichever module comes first. So drafts are known to transformers in every order of imports, and `dovetail --help`
takes a fraction of a second.

Registration imports most modules of this package. It must therefore not start while one of them is still being
imported, which is the case when `import dovetail_plugin.hf` is what loads transformers. The hook watches the package's
own modules for that reason, and registers when the last of them is complete. Then it removes itself.
"""

import copy
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __package__ or "dovetail_plugin"
LIBRARY = "transformers"
_registered = False


def register_when_needed() -> None:
    """Register drafts now if transformers is loaded, otherwise as soon as it is."""
    if LIBRARY in sys.modules:
        register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def register() -> None:
    """Register drafts with transformers, which loads it. Only the first call has an effect, so `unregister` lasts."""
    global _registered
    if not _registered:
        importlib.import_module(f"{PACKAGE}.hf").register()
        _registered = True


class _Hook(MetaPathFinder):
    """Finds transformers and the modules of this package as other finders do, and watches them being executed."""

    def __init__(self) -> None:
        self._being_found: set[str] = set()
        self._being_executed: set[str] = set()
        self._registering = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not (name == LIBRARY or name.startswith(f"{PACKAGE}.")) or name in self._being_found:
            return None
        self._being_found.add(name)
        try:
            others = (finder for finder in list(sys.meta_path) if finder is not self)
            found = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._being_found.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = self._watched(spec.loader)
        return spec

    def _watched(self, loader: Loader) -> Loader:
        """A copy of `loader` (which modules may share) that reports when it has executed its module."""
        watched, execute = copy.copy(loader), loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del watched.exec_module  # type: ignore[method-assign] # the module keeps an ordinary loader
            name, failed = module.__name__, True
            self._being_executed.add(name)
            try:
                execute(module)
                failed = False
            finally:
                self._being_executed.discard(name)
                if name != LIBRARY or not failed:
                    self._register_if_complete()

        watched.exec_module = exec_module  # type: ignore[method-assign]
        return watched

    def _register_if_complete(self) -> None:
        if self._registering or self._being_executed or LIBRARY not in sys.modules:
            return
        self._registering = True
        try:
            register()
        except ImportError:
            # Another thread may be importing a module of the package, and wait for transformers, which this thread is
            # importing. That thread will register when its module is complete; if it is by now, a second try works.
            if self._being_executed:
                return
            register()
        finally:
            self._registering = False
            if not self._being_executed and self in sys.meta_path:
                sys.meta_path.remove(self)
