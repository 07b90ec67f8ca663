"""Importing the package registers drafts in every order of imports; the command loads transformers when needed."""

import os
import subprocess
import sys
import sysconfig

import pytest
from helpers import command_environment

import dovetail_plugin

KNOWN = """
from transformers import AutoConfig, GenerationMixin
assert AutoConfig.for_model("dovetail").model_type == "dovetail"
assert hasattr(GenerationMixin._assisted_decoding, "__wrapped__")
"""
ORDERS = [
    "import dovetail_plugin",
    "import transformers, dovetail_plugin",
    "import dovetail_plugin.hf",
    "import dovetail_plugin.drafts.model",
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


SCRIPT = os.path.join(sysconfig.get_path("scripts"), "dovetail")
PROGRAMS = [
    ([SCRIPT], [SCRIPT], True),
    (["-m"], [sys.executable, "-m", "dovetail_plugin", "plan"], True),
    (["/usr/share/dovetail"], [sys.executable, "/usr/share/dovetail"], False),
    (["dovetail"], [sys.executable, "dovetail"], False),
    (["-m"], [sys.executable, "-m", "other", "dovetail_plugin"], False),
    ([], [sys.executable], False),
]


@pytest.mark.parametrize(("argv", "orig_argv", "is_command"), PROGRAMS)
def test_only_the_command_loads_transformers_late(monkeypatch, tmp_path, argv, orig_argv, is_command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert dovetail_plugin._is_command() is is_command


def test_command_loads_transformers_when_a_name_is_used(tmp_path):
    code = f"import sys; sys.argv = [{SCRIPT!r}]; import dovetail_plugin; hasattr(dovetail_plugin, 'nothing')"
    code += "; assert not {'torch', 'transformers'} & set(sys.modules); dovetail_plugin.DovetailDraft"
    run(code + KNOWN, tmp_path)


def test_a_module_that_fails_does_not_keep_drafts_from_being_registered(tmp_path):
    """For example an adapter whose engine is not installed."""
    code = "import sys; sys.modules['openvino'] = None\ntry: import dovetail_plugin.adapters.openvino\n"
    run(f"{code}except ImportError: pass\nelse: raise AssertionError{KNOWN}", tmp_path)


def test_unregister_lasts(tmp_path):
    code = "import dovetail_plugin as d; d.unregister(); d.TreeBudget; d.DovetailDraft; import transformers.pipelines"
    run(f"{code}; assert not d.is_registered(); d.register(); assert d.is_registered()", tmp_path)


def test_public_names():
    for name in dovetail_plugin.__all__:
        assert getattr(dovetail_plugin, name) is not None
    assert set(dovetail_plugin.__all__) <= set(dir(dovetail_plugin))
    assert {"__version__", *dovetail_plugin._MODULE_OF} == set(dovetail_plugin.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'TreeBudgte'"):
        dovetail_plugin.TreeBudgte  # noqa: B018
