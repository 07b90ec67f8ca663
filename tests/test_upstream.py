"""The runs of transformers' own tests with drafts: what is a difference, and what becomes of a call of `generate`."""

import json
from pathlib import Path

import pytest
import torch
from families import prompt
from transformers import DynamicCache, GenerationMixin, LlamaConfig
from upstream import __main__ as command
from upstream import drafting, judgement, runs, stand_ins, ways
from upstream.differences import DIFFERENCES, REASONS, REFUSALS
from upstream.judgement import Difference

BEAMS = "drafting works with greedy search and sampling, not with num_beams=2."


def record(**changed):
    return {"outcome": "passed", "text": "", "drafted": 1, "without_states": 0, "refused": [], "faults": []} | changed


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "passed"),
        ({"refused": [BEAMS]}, "passed, refused (beams)"),
        ({"refused": [BEAMS], "drafted": 0}, "refused (beams)"),
        ({"refused": ["no way"], "drafted": 0}, "refused (unknown: no way)"),
        ({"without_states": 1}, "passed (states of plain text)"),
        ({"faults": ["tokens differ"]}, "failed: tokens differ"),
        (
            {"outcome": "failed", "text": "place:1: in f\nE   ValueError: bad\nplace:2: ValueError"},
            "failed: ValueError: bad",
        ),
        ({"outcome": "skipped", "text": "Skipped: slow"}, "skipped: slow"),
        ({"drafted": 0}, "failed: no call was drafted"),
    ],
)
def test_outcomes_with_a_draft(changed, outcome):
    assert judgement.drafted(record(**changed), REFUSALS) == outcome


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "passed"),
        ({"outcome": "failed", "text": "E  OSError: We couldn't connect to 'x'"}, "left out: needs a download"),
        ({"outcome": "failed", "text": "E  TypeError: f() got x"}, "failed: TypeError: f() got x"),
        ({"outcome": "skipped", "text": "Skipped: test requires CUDA"}, "left out: test requires CUDA"),
    ],
)
def test_outcomes_without_a_draft(changed, outcome):
    assert judgement.baseline(record(**changed)) == outcome


def test_only_unexplained_differences_are_problems():
    tests = {
        "a": {ways.STOCK: "passed", "everywhere/lookup": "failed: x", "everywhere/dovetail": "passed"},
        "b": {ways.STOCK: "failed: y", "everywhere/lookup": "failed: y"},
        "c": {ways.STOCK: "passed", "everywhere/lookup": "refused (unknown: why)"},
        "d": {ways.STOCK: "passed", "everywhere/lookup": "passed, refused (beams)"},
    }
    assert judgement.problems(tests, []) == [
        "a with everywhere/lookup: failed: x",
        "c with everywhere/lookup: refused (unknown: why)",
    ]
    known = [Difference("a", "*/lookup", "failed: *", "a reason"), Difference("c", "*", "refused*", "another")]
    assert judgement.problems(tests, known) == []
    stale = Difference("d", "*", "*", "an old reason")
    assert judgement.problems(tests, [*known, stale]) == ["explains nothing any more: d (an old reason)"]


def test_the_report_has_a_line_for_each_test():
    same = {ways.STOCK: "passed"} | dict.fromkeys(ways.WAYS, "passed")
    text = command.report({"t::a": same, "t::b": {ways.STOCK: "left out: slow"}}, 9, [])
    assert '\n  "t::a": {"assistant": "passed", "everywhere": "passed"}\n' in text
    assert json.loads(text)["not compared"] == {"t::b": "left out: slow"}
    different = {"everywhere/dovetail": "passed", "everywhere/lookup": "refused (beams)"}
    text = command.report({"t::a": {ways.STOCK: "passed"} | different}, 9, [])
    assert json.loads(text)["compared"] == {"t::a": different}


def test_a_way_runs_the_tests_that_it_is_about():
    tests = {
        "asks": {"outcome": "passed", "total": 2, "asking": 1},
        "plain": {"outcome": "passed", "total": 1, "asking": 0},
        "no call": {"outcome": "passed", "total": 0, "asking": 0},
        "fails": {"outcome": "failed", "total": 1, "asking": 1},
    }
    assert runs.selected(tests, "assistant/lookup") == ["asks"]
    assert runs.selected(tests, "everywhere/lookup") == ["asks", "plain"]


def test_the_committed_outcomes_have_reasons():
    compared = json.loads((Path(command.__file__).parent / "outcomes.json").read_text(encoding="utf-8"))["compared"]
    tests = {name: {ways.STOCK: "passed"} | outcomes for name, outcomes in compared.items()}
    assert judgement.problems(tests, DIFFERENCES) == []
    found = {outcome for outcomes in compared.values() for outcome in outcomes.values()}
    keys = {key for outcome in found if "(" in outcome for key in outcome.partition("(")[2].rstrip(")").split(", ")}
    assert keys == set(REASONS) and set(REFUSALS) < set(REASONS)


# --- calls of generate ------------------------------------------------------------------------------


@pytest.fixture
def wrapped(monkeypatch):
    """A function that wraps `generate` for this test."""
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)  # restores it

    def install(kind, everywhere):
        wrapper = drafting.Wrapper(kind, everywhere)
        wrapper.install()
        return wrapper

    return install


@pytest.mark.parametrize("kind", ways.DRAFTS)
def test_calls_are_drafted_and_compared(llama, wrapped, kind):
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    plain = llama.generate(prompt(), **options)
    wrapper = wrapped(kind, everywhere=True)
    out = llama.generate(
        prompt(), **options, return_dict_in_generate=True, output_scores=True, output_hidden_states=True
    )
    assert torch.equal(out.sequences, plain) and len(out.hidden_states) == 6
    assert torch.equal(llama.generate(prompt(), **options, num_beams=1), plain)
    llama.generate(prompt(), **options, num_beams=2)
    calls = wrapper.calls
    assert (calls.total, calls.asking, calls.drafted, calls.compared, calls.without_states) == (3, 0, 2, 2, 1)
    assert calls.refused == [BEAMS] and calls.faults == []


def test_only_calls_that_ask_for_an_assistant_are_drafted(llama, wrapped):
    wrapper = wrapped("lookup", everywhere=False)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    llama.generate(prompt(), **options)
    llama.generate(prompt(), **options, prompt_lookup_num_tokens=2)
    assert (wrapper.calls.total, wrapper.calls.asking, wrapper.calls.drafted) == (2, 1, 1)


def test_a_call_with_another_text_fails(llama, wrapped, monkeypatch):
    wrapper = wrapped("lookup", everywhere=True)
    monkeypatch.setattr(wrapper, "_drafted", lambda _model, arguments, _compared: (arguments["inputs"], False))
    with pytest.raises(AssertionError, match="tokens differ"):
        llama.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert len(wrapper.calls.faults) == 1


def test_differences_of_caches():
    def cache(rows, value=1.0):
        made = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
        made.update(torch.full((1, 1, rows, 2), value), torch.ones(1, 1, rows, 2), 0)
        return made

    assert drafting.difference_of_caches(cache(3), cache(3)) == ""
    assert drafting.difference_of_caches(None, None) == ""
    assert "2 rows instead of 3" in drafting.difference_of_caches(cache(3), cache(2))
    assert drafting.difference_of_caches(cache(3), cache(3, 2.0)) == "keys of layer 0 of the cache differ"
    assert "NoneType instead of DynamicCache" in drafting.difference_of_caches(cache(3), None)


def test_missing_names_get_stand_ins(tmp_path, monkeypatch):
    import transformers.testing_utils as module

    (tmp_path / "t.py").write_text(
        "import torch\nif True:\n    from transformers.testing_utils import slow, gone_from_it\n"
    )
    monkeypatch.setattr(module, "gone_from_it", None, raising=False)  # removes it afterwards
    del module.gone_from_it
    monkeypatch.delitem(stand_ins.sys.modules, "tests.test_pipeline_mixin", raising=False)
    assert stand_ins.install(tmp_path, ["t.py"]) == ["transformers.testing_utils.gone_from_it"]
    with pytest.raises(NotImplementedError, match=r"has no transformers\.testing_utils\.gone_from_it"):
        module.gone_from_it()
