"""Lets tests of one version of transformers be imported with another one.

Tests import names that came or went between the versions. Missing ones are replaced by stand-ins, so that only those
tests fail that use one, plainly and with drafts alike.
"""

import ast
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import transformers

READ = (
    "causal_lm_tester.py",
    "generation/test_utils.py",
    "test_configuration_common.py",
    "test_memory_leak_mixin.py",
    "test_modeling_common.py",
    "test_tensor_parallel_mixin.py",
    "test_training_mixin.py",
    "test_training_distributed_mixin.py",
    "utils/test_configuration_utils.py",
)
"""Files in `tests/` that the tests of models import, where the checkout has them."""


def install(checkout: Path, files: list[str]) -> list[str]:
    """Put stand-ins in the place of missing names, and return those.

    Args:
        checkout: directory with transformers' `tests/`.
        files: test files, relative to it.
    """
    pipelines = types.ModuleType("tests.test_pipeline_mixin")  # those tests need downloads, and import 25 files
    pipelines.PipelineTesterMixin = type("PipelineTesterMixin", (), {})  # type: ignore[attr-defined]
    sys.modules[pipelines.__name__] = pipelines
    paths = [checkout / "tests" / name for name in READ] + [checkout / name for name in files]
    return [name for path in paths if path.is_file() for name in _complete(path)]


def _complete(path: Path) -> list[str]:
    missing: list[str] = []
    nodes: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for node in nodes:
        if isinstance(node, ast.If):
            nodes.extend(node.body)  # "if is_torch_available():"
        elif (
            isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "transformers"
        ):
            module = _module(str(node.module))
            for alias in node.names:
                if not _has(module, alias.name):
                    setattr(module, alias.name, stand_in(f"{node.module}.{alias.name}"))
                    missing.append(f"{node.module}.{alias.name}")
    return missing


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        module = sys.modules[name] = types.ModuleType(name)
        return module


def _has(module: Any, name: str) -> bool:
    try:
        if hasattr(module, name):
            return True
        importlib.import_module(f"{module.__name__}.{name}")
    except ImportError:
        return False
    return True


def stand_in(name: str) -> type:
    """A class that says, when it is used, what the installed transformers lacks."""

    def refuse(_cls: type, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"transformers {transformers.__version__} has no {name}")

    return type(name.rpartition(".")[2], (), {"__new__": refuse})
