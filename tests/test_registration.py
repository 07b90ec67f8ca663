"""What importing the package does to transformers, and what it leaves alone; the stock loop's candidates."""

import inspect

import pytest
import torch
import transformers
from families import VOCAB, prompt, tiny_target
from packaging.version import Version
from scipy.stats import chisquare
from transformers import GenerationMixin

import dovetail_plugin
from dovetail_plugin import DovetailCandidateGenerator, DovetailDraft, TreeBudget

pytestmark = pytest.mark.usefixtures("fixed_budget")

WRAPPED = ("_validate_generation_mode", "_assisted_decoding", "_get_candidate_generator")
needs_outputs = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.8"), reason="the stock loop hands over features from 5.8 on"
)


@pytest.fixture
def unregistered():
    dovetail_plugin.unregister()
    yield
    dovetail_plugin.register()


def test_register_is_idempotent_and_unregister_restores(unregistered):
    stock = {name: getattr(GenerationMixin, name) for name in WRAPPED}
    assert not any(hasattr(method, "__wrapped__") for method in stock.values())
    dovetail_plugin.unregister()
    dovetail_plugin.register()
    ours = {name: getattr(GenerationMixin, name) for name in WRAPPED}
    dovetail_plugin.register()
    for name in WRAPPED:
        assert getattr(GenerationMixin, name) is ours[name]
        assert ours[name].__wrapped__ is stock[name]
        assert inspect.signature(ours[name]) == inspect.signature(stock[name])
    assert dovetail_plugin.is_registered()
    dovetail_plugin.unregister()
    assert {name: getattr(GenerationMixin, name) for name in WRAPPED} == stock
    assert not dovetail_plugin.is_registered()


@pytest.mark.parametrize(
    "options",
    [{"assistant": True}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"do_sample": True, "assistant": True}],
    ids=["assistant", "prompt lookup", "beams", "sampled assistant"],
)
def test_stock_modes_are_untouched(llama, options, unregistered):
    """transformers' own assisted generation, prompt lookup and beams give the same with us registered."""
    assistant = tiny_target("llama", seed=5, num_hidden_layers=1)
    options = dict(options)
    extra = {"assistant_model": assistant} if options.pop("assistant", False) else {}
    texts = []
    for registered in (False, True):
        (dovetail_plugin.register if registered else dovetail_plugin.unregister)()
        torch.manual_seed(0)
        texts.append(llama.generate(prompt(), max_new_tokens=30, **({"do_sample": False} | options), **extra))
    assert torch.equal(*texts)


@needs_outputs
@pytest.mark.parametrize("ids", [prompt(), prompt(1)], ids=["prompt", "one token"])
def test_stock_loop_greedy(llama, draft, ids):
    draft.verification = "stock"
    draft.budget = TreeBudget(6, 5, 1)
    plain = llama.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(plain, llama.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=draft))
    assert draft.report.new_tokens == 40


@needs_outputs
def test_stock_loop_left_padding(llama, draft):
    draft.verification = "stock"
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], dim=1)
    options = dict(attention_mask=(torch.arange(22) >= 5).long()[None], max_new_tokens=20, do_sample=False)
    assert torch.equal(llama.generate(ids, **options), llama.generate(ids, **options, assistant_model=draft))


@needs_outputs
def test_stock_loop_drafts_what_our_chains_draft(llama, draft):
    """The same features reach the drafter through both doors: the same tokens are accepted."""
    draft.budget = TreeBudget(6, 5, 1)
    for parameter in draft.parameters():
        parameter.data.zero_()  # a draft that always says the same thing, and is right now and then
    options = dict(max_new_tokens=60, do_sample=False, eos_token_id=None, assistant_model=draft)
    llama.generate(prompt(), **options)
    ours = [r.emitted for r in draft.report.rounds]
    draft.verification = "stock"
    llama.generate(prompt(), **options)
    theirs = [r.emitted for r in draft.report.rounds]
    assert theirs == ours[: len(theirs)]  # the stock loop's last round is never reported back
    assert len(theirs) >= len(ours) - 1


@needs_outputs
@torch.no_grad()
def test_stock_loop_returns_the_probabilities_it_sampled_from(llama, draft):
    """First candidates of many draws against the softmax of the logits that came with them."""
    from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

    draft.budget = TreeBudget(3, 2, 1)
    config = GenerationConfig(do_sample=True, max_length=40)
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    outputs = llama(prompt(), output_hidden_states=True)
    torch.manual_seed(0)
    counts = torch.zeros(VOCAB)
    text = torch.cat([prompt(), torch.tensor([[9]])], dim=1)
    for _ in range(1500):
        generator = DovetailCandidateGenerator(draft, llama, config, processors)
        generator.get_candidates(prompt(), is_first_iteration=True)
        ids, logits = generator.get_candidates(text, model_kwargs={}, model_outputs=outputs)
        assert ids.shape[1] == text.shape[1] + 2
        assert logits.shape == (1, 2, VOCAB)
        counts[ids[0, 18]] += 1
    probabilities = logits[0, 0].softmax(-1)
    plain = draft.head(generator._drafter._root.predicted)[0]
    torch.testing.assert_close(probabilities, (plain / 0.5).softmax(-1))
    assert float(probabilities.min()) * 1500 >= 5  # enough expected of each for the test's approximation
    expected = probabilities.double()
    assert chisquare(counts.double(), expected / expected.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.8"), reason="this version has what is needed")
def test_stock_loop_needs_a_newer_transformers(llama, draft):
    draft.verification = "stock"
    with pytest.raises(ImportError, match=r"5\.8"):
        llama.generate(prompt(), max_new_tokens=4, assistant_model=draft)


def test_draft_finds_its_target_again(llama):
    """A draft that meets another fitting target takes that one's tables."""
    other = tiny_target("llama", seed=9)
    draft = DovetailDraft.for_target(llama)
    for target in (other, llama, other):
        plain = target.generate(prompt(), max_new_tokens=10, do_sample=False)
        assert torch.equal(plain, target.generate(prompt(), max_new_tokens=10, do_sample=False, assistant_model=draft))
        assert draft.head_weight.data_ptr() == target.lm_head.weight.data_ptr()
