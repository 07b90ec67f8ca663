"""Drafters of several threads share a draft and its runner: trees are those of a lone thread, storage is not shared."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from families import prompt, tiny_target
from support.drafts import make_draft, text_and_features
from support.graphs import BUDGETS, assert_same_trees, drafters, record
from support.workers import workers

from dovetail_plugin import DovetailDraft, PromptLookupDraft, machine
from dovetail_plugin.drafts import runners
from dovetail_plugin.drafts.cuda_graphs import GraphRunner
from dovetail_plugin.drafts.network import DraftNetwork
from dovetail_plugin.drafts.runners import graph_runner_for, runner_for

LENGTHS = (6, 40)


@pytest.fixture
def recordings(monkeypatch):
    return record(monkeypatch)


def grow(drafter, length, rounds=3):
    """The trees of some rounds over a text of `length` pairs."""
    ids, features = text_and_features(length)
    trees, read = [], length - 2 * (rounds - 1)
    drafter.begin(features[:read], ids[: read + 1])
    for number in range(rounds):
        trees.append(drafter.grow(BUDGETS[number]))
        if number + 1 < rounds:
            drafter.advance(features[read : read + 2], ids[read + 1 : read + 3])
            read += 2
    return trees


def assert_equal_lists(some, others):
    for one, other in zip(some, others, strict=True):
        assert_same_trees(one, other)


@pytest.fixture
def wanted():
    """Trees of the default runner in a lone thread, by length."""
    draft = make_draft("dgf", 2)
    return {length: grow(drafters(draft)[0], length) for length in LENGTHS}


def between_steps(monkeypatch, owner, name, other):
    """Run `other` in the middle of every third call of a method, unless it is `other` that calls."""
    original, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(1)
        if len(calls) % 3 == 1:
            other()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


@pytest.mark.parametrize("kind", ["torch", "static", "replayed"])
def test_trees_of_two_threads_do_not_meet(wanted, kind, monkeypatch, request):
    """In the middle of one drafter's passes, another thread grows whole trees with the same draft and runner."""
    if kind == "replayed":
        recordings = request.getfixturevalue("recordings")
    draft = make_draft("dgf", 2)
    pick = 0 if kind == "torch" else 1
    owner, name = (DraftNetwork, "step") if kind == "torch" else (GraphRunner, "_run_static")
    runner = GraphRunner(draft)
    with workers(1) as (other,):
        found, busy = [], []

        def meanwhile():
            if not busy:
                busy.append(1)
                found.append(other(grow, drafters(draft, runner=runner)[pick], LENGTHS[1]))
                busy.clear()

        calls = between_steps(monkeypatch, owner, name, meanwhile)
        own = grow(drafters(draft, runner=runner)[pick], LENGTHS[0])
    assert_equal_lists(own, wanted[LENGTHS[0]])
    assert len(found) > 2 and len(calls) > 20
    for trees in found:
        assert_equal_lists(trees, wanted[LENGTHS[1]])
    if kind == "replayed":
        assert any(recording.replays for recording in recordings)


class Contended(list):
    """Idle storage that another thread asks for at the moment at which this one looks for some."""

    def __init__(self, stores, meanwhile):
        super().__init__(stores)
        self._meanwhile = meanwhile

    def _meet(self):
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def __iter__(self):
        for store in super().__iter__():
            self._meet()
            yield store

    def pop(self, index=-1):
        self._meet()
        return super().pop(index)


def test_storage_goes_to_one_text_only(wanted):
    draft = make_draft("dgf", 2)
    runner = GraphRunner(draft)
    grow(drafters(draft, runner=runner)[1], LENGTHS[0])
    assert len(runner._idle) == 1
    first, second = drafters(draft, runner=runner)[1], drafters(draft, runner=runner)[1]
    with workers(1) as (other,):
        trees = []
        runner._idle = Contended(runner._idle, lambda: trees.append(other(grow, second, LENGTHS[1])))
        assert_equal_lists(grow(first, LENGTHS[0]), wanted[LENGTHS[0]])
    assert_equal_lists(trees[0], wanted[LENGTHS[1]])
    assert first.rows.store is not second.rows.store


def test_storage_of_ended_texts_waits_for_the_next_ones_while_others_generate():
    draft = make_draft("dgf", 2)
    runner = GraphRunner(draft)
    several = [drafters(draft, runner=runner)[1] for _ in range(3)]
    for drafter in several:
        grow(drafter, LENGTHS[0])
    stores = {id(drafter.rows.store) for drafter in several}
    del several, drafter
    with workers(1) as (other,), ExitStack() as stack:
        other(stack.enter_context, machine.thread_count(None))
        several = [drafters(draft, runner=runner)[1] for _ in range(3)]
        for drafter in several:
            grow(drafter, LENGTHS[0])
        assert {id(drafter.rows.store) for drafter in several} == stores
        other(stack.close)
    del several, drafter
    lone = drafters(draft, runner=runner)[1]
    grow(lone, LENGTHS[0])
    assert id(lone.rows.store) in stores and not runner._idle


# --- captures --------------------------------------------------------------------------------------


def test_nothing_is_captured_while_others_generate(recordings, wanted):
    """What was captured before is replayed all the same."""
    draft = make_draft("dgf", 2)
    runner = GraphRunner(draft)
    with workers(1) as (other,), ExitStack() as stack:
        other(stack.enter_context, machine.thread_count(None))
        assert_equal_lists(grow(drafters(draft, runner=runner)[1], LENGTHS[0]), wanted[LENGTHS[0]])
        assert not recordings and runner.enable_graphs
        other(stack.close)
        assert_equal_lists(grow(drafters(draft, runner=runner)[1], LENGTHS[0]), wanted[LENGTHS[0]])
        captured, replays = len(recordings), sum(recording.replays for recording in recordings)
        assert captured and replays
        stack = ExitStack()
        other(stack.enter_context, machine.thread_count(None))
        assert_equal_lists(grow(drafters(draft, runner=runner)[1], LENGTHS[0]), wanted[LENGTHS[0]])
        assert len(recordings) == captured and sum(recording.replays for recording in recordings) > replays
        other(stack.close)


def test_no_generation_begins_during_a_capture(recordings, monkeypatch):
    capture, held = GraphRunner._capture, []

    def watched(runner, store, rows, columns):
        held.append(not other(machine._lock.acquire, False))
        return capture(runner, store, rows, columns)

    monkeypatch.setattr(GraphRunner, "_capture", watched)
    with workers(1) as (other,):
        grow(drafters(make_draft("dgf", 2))[1], LENGTHS[0])
    assert held and all(held)


def test_a_capture_that_fails_in_one_thread_does_not_stop_another(recordings, monkeypatch, wanted):
    """It fails while the other one is about to replay its own graph."""
    draft = make_draft("dgf", 2)
    runner = GraphRunner(draft)
    first, second = drafters(draft, runner=runner)[1], drafters(draft, runner=runner)[1]
    addresses, capture, asked, found = runner._addresses, GraphRunner._capture, [], []

    def fail(one, store, rows, columns):
        if asked and asked[-1] == "second":
            raise RuntimeError("out of memory")
        return capture(one, store, rows, columns)

    def meanwhile():
        asked.append("first")
        if asked.count("first") == 6:  # all graphs of the first thread's levels are there
            asked.append("second")
            runner._addresses = addresses
            found.append(other(grow, second, LENGTHS[1]))
        return addresses()

    monkeypatch.setattr(GraphRunner, "_capture", fail)
    with workers(1) as (other,):
        runner._addresses = meanwhile
        assert_equal_lists(grow(first, LENGTHS[0]), wanted[LENGTHS[0]])
    assert recordings and not runner.enable_graphs
    assert_equal_lists(found[0], wanted[LENGTHS[1]])


# --- what is made once for all threads -------------------------------------------------------------


class CompilingEngine:
    """An engine that makes runners, in the middle of which something else happens."""

    def __init__(self, meanwhile=lambda: None):
        self.meanwhile, self.compiled = meanwhile, []

    def draft_runner(self, draft):
        self.meanwhile()
        self.compiled.append(object())
        return self.compiled[-1]


def test_a_runner_is_compiled_once(monkeypatch):
    """A thread that needs it meanwhile gets the same one; for another engine or draft nobody waits."""
    draft, waits = make_draft(), []
    another_draft = make_draft()

    def meanwhile():
        engine.meanwhile = lambda: None
        assert other(runner_for, draft, free) is free.compiled[0]
        assert other(runner_for, another_draft, engine) is engine.compiled[0]
        assert not other(runners._prepared[draft][engine].lock.acquire, False)
        waits.append(other.start(runner_for, draft, engine))

    engine, free = CompilingEngine(meanwhile), CompilingEngine()
    with workers(1) as (other,):
        made = runner_for(draft, engine)
        assert waits[0]() is made
    assert len(engine.compiled) == 2 and len(free.compiled) == 1


def test_a_compilation_that_fails_is_tried_again_by_the_next_thread():
    def fail():
        raise RuntimeError("half-way")

    draft, engine = make_draft(), CompilingEngine(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        runner_for(draft, engine)
    engine.meanwhile = lambda: None
    with workers(1) as (other,):
        assert other(runner_for, draft, engine) is engine.compiled[0]


def test_one_graph_runner_for_all_threads(monkeypatch):
    init, waits, draft = GraphRunner.__init__, [], make_draft()

    def meanwhile(self, of):
        init(self, of)
        if not waits:
            waits.append(other.start(graph_runner_for, draft))

    monkeypatch.setattr(GraphRunner, "__init__", meanwhile)
    with workers(1) as (other,):
        runner = graph_runner_for(draft)
        assert waits[0]() is runner


def test_a_draft_is_attached_once(monkeypatch):
    attach, waits, attached = DovetailDraft.attach, [], []
    target, draft = tiny_target("llama"), DovetailDraft(make_draft().config)

    def meanwhile(self, to):
        attached.append(self.is_attached)
        if not waits:
            assert not other(draft.__dict__["_attaching"].acquire, False)
            waits.append(other.start(draft.ensure_attached, target))
        attach(self, to)

    monkeypatch.setattr(DovetailDraft, "attach", meanwhile)
    with workers(1) as (other,):
        draft.ensure_attached(target)
        waits[0]()
    assert attached == [False] and draft.is_attached


@pytest.mark.parametrize("kind", ["dovetail", "lookup"])
def test_drafts_are_copied_and_pickled_after_use(kind):
    """Without the lock."""
    target = tiny_target("llama")
    draft = make_draft() if kind == "dovetail" else PromptLookupDraft(shortest=1)
    draft.budget = BUDGETS[0]
    draft.ensure_attached(target)
    for copied in (copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        ids = prompt().repeat(1, 2)
        plain = target.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(plain, target.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=copied))
