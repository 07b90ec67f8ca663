"""Importing the package: drafts are registered in every order of imports, and public names are loaded when used."""

import subprocess
import sys

import pytest
from helpers import command_environment

import dovetail_plugin

KNOWN = """
from transformers import AutoConfig, GenerationMixin
assert AutoConfig.for_model("dovetail").model_type == "dovetail"
assert hasattr(GenerationMixin._assisted_decoding, "__wrapped__")
import sys
assert not any(type(finder).__module__ == "dovetail_plugin._lazy" for finder in sys.meta_path)
"""
ORDERS = [
    "import dovetail_plugin",
    "import transformers, dovetail_plugin",
    "import dovetail_plugin; from transformers import AutoModelForCausalLM",
    "import dovetail_plugin; import transformers.generation.utils",
    "import dovetail_plugin.hf",
    "import dovetail_plugin.cache",
    "import dovetail_plugin.tree",
    "import dovetail_plugin.drafts.model",
    "import dovetail_plugin.targets.transformers_model",
    "import dovetail_plugin.adapters",
    "from dovetail_plugin import TreeBudget",
    "import dovetail_plugin; dovetail_plugin.hf",
    "import dovetail_plugin, threading; import_it = lambda name: threading.Thread(target=__import__, args=(name,));"
    "threads = [import_it('transformers'), import_it('dovetail_plugin.drafts.model')];"
    "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
]


def run(code, tmp_path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=command_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ORDERS)
def test_drafts_are_registered_in_every_order(first, tmp_path):
    run(first + KNOWN, tmp_path)


def test_import_alone_loads_neither_torch_nor_transformers(tmp_path):
    code = "import sys, dovetail_plugin; dir(dovetail_plugin); hasattr(dovetail_plugin, 'nothing')"
    run(f"{code}; assert not {{'torch', 'transformers'}} & set(sys.modules)", tmp_path)


def test_a_module_that_fails_does_not_keep_drafts_from_being_registered(tmp_path):
    """For example an adapter whose engine is not installed."""
    code = "import sys; sys.modules['openvino'] = None\ntry: import dovetail_plugin.adapters.openvino\n"
    run(f"{code}except ImportError: pass\nelse: raise AssertionError{KNOWN}", tmp_path)


def test_unregister_lasts(tmp_path):
    code = "import dovetail_plugin as d; d.unregister(); d.TreeBudget; d.DovetailDraft; import transformers.pipelines"
    run(f"{code}; assert not d.is_registered(); d.register(); assert d.is_registered()", tmp_path)


def test_modules_keep_ordinary_loaders(tmp_path):
    code = "import dovetail_plugin, transformers, dovetail_plugin.tree as t, inspect; s = t.__spec__"
    run(f"{code}; assert 'exec_module' not in vars(s.loader); assert s.loader.get_code(s.name)", tmp_path)


def test_public_names():
    for name in dovetail_plugin.__all__:
        assert getattr(dovetail_plugin, name) is not None
    assert set(dovetail_plugin.__all__) <= set(dir(dovetail_plugin))
    assert {"__version__", *dovetail_plugin._MODULE_OF} == set(dovetail_plugin.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'TreeBudgte'"):
        dovetail_plugin.TreeBudgte  # noqa: B018
