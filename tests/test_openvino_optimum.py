"""Models of optimum-intel as targets. Runs with `--engine openvino` where optimum-intel is installed."""

import shutil

import engines
import pytest
import torch
from families import prompt, tiny_model
from support.files import digests
from support.sessions import exported

if not engines.is_current("openvino"):
    pytest.skip("runs with --engine openvino", allow_module_level=True)

import openvino as ov

from dovetail_plugin import DovetailDraft
from dovetail_plugin.targets.engine import engine_of

optimum = pytest.importorskip("optimum.intel")
pytestmark = pytest.mark.usefixtures("fixed_budget")

GREEDY = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


def optimum_model(directory, **options):
    return optimum.OVModelForCausalLM.from_pretrained(directory, **options)


def test_optimum_model(tmp_path, oracle):
    """Drafted and plain text, twice: all equal, optimum's own request is not replaced, and files are unchanged."""
    shutil.copytree(exported()[1], tmp_path / "ir")
    before = digests(tmp_path / "ir")
    model = optimum_model(tmp_path / "ir")
    draft = DovetailDraft.for_target(model)
    options = dict(attention_mask=torch.ones_like(prompt()), **GREEDY)
    drafted = model.generate(prompt(), **options, assistant_model=draft)
    request = model.request
    plain = model.generate(prompt(), **options)
    assert torch.equal(plain, drafted)
    oracle(plain, 17)
    assert torch.equal(plain, model.generate(prompt(), **options, assistant_model=draft))
    assert draft.report.acceptance_length > 1.2
    assert torch.equal(plain, model.generate(prompt(), **options))
    assert model.request is request, "compiled a second time"
    assert torch.equal(plain, tiny_model("llama").generate(prompt(), **options))
    assert digests(tmp_path / "ir") == before


def test_optimum_model_is_compiled_once_for_drafting(monkeypatch):
    """The model that was compiled without the edits is released, and no other one is compiled later."""
    model = optimum_model(exported()[1])
    compiled = []
    compile_model = ov.Core.compile_model

    def spy(core, graph_or_file, *args, **kwargs):
        compiled.append(graph_or_file)
        return compile_model(core, graph_or_file, *args, **kwargs)

    monkeypatch.setattr(ov.Core, "compile_model", spy)
    engine_of(model)
    assert [c is model.model for c in compiled] == [True]
    del compiled[:]
    for _ in range(2):
        model.generate(prompt(), **GREEDY)
        engine_of(model).cache(None)
    assert compiled == []


def test_optimum_turns():
    """A cache can be used in later drafted turns, also after optimum's own loop wrote another text."""
    model = optimum_model(exported()[1])
    draft = DovetailDraft.for_target(model)
    options = GREEDY | {"return_dict_in_generate": True, "assistant_model": draft}
    whole = model.generate(torch.cat([model.generate(prompt(), **GREEDY), prompt(5)], dim=1), **GREEDY)
    first = model.generate(prompt(), **options)
    more = torch.cat([first.sequences, prompt(5)], dim=1)
    second = model.generate(more, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences, whole)
    model.generate(prompt(9), **GREEDY)
    longer = torch.cat([whole, prompt(5)], dim=1)
    third = model.generate(longer, past_key_values=second.past_key_values, **options)
    assert torch.equal(third.sequences, model.generate(longer, **GREEDY))


def test_optimum_models_that_cannot_be_edited():
    draft = DovetailDraft.for_target(tiny_model("llama"))
    model = optimum_model(exported()[1], compile_only=True)
    with pytest.raises(ValueError, match="compile_only=True"):
        model.generate(prompt(), **GREEDY, assistant_model=draft)
    model = optimum_model(exported(kind="stateless")[1])
    with pytest.raises(ValueError, match="stateless export"):
        model.generate(prompt(), **GREEDY, assistant_model=draft)


def test_small_key_value_cache_of_optimum_warns():
    """The warning appears only if the user asked for it; the default of optimum and the plugin is replaced."""
    model = optimum_model(exported()[1], ov_config={"KV_CACHE_PRECISION": "u8"})
    with pytest.warns(UserWarning, match="cache holds u8"):
        engine_of(model)
    compiled = engine_of(optimum_model(exported()[1])).compiled
    assert compiled.get_property("KV_CACHE_PRECISION") == ov.Type.f32
