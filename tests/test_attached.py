"""`attach_draft` and `detach_draft`: every `generate` of a model drafts, or runs plainly and says why."""

import copy
import gc
import logging
import os
import pickle
import signal
import time
import weakref

import engines
import pytest
import torch
from families import prompt, tiny_target
from helpers import byte_model, byte_tokenizer
from transformers import GenerationMixin, pipeline

import dovetail_plugin
from dovetail_plugin import DovetailDraft, PromptLookupDraft, attach_draft, detach_draft
from dovetail_plugin.generation import attached, generate

pytestmark = pytest.mark.usefixtures("fixed_budget")

OPTIONS = dict(max_new_tokens=24, do_sample=False)


@pytest.fixture
def target(llama):
    yield llama
    detach_draft(llama)


@pytest.fixture
def torch_target():
    """A model of transformers' own, also where other engines are tested."""
    if not engines.is_current("torch"):
        pytest.skip("needs a model of torch")
    return tiny_target("llama")


def generated(model, *args, seed=0, **options):
    torch.manual_seed(seed)
    return model.generate(*args, **(OPTIONS | options))


def test_every_call_drafts_until_the_draft_is_detached(target, draft):
    sampling = dict(do_sample=True, temperature=0.8)
    before = set(vars(target))
    plain = [generated(target, prompt()), generated(target, prompt(), **sampling)]
    assert attach_draft(target, draft) is draft
    for options, expected in zip(({}, sampling), plain, strict=True):
        assert torch.equal(generated(target, prompt(), **options), expected)
        assert draft.report.rounds and not draft.report.warnings
        assert max(r.nodes for r in draft.report.rounds) > 1
        draft.report = None
    assert set(vars(target)) == before
    assert detach_draft(target) is draft and detach_draft(target) is None
    assert torch.equal(generated(target, prompt()), plain[0])
    assert draft.report is None


class Collected:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.put_ids, self.ended = [], 0

    def put(self, ids):
        self.put_ids += ids.flatten().tolist()

    def end(self):
        self.ended += 1


CANNOT = {
    "beams": dict(num_beams=2),
    "no cache": dict(use_cache=False),
    "static cache": dict(cache_implementation="static"),
    "hidden states": dict(return_dict_in_generate=True, output_hidden_states=True),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("what", CANNOT)
def test_calls_that_cannot_draft_run_as_without_a_draft(torch_target, what, caplog):
    draft, options = PromptLookupDraft(), CANNOT[what]
    expected = generated(torch_target, prompt(), **options)
    attach_draft(torch_target, draft)
    with caplog.at_level(logging.WARNING, "dovetail_plugin"):
        for _ in range(2):
            draft.report = None
            result = generated(torch_target, prompt(), **options)
            assert not draft.report.rounds
            assert len(draft.report.warnings) == 1 and "no draft ran: " in draft.report.warnings[0]
    if what == "hidden states":
        assert torch.equal(result.sequences, expected.sequences)
        assert len(result.hidden_states) == len(expected.hidden_states)
    else:
        assert torch.equal(result, expected)
    assert sum("without its attached draft" in record.message for record in caplog.records) == 1
    generated(torch_target, prompt())
    assert draft.report.rounds and not draft.report.warnings


def test_each_kind_of_reason_is_logged_once(torch_target, caplog):
    attach_draft(torch_target, PromptLookupDraft())
    with caplog.at_level(logging.WARNING, "dovetail_plugin"):
        for options in (dict(num_beams=2), dict(use_cache=False), dict(num_beams=3), dict(use_cache=False)):
            generated(torch_target, prompt(), **options)
    assert len([r for r in caplog.records if "without its attached draft" in r.message]) == 2


def test_embeddings_instead_of_tokens(torch_target):
    draft = attach_draft(torch_target, PromptLookupDraft())
    given = dict(inputs_embeds=torch_target.get_input_embeddings()(prompt()))
    with_draft = generated(torch_target, **given)
    assert "input_ids instead of inputs_embeds" in draft.report.warnings[0]
    detach_draft(torch_target)
    assert torch.equal(with_draft, generated(torch_target, **given))


def test_a_plain_call_streams_each_token_once(torch_target):
    attach_draft(torch_target, PromptLookupDraft())
    streamer = Collected()
    text = generated(torch_target, prompt(), streamer=streamer, use_cache=False)
    assert streamer.put_ids == text[0].tolist() and streamer.ended == 1


def test_batches_draft_and_run_plainly_without_an_end_token(torch_target):
    draft = attach_draft(torch_target, PromptLookupDraft(shortest=1))
    batch = torch.cat([prompt(), prompt(seed=2)])
    options = dict(eos_token_id=5, pad_token_id=0)
    with_draft = generated(torch_target, batch, **options)
    assert draft.report.rounds and not draft.report.warnings
    detach_draft(torch_target)
    assert torch.equal(with_draft, generated(torch_target, batch, **options))


def test_an_assistant_of_the_call_has_priority(target, draft):
    plain = generated(target, prompt())
    ours, given = attach_draft(target, draft), PromptLookupDraft()
    assert torch.equal(generated(target, prompt(), assistant_model=given), plain)
    assert given.report.rounds and ours.report is None
    assert torch.equal(generated(target, prompt(), assistant_model=None), plain)  # the default of generate
    assert ours.report.rounds


def test_attaching_again_replaces_the_draft(target, draft):
    attach_draft(target, draft)
    second = attach_draft(target, "lookup")
    assert isinstance(second, PromptLookupDraft)
    generated(target, prompt())
    assert second.report.rounds and draft.report is None
    assert detach_draft(target) is second


def test_copies_of_the_model_carry_nothing(torch_target, tmp_path):
    untouched = pickle.dumps(torch_target)
    draft = attach_draft(torch_target, PromptLookupDraft())
    generated(torch_target, prompt())
    for copied in (copy.deepcopy(torch_target), pickle.loads(pickle.dumps(torch_target))):
        draft.report = None
        generated(copied, prompt())
        assert draft.report is None and detach_draft(copied) is None
    assert len(pickle.dumps(torch_target)) == len(untouched)
    torch_target.save_pretrained(tmp_path)
    assert "dovetail" not in (tmp_path / "config.json").read_text()


def test_a_model_with_a_draft_is_freed(torch_target):
    for name in ("lookup", DovetailDraft.for_target(torch_target)):
        model = copy.deepcopy(torch_target)
        attach_draft(model, name)
        generated(model, prompt(), assistant_model="lookup")
        generated(model, prompt())
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


class AdapterOf(torch.nn.Module):
    """Forwards to a model, as a PEFT wrapper does."""

    def __init__(self, model):
        super().__init__()
        self.wrapped = model

    def get_base_model(self):
        return self.wrapped

    def generate(self, *args, **kwargs):
        return self.wrapped.generate(*args, **kwargs)


@pytest.mark.parametrize("wrap", [AdapterOf, torch.compile], ids=["adapter", "compiled"])
def test_wrapped_models(torch_target, wrap):
    plain = generated(torch_target, prompt())
    wrapped = wrap(torch_target)
    draft = attach_draft(wrapped, PromptLookupDraft(shortest=1))
    assert torch.equal(generated(wrapped, prompt()), plain) and draft.report.rounds
    assert detach_draft(wrapped) is draft
    draft.report = None
    assert torch.equal(generated(wrapped, prompt()), plain) and draft.report is None


def test_pipelines_of_the_model_draft():
    target = byte_model()
    draft = attach_draft(target, PromptLookupDraft(shortest=1))
    pipe = pipeline("text-generation", model=target, tokenizer=byte_tokenizer())
    with_draft = pipe("one two one", max_new_tokens=8, do_sample=False)
    assert draft.report.rounds
    detach_draft(target)
    assert pipe("one two one", max_new_tokens=8, do_sample=False) == with_draft


def test_what_cannot_be_attached(torch_target, draft, monkeypatch):
    with pytest.raises(TypeError, match="LlamaForCausalLM is not a draft"):
        attach_draft(torch_target, tiny_target("llama"))
    with pytest.raises(ValueError, match="the draft's vocabulary is 97, the target's is 31"):
        attach_draft(tiny_target("llama", vocab_size=31), draft)
    draft.verification = "stock"
    with pytest.raises(ValueError, match='an attached draft runs with verification="tree"'):
        attach_draft(torch_target, draft)
    with pytest.raises(OSError, match="no/such/draft"):
        attach_draft(torch_target, "no/such/draft")

    class OwnLoop(type(torch_target)):
        def _sample(self, *args, **kwargs):
            return GenerationMixin._sample(self, *args, **kwargs)

    with pytest.raises(ValueError, match="OwnLoop has its own generation loop"):
        attach_draft(OwnLoop(torch_target.config), PromptLookupDraft())
    dovetail_plugin.unregister()
    try:
        with pytest.raises(RuntimeError, match=r"dovetail_plugin\.register\(\)"):
            attach_draft(torch_target, PromptLookupDraft())
    finally:
        dovetail_plugin.register()
    assert detach_draft(torch_target) is None


def test_a_setting_that_changes_later_runs_plainly(torch_target):
    draft = attach_draft(torch_target, DovetailDraft.for_target(torch_target))
    plain = generated(torch_target, prompt())
    draft.verification = "stock"
    assert torch.equal(generated(torch_target, prompt()), plain)
    assert 'verification="stock" needs assistant_model' in draft.report.warnings[0]


def test_a_draft_that_fails_does_not_end_the_attachment(target, draft, monkeypatch):
    plain = generated(target, prompt())
    attach_draft(target, draft)
    with monkeypatch.context() as patch:
        patch.setattr(DovetailDraft, "new_drafter", lambda *_, **__: 1 / 0)
        assert torch.equal(generated(target, prompt()), plain)
        assert "ZeroDivisionError" in draft.report.warnings[0]
    assert torch.equal(generated(target, prompt()), plain)
    assert not draft.report.warnings


@pytest.mark.parametrize("where", ["check_request", "open_generation"])
def test_an_exception_of_a_signal_handler_ends_the_call(torch_target, monkeypatch, where):
    """It is not taken for a reason to go on without the draft."""

    class OutOfTime(ValueError):
        pass

    def handler(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        attach_draft(torch_target, PromptLookupDraft())
        module = attached if where == "check_request" else generate
        monkeypatch.setattr(module, where, lambda *_: os.kill(os.getpid(), signal.SIGUSR1) or time.sleep(60))
        with pytest.raises(OutOfTime):
            generated(torch_target, prompt())
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_generate_batch_says_that_it_uses_no_draft(torch_target, caplog):
    draft = attach_draft(torch_target, PromptLookupDraft())
    with caplog.at_level(logging.WARNING, "dovetail_plugin"):
        assert not torch_target.generate_batch([], assistant_model=draft)
    assert "assistant_model is ignored" in caplog.text and "generate_batch uses no draft" in draft.report.warnings[0]
