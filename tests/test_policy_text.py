"""Real text under the policy: it equals plain generation, whatever is measured or fails."""

import logging
import threading

import pytest
import torch
from families import prompt, tiny_target

import dovetail_plugin.generation.loop
from dovetail_plugin import DovetailDraft, PromptLookupDraft
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.policy.device_split import LIMITS, DeviceSplitPolicy
from dovetail_plugin.policy.settings import PolicySettings
from dovetail_plugin.report import PHASES

OPTIONS = dict(max_new_tokens=60, eos_token_id=None, pad_token_id=0)
SAMPLED = dict(do_sample=True, temperature=0.8, top_k=20)


def generate(target, draft=None, seed=5, length=17, **options):
    torch.manual_seed(seed)
    extra = {} if draft is None else {"assistant_model": draft}
    return target.generate(prompt(length), **(OPTIONS | {"do_sample": False} | options), **extra)


@pytest.fixture
def adaptive(draft, tmp_path):
    """A draft whose budgets the policy chooses."""
    draft.budget = None
    draft.policy = DeviceSplitPolicy(vram_budget=0, measured_in=tmp_path)
    return draft


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("knows", [True, False], ids=["oracle", "random"])
def test_text_is_the_plain_one(llama, adaptive, oracle, options, knows):
    plain = generate(llama, **options)
    if knows:
        oracle(plain, 17)
    for _ in range(2):  # measured now, known then
        assert torch.equal(generate(llama, adaptive, **options), plain)
        assert not adaptive.report.warnings
    assert len(adaptive.policy.costs) == 1


def test_rounds_are_reported_with_what_was_expected(llama, adaptive):
    generate(llama, adaptive)
    report = adaptive.report
    assert report.probe_s > 0
    assert sum(one.emitted for one in report.rounds) == report.new_tokens - 1  # the first token is the prompt's
    context = 17 + 1
    for one in report.rounds:
        assert one.context == context
        assert one.predicted_s > 0 and 1 <= one.predicted_tokens <= one.nodes
        assert one.seconds.keys() == {*PHASES, "other"} and one.total_s > 0
        assert one.widths is None or len(one.widths) >= one.depth - 1
        context += one.emitted
    drafted = [one for one in report.rounds if one.widths is not None]
    assert len(drafted) >= PolicySettings().first_trial


def test_a_policy_is_made_where_there_is_none(llama, draft):
    draft.budget = None
    assert torch.equal(generate(llama, draft), generate(llama))
    assert isinstance(draft.policy, DeviceSplitPolicy) and len(draft.policy.costs) == 1


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_a_short_first_text_is_enough_to_measure(llama, adaptive, new_tokens):
    """What is learnt of the machine does not depend on how much the first text had room for."""
    assert torch.equal(generate(llama, adaptive, max_new_tokens=new_tokens), generate(llama, max_new_tokens=new_tokens))
    assert torch.equal(generate(llama, adaptive), generate(llama))
    (cost,) = adaptive.policy.costs.values()
    assert cost.measured.verify_s.keys() >= {1, 8, LIMITS.nodes}
    assert cost.measured.level_s.keys() == {1, 2, 4, 8}


@pytest.mark.parametrize(("positions", "measured"), [(40, 0), (45, 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_measuring_stays_within_the_targets_positions(family, positions, measured, tmp_path):
    """A prompt that all but fills the target's positions: measured if there is room for that, the text whole anyway.

    A Llama computes positions, so it has room for any text.
    """
    if family == "llama":
        measured = 1
    target = tiny_target(family, max_position_embeddings=positions)
    draft = DovetailDraft.for_target(target)
    draft.budget, draft.policy = None, DeviceSplitPolicy(vram_budget=0, measured_in=tmp_path)
    options = dict(length=30, max_new_tokens=positions - 30)
    assert torch.equal(generate(target, draft, **options), generate(target, **options))
    assert not draft.report.warnings
    assert len(draft.policy.costs) == len(list(tmp_path.iterdir())) == measured
    generate(target, draft, length=5, max_new_tokens=positions - 5)
    assert len(draft.policy.costs) == 1  # another text has room


def test_a_drafter_that_fails_while_it_is_measured(llama, adaptive, monkeypatch, caplog):
    class Failing(FeatureDrafter):
        broken = True

        def grow(self, budget, judge=None):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().grow(budget, judge)

    new_drafter = DovetailDraft.new_drafter

    def new_failing(self, engine, *, capacity, clock):
        runner = new_drafter(self, engine, capacity=capacity, clock=clock).runner
        return Failing(self, runner, capacity=capacity, clock=clock)

    monkeypatch.setattr(DovetailDraft, "new_drafter", new_failing)
    plain = generate(llama)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(llama, adaptive), plain)
    assert len(adaptive.report.warnings) == len(caplog.records) == 1
    assert "out of memory" in caplog.text
    assert {one.nodes for one in adaptive.report.rounds} == {1} and len(adaptive.report.rounds) == 59
    assert not adaptive.policy.costs
    Failing.broken = False  # the next generation measures, and drafts
    assert torch.equal(generate(llama, adaptive), plain)
    assert len(adaptive.policy.costs) == 1 and not adaptive.report.warnings


def test_a_pass_that_fails_while_it_is_measured(adaptive):
    """Half-way through the target's layers: no rows of it may stay in the cache, the text goes on."""
    target = tiny_target("llama")
    passes = []

    def fail(_module, _args):
        passes.append(len(passes))
        if len(passes) == 4:  # the prompt's is the first
            raise RuntimeError("out of memory")

    plain = generate(target)
    generate(target, PromptLookupDraft(), max_new_tokens=2)  # the first draft finds out what the target supports
    hook = target.model.layers[1].register_forward_pre_hook(fail)
    try:
        assert torch.equal(generate(target, adaptive), plain)
    finally:
        hook.remove()
    assert len(passes) > 4 and len(adaptive.report.warnings) == 1


def test_generations_at_once_share_a_policy(tmp_path, monkeypatch):
    """Two threads, each with a target and a draft of its own, of one kind: measured once, and both texts right."""
    policy, texts, ready = DeviceSplitPolicy(vram_budget=0, measured_in=tmp_path), {}, threading.Barrier(2)
    measured, measure = [], dovetail_plugin.generation.loop.measure

    def counted(*args, **kwargs):
        measured.append(threading.get_ident())
        return measure(*args, **kwargs)

    monkeypatch.setattr(dovetail_plugin.generation.loop, "measure", counted)
    pairs = []
    for _ in range(2):
        target = tiny_target("llama")
        torch.manual_seed(7)
        pairs.append((target, DovetailDraft.for_target(target, blocks=2)))
        pairs[-1][1].budget, pairs[-1][1].policy = None, policy

    def run(number):
        target, draft = pairs[number]
        ready.wait()
        texts[number] = [generate(target, draft, max_new_tokens=80, length=20 + number + i) for i in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(measured) == 1 and len(policy.costs) == 1
    for number, (target, draft) in enumerate(pairs):
        assert not draft.report.warnings
        for i, text in enumerate(texts[number]):
            assert torch.equal(text, generate(target, max_new_tokens=80, length=20 + number + i))
