"""Drafts beside other plugins that wrap the same functions of transformers, and modules that are imported again."""

import functools
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from families import prompt, tiny_target
from helpers import run_python
from transformers import GenerationMixin
from transformers.pipelines import base as pipelines

import dovetail_plugin
from dovetail_plugin import PromptLookupDraft, attach_draft, detach_draft, hf
from dovetail_plugin.generation import wrapping

pytestmark = pytest.mark.usefixtures("fixed_budget")

OPTIONS = dict(max_new_tokens=12, do_sample=False)
PLACES = list(hf._WRAPPERS)


def functions():
    return {name: getattr(place, name) for place, name in PLACES}


@pytest.fixture
def stock():
    """transformers' own functions; whatever a test did is undone."""
    dovetail_plugin.unregister()
    own = functions()
    yield own
    dovetail_plugin.unregister()
    for (place, name), function in zip(PLACES, own.values(), strict=True):
        setattr(wrapping._holder((place, name)), name, function)
    dovetail_plugin.register()
    assert dovetail_plugin.is_registered()


def by_wraps(original):
    @functools.wraps(original)
    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    return theirs


def by_closure(original):
    def theirs(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return theirs


def by_default(original):
    def theirs(*args, _original=original, **kwargs):
        return _original(*args, **kwargs)

    return theirs


def by_attribute(original):
    def theirs(*args, **kwargs):
        return theirs.original(*args, **kwargs)

    theirs.original = original
    return theirs


WAYS = {"wraps": by_wraps, "closure": by_closure, "default": by_default, "attribute": by_attribute}


class Plugin:
    """Wraps the same methods of transformers, and puts back what it found."""

    def __init__(self, way):
        self.found = {name: getattr(GenerationMixin, name) for _, name in PLACES if name in vars(GenerationMixin)}
        for name, original in self.found.items():
            setattr(GenerationMixin, name, way(original))

    def remove(self):
        for name, original in self.found.items():
            setattr(GenerationMixin, name, original)


def drafted(target):
    """Whether an assistant and an attached draft reach the loop, with the text of plain generation."""
    given, found = PromptLookupDraft(shortest=1), []
    plain = target.generate(prompt(), **OPTIONS)
    assert torch.equal(target.generate(prompt(), **OPTIONS, assistant_model=given), plain)
    attached = attach_draft(target, PromptLookupDraft(shortest=1))
    assert torch.equal(target.generate(prompt(), **OPTIONS), plain)
    detach_draft(target)
    for draft in (given, attached):
        found.append(draft.report is not None and bool(draft.report.rounds))
    return all(found)


@pytest.mark.parametrize("way", WAYS)
def test_a_plugin_that_wraps_before_us(stock, way):
    target = tiny_target("llama")
    other = Plugin(WAYS[way])
    theirs = functions()
    dovetail_plugin.register()
    assert dovetail_plugin.is_registered() and drafted(target)
    dovetail_plugin.unregister()
    assert functions() == theirs  # theirs stays
    other.remove()
    assert functions() == stock


@pytest.mark.parametrize("way", WAYS)
def test_a_plugin_that_wraps_after_us(stock, way):
    target = tiny_target("llama")
    dovetail_plugin.register()
    other = Plugin(WAYS[way])
    theirs = {name: getattr(GenerationMixin, name) for name in other.found}
    assert dovetail_plugin.is_registered() and drafted(target)
    dovetail_plugin.unregister()
    assert not dovetail_plugin.is_registered()
    assert {name: getattr(GenerationMixin, name) for name in other.found} == theirs
    with pytest.raises(Exception, match="config"):  # transformers takes the draft for a language model
        target.generate(prompt(), **OPTIONS, assistant_model=PromptLookupDraft())
    dovetail_plugin.register()  # around theirs, which still calls ours of before
    assert dovetail_plugin.is_registered() and drafted(target)
    dovetail_plugin.unregister()
    other.remove()
    dovetail_plugin.register()
    dovetail_plugin.unregister()
    assert functions() == stock


@pytest.mark.parametrize("way", WAYS)
def test_a_plugin_that_puts_back_what_it_found_before_us(stock, way):
    other = Plugin(WAYS[way])
    dovetail_plugin.register()
    other.remove()  # and with it ours
    assert not dovetail_plugin.is_registered()
    dovetail_plugin.register()
    assert dovetail_plugin.is_registered() and drafted(tiny_target("llama"))
    dovetail_plugin.unregister()
    assert functions() == stock


def test_a_wrapper_that_hides_its_original(stock):
    """It cannot be found, so registering again wraps again. Only the newest acts, and all can be switched off."""
    target, kept = tiny_target("llama"), {}
    dovetail_plugin.register()

    def hiding(original):
        number = len(kept)
        kept[number] = original
        return lambda *args, **kwargs: kept[number](*args, **kwargs)

    Plugin(hiding)
    assert not dovetail_plugin.is_registered()
    dovetail_plugin.register()
    assert dovetail_plugin.is_registered() and drafted(target)
    assert [switch.on for switch in wrapping._installed].count(True) == len(PLACES)
    dovetail_plugin.unregister()
    with pytest.raises(Exception, match="config"):
        target.generate(prompt(), **OPTIONS, assistant_model=PromptLookupDraft())


def test_a_reload_wraps_nothing_twice(stock):
    dovetail_plugin.register()
    before = functions()
    for module in (hf, wrapping, hf):
        importlib.reload(module)
        hf.register()
        assert hf.is_registered() and functions() == before
    hf.unregister()
    assert functions() == stock


COPIES = """
import importlib, sys, torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM
import dovetail_plugin as first
own = first.PromptLookupDraft(shortest=1)
target = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None)).eval()

def depth():
    function, count = GenerationMixin._assisted_decoding, 0
    while (function := getattr(function, "__wrapped__", None)) is not None:
        count += 1
    return count

def run(draft):
    target.generate(torch.tensor([[1, 2, 1, 2, 1]]), max_new_tokens=4, do_sample=False, assistant_model=draft)
    assert draft.report.rounds
"""
AGAIN = """
run(own)
for _ in range(3):
    for name in [name for name in sys.modules if name.split(".")[0] == "dovetail_plugin"]:
        del sys.modules[name]
    second = importlib.import_module("dovetail_plugin")
    assert second is not first and second.is_registered() and depth() == 1, depth()
    run(second.PromptLookupDraft(shortest=1))
try:
    run(own)
except ValueError as error:
    assert "Load the draft again" in str(error), error
else:
    raise AssertionError("a draft of the old copy ran")
second.unregister()
assert depth() == 0
"""
BESIDE = """
import shutil, pathlib
copied = pathlib.Path("vendored") / "dovetail_copy"
shutil.copytree(pathlib.Path(first.__file__).parent, copied)
sys.path.insert(0, "vendored")
second = importlib.import_module("dovetail_copy")
other = second.PromptLookupDraft(shortest=1)
assert depth() == 2, depth()
run(own)
run(other)
second.unregister()
assert first.is_registered() and not second.is_registered()
run(own)
"""


def test_the_package_imported_twice(tmp_path):
    """A copy under another name stands beside; one that takes the place in `sys.modules` takes it in transformers."""
    done = run_python("-c", COPIES + BESIDE + AGAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- stock callers ----------------------------------------------------------------------------------------


def extended(original):
    """A later release's function: one more parameter, at the end."""
    signature = inspect.signature(original)
    new = inspect.Parameter("introduced_later", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*signature.parameters.values()]
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))

    def later(*args, introduced_later=None, **kwargs):
        assert introduced_later in (None, "given")
        return original(*args, **kwargs)

    later.__signature__ = signature.replace(parameters=[*parameters[:at], new, *parameters[at:]])
    return later


def test_calls_by_position_and_with_parameters_of_later_releases(stock, monkeypatch):
    target = tiny_target("llama")
    small = tiny_target("llama", seed=5, num_hidden_layers=1)
    plain = target.generate(prompt(), **OPTIONS, assistant_model=small)
    for name in ("_validate_generation_mode", "_assisted_decoding", "_sample", "_get_candidate_generator"):
        monkeypatch.setattr(GenerationMixin, name, extended(getattr(GenerationMixin, name)))
    dovetail_plugin.register()
    ours = GenerationMixin._get_candidate_generator
    by_position = []

    def caller(
        self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model=None, **k
    ):
        by_position.append(assistant_model)
        arguments = (generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model)
        return ours(self, *arguments, introduced_later="given")

    monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", caller)
    assert torch.equal(target.generate(prompt(), **OPTIONS, assistant_model=small), plain)
    assert by_position == [small]
    assert drafted(target)
    assert torch.equal(
        target.generate(prompt(), **OPTIONS, num_beams=2), target.generate(prompt(), **OPTIONS, num_beams=2)
    )
    dovetail_plugin.unregister()


def test_pipelines_are_left_alone_after_unregister(stock):
    dovetail_plugin.register()
    assert pipelines.load_assistant_model is not stock["load_assistant_model"]
    dovetail_plugin.unregister()
    assert pipelines.load_assistant_model is stock["load_assistant_model"]
    assert "generate_batch" not in vars(GenerationMixin)  # it is of a base of it


def test_a_plugin_that_keeps_the_original_in_a_global(stock):
    """And what it refers to may be anything, such as a module with an attribute `args`."""
    dovetail_plugin.register()
    names = {"original": GenerationMixin._sample, "settings": SimpleNamespace(args=7, func=3)}
    exec("def wrapper(*args, **kwargs):\n    settings\n    return original(*args, **kwargs)", names)
    GenerationMixin._sample = names["wrapper"]
    assert dovetail_plugin.is_registered() and drafted(tiny_target("llama"))
    dovetail_plugin.unregister()
    assert not dovetail_plugin.is_registered()
