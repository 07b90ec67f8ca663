"""Drafts with a transformers that was never tested: checked on a tiny model, and refused where texts differ."""

import pytest
import torch
import transformers
from families import prompt

from dovetail_plugin import TreeBudget, compat
from dovetail_plugin.generation import self_check
from dovetail_plugin.targets.torch_session import TorchSession

OPTIONS = dict(max_new_tokens=8, do_sample=False)


@pytest.fixture
def untested(monkeypatch):
    """An installed version beyond the tested ones, not checked yet."""
    monkeypatch.setattr(compat, "is_tested", lambda *_: False)
    monkeypatch.setattr(self_check, "_result", None)


def test_tested_versions_are_not_checked(monkeypatch, llama, draft):
    monkeypatch.setattr(self_check, "first_difference", lambda door: pytest.fail("not needed"))
    draft.budget = TreeBudget(6, 3, 2)
    llama.generate(prompt(), **OPTIONS, assistant_model=draft)


def test_untested_version_that_works_is_checked_once(untested, monkeypatch, llama, draft):
    counted, check = [], self_check.first_difference
    monkeypatch.setattr(self_check, "first_difference", lambda door: counted.append(1) or check(door))
    draft.budget = TreeBudget(6, 3, 2)
    state = torch.get_rng_state()
    plain = llama.generate(prompt(), **OPTIONS)
    for _ in range(2):
        assert torch.equal(plain, llama.generate(prompt(), **OPTIONS, assistant_model=draft))
    assert counted == [1]
    assert torch.equal(state, torch.get_rng_state())  # the user's random numbers are untouched


def test_untested_version_with_wrong_text_is_refused(untested, monkeypatch, llama, draft):
    score = TorchSession.score

    def shifted(self, tree):
        output = score(self, tree)
        return type(output)(output.logits.roll(1, dims=-1), output.features)

    with monkeypatch.context() as patch:
        patch.setattr(TorchSession, "score", shifted)
        with pytest.raises(RuntimeError, match=r"token \d+ of a greedy text.* is \d+ instead of \d+") as error:
            llama.generate(prompt(), **OPTIONS, assistant_model=draft)
    assert transformers.__version__ in str(error.value) and "5.5 to 5.24" in str(error.value)
    with pytest.raises(RuntimeError):  # the result is kept
        llama.generate(prompt(), **OPTIONS, assistant_model=draft)


def test_untested_version_that_lacks_a_name_is_refused(untested, monkeypatch, llama, draft):
    monkeypatch.setitem(compat.NAMES, "GenerationMixin._gone", ())
    with pytest.raises(RuntimeError, match=r"lacks GenerationMixin\._gone"):
        llama.generate(prompt(), **OPTIONS, assistant_model=draft)


def test_untested_version_that_fails_is_refused(untested, monkeypatch, llama, draft):
    def fails(self, path):
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(TorchSession, "keep", fails)
    with pytest.raises(RuntimeError, match="unexpected keyword argument"):
        llama.generate(prompt(), **OPTIONS, assistant_model=draft)


def test_check_that_fails_is_a_refusal(untested, monkeypatch, llama, draft):
    def fails(config):
        raise KeyError("rope")

    monkeypatch.setattr(self_check, "LlamaConfig", lambda **_: fails(None))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the check fails \(KeyError"):
            llama.generate(prompt(), **OPTIONS, assistant_model=draft)


def test_interrupted_check_runs_again(untested, monkeypatch, llama, draft):
    def interrupted(door):
        raise KeyboardInterrupt

    draft.budget = TreeBudget(6, 3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "first_difference", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(prompt(), **OPTIONS, assistant_model=draft)
    assert self_check._result is None
    llama.generate(prompt(), **OPTIONS, assistant_model=draft)
    assert self_check._result == ""
