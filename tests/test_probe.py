"""Measuring the machine: simulated seconds are found again, and the text and the threads stay what they were."""

import io
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import prompt, tiny_target
from tqdm import tqdm
from transformers import DynamicCache

from dovetail_plugin import DovetailDraft, DraftTree, TreeBudget, machine
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.policy import probe
from dovetail_plugin.policy.device_split import LIMITS
from dovetail_plugin.policy.settings import PolicySettings
from dovetail_plugin.report import PhaseClock
from dovetail_plugin.targets.engine import engine_of

SETTINGS = PolicySettings()


# --- simulated seconds ------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when the fakes move it."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class FakeTarget:
    """Scoring takes a base and so much a row; the first pass of a size takes ten times as long."""

    max_length = None

    def __init__(self, clock, base_s=0.010, row_s=0.002, supports_tree=True):
        self.clock, self.base_s, self.row_s, self.supports_tree = clock, base_s, row_s, supports_tree
        self.trees: list[DraftTree] = []
        self.rows = 0  # appended and not dropped

    def seconds(self, nodes):
        return self.base_s + self.row_s * nodes

    def score(self, tree):
        assert self.rows == 0, "rows of the pass before are still there"
        cold = len(tree) not in {len(seen) for seen in self.trees}
        self.trees.append(tree)
        self.rows = len(tree)
        self.clock.now_s += self.seconds(len(tree)) * (10 if cold else 1)

    def keep(self, path):
        assert path == []
        self.rows = 0
        self.clock.now_s += 0.5 * self.base_s  # no part of a pass


class FakeDrafter:
    """A tree takes 4 ms, a further level 1 ms and a tenth for each row of it; catching up takes a second."""

    device = torch.device("cpu")

    def __init__(self, clock):
        self.clock, self.behind, self.grown = clock, True, []

    def catch_up(self):
        self.clock.now_s += 1.0 if self.behind else 0.0
        self.behind = False

    def level_s(self, rows):
        return 0.001 + 0.0001 * rows

    def grow(self, budget, judge=None):
        assert judge is not None
        self.catch_up()
        self.clock.now_s += 0.004
        scores = np.zeros(budget.top_k)
        widths = [judge.width(scores) for _ in range(budget.depth - 1)]
        self.clock.now_s += sum(self.level_s(rows) for rows in widths)
        self.grown.append((budget, widths))
        assert 1 <= judge.rows(scores) <= budget.nodes


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=clock))
    return clock


def measure(target, drafter, *, limits=LIMITS, vary_threads=False, limit_s=5.0):
    settings = replace(SETTINGS, probe_limit_s=limit_s)
    return probe.measure(
        target, drafter, token=5, context=77, limits=limits, vary_threads=vary_threads, settings=settings
    )


def test_simulated_seconds_are_found(clock):
    target, drafter = FakeTarget(clock), FakeDrafter(clock)
    measured = measure(target, drafter, limit_s=60.0)
    assert measured.verify_s == pytest.approx({nodes: target.seconds(nodes) for nodes in (1, 2, 4, 8, 16, 32, 48)})
    assert measured.level_s == pytest.approx({rows: drafter.level_s(rows) for rows in (1, 2, 4, 8)})
    # A tree begins with what was accepted before: a pass over a few rows, like a level.
    assert measured.draft_s == pytest.approx(0.004 + drafter.level_s(4))
    assert measured.transfer_s == 0.0
    assert (measured.context, measured.threads, measured.processors) == (77, None, None)
    assert target.rows == 0


@pytest.mark.parametrize(("terminal", "thread"), [(True, False), (False, False), (True, True)])
def test_the_bar_is_shown_where_somebody_looks(clock, monkeypatch, terminal, thread):
    """At a terminal, and not from a thread, in which servers generate."""
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(probe, "tqdm", lambda **options: tqdm(**options | {"delay": 0, "mininterval": 0}))
    if thread:
        worker = threading.Thread(target=measure, args=(FakeTarget(clock), FakeDrafter(clock)))
        worker.start()
        worker.join()
    else:
        measure(FakeTarget(clock), FakeDrafter(clock))
    assert ("measuring this machine for this pair" in stderr.getvalue()) == (terminal and not thread)


def test_passes_are_over_trees(clock):
    """Some nodes in a line, as deep as trees may be, the others beside them; parents first, depths that fit."""
    target = FakeTarget(clock)
    measure(target, FakeDrafter(clock), limit_s=60.0)
    for tree in target.trees:
        parents, depths = tree.parents.tolist(), tree.depths.tolist()
        assert parents[0] == -1 and depths[0] == 0
        for node, parent in enumerate(parents[1:], start=1):
            assert 0 <= parent < node and depths[node] == depths[parent] + 1
        assert max(depths) == min(len(tree) // 2, LIMITS.depth)
        assert tree.tokens.tolist() == [5] * len(tree) and tree.scores.tolist() == [0.0] * len(tree)
    biggest = max(target.trees, key=len)
    assert len(set(biggest.parents.tolist())) < len(biggest) - 1  # some are siblings


def test_chains_for_a_target_that_takes_no_trees(clock):
    target, drafter = FakeTarget(clock, supports_tree=False), FakeDrafter(clock)
    measured = measure(target, drafter, limits=LIMITS.as_chain(), limit_s=60.0)
    assert measured.verify_s == pytest.approx({nodes: target.seconds(nodes) for nodes in (1, 2, 4, 8, 11)})
    assert measured.level_s == pytest.approx({1: drafter.level_s(1)})
    assert measured.draft_s == pytest.approx(0.004 + drafter.level_s(1))
    for tree in target.trees:
        assert tree.parents.tolist() == list(range(-1, len(tree) - 1))
        assert tree.depths.tolist() == list(range(len(tree)))
    assert all(budget.top_k == 1 and set(widths) <= {1} for budget, widths in drafter.grown)


@pytest.mark.parametrize(("nodes", "counts"), [(20, {1, 2, 4, 8, 16, 20}), (8, {1, 2, 4, 8}), (3, {1, 2, 3})])
def test_no_pass_is_larger_than_the_largest_tree(clock, nodes, counts):
    target = FakeTarget(clock)
    measured = measure(target, FakeDrafter(clock), limits=TreeBudget(nodes, 4, 3), limit_s=60.0)
    assert measured.verify_s.keys() == counts
    assert measured.level_s.keys() == {1, 2}
    assert max(len(tree) for tree in target.trees) == nodes


def test_a_slow_target_is_not_measured_for_long(clock):
    """One row and eight, as often as there is time: more would keep the user waiting for minutes."""
    target, drafter = FakeTarget(clock, base_s=2.0, row_s=0.05), FakeDrafter(clock)
    start_s = clock.now_s
    measured = measure(target, drafter, limit_s=3.0)
    assert measured.verify_s.keys() == {1, 8}
    assert [len(tree) for tree in target.trees] == [1, 8]
    assert measured.level_s.keys() == {1, 2, 4, 8}
    assert len(drafter.grown) == 5  # once for each width, and the tree of one level
    passes_s = 10 * (target.seconds(1) + target.seconds(8)) + 2 * 0.5 * target.base_s
    assert clock.now_s - start_s < passes_s + 1.1


def test_a_fast_target_is_measured_often(clock):
    """Medians over warm passes: a first pass that takes ten times as long is not in them, nor is one slow one."""
    target = FakeTarget(clock, base_s=0.001, row_s=0.0001)
    honest = target.seconds
    target.seconds = lambda nodes: honest(nodes) * (7 if len(target.trees) % 6 == 3 else 1)
    measured = measure(target, FakeDrafter(clock), limit_s=60.0)
    assert measured.verify_s == pytest.approx({nodes: honest(nodes) for nodes in measured.verify_s})
    assert len(target.trees) == 7 * (SETTINGS.probe_repeats + 1)


def test_a_target_of_some_tenths_of_a_second_is_measured_twice_a_size(clock):
    """Once cold and once warm."""
    target = FakeTarget(clock, base_s=0.2, row_s=0.01)
    measured = measure(target, FakeDrafter(clock), limit_s=600.0)
    assert measured.verify_s == pytest.approx({nodes: target.seconds(nodes) for nodes in (1, 2, 4, 8, 16, 32, 48)})
    assert [len(tree) for tree in target.trees] == [1, 1, 8, 8, 4, 4, 16, 16, 2, 2, 32, 32, 48, 48]


def test_rows_of_a_pass_that_fails_are_dropped(clock):
    target = FakeTarget(clock)
    score = target.score

    def fail(tree):
        score(tree)
        if len(tree) == 8:
            raise RuntimeError("out of memory")

    target.score = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(target, FakeDrafter(clock))
    assert target.rows == 0


# --- real passes -----------------------------------------------------------------------------------


def go_on(target, token, count):
    """Greedy tokens after `token`, one pass for each."""
    tokens = [token]
    for _ in range(count - 1):
        output = target.score(DraftTree.root(tokens[-1]))
        target.keep([0])
        tokens.append(int(output.logits[0].argmax()))
    return tokens


@pytest.mark.parametrize("trees", [True, False], ids=["trees", "chains"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding"])
@torch.no_grad()
def test_the_text_is_unchanged(family, trees):
    """After a probe the cache holds the prompt and nothing else, the text goes on and the draft grows the same tree."""
    model = tiny_target("mistral", sliding_window=24) if family == "sliding" else tiny_target(family)
    torch.manual_seed(3)
    draft = DovetailDraft.for_target(model)
    ids = prompt(30)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = DynamicCache(config=model.config)
    with engine_of(model).session(cache, max_nodes=LIMITS.nodes) as target:
        target.supports_tree = trees
        output = target.prefill(ids, None)
        token = int(output.logits.argmax())
        drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=100, clock=PhaseClock())
        drafter.begin(output.features, torch.cat([ids[0], torch.tensor([token])]))
        before = drafter.grow(TreeBudget(12, 4, 4))
        measured = measure(target, drafter, limits=LIMITS if trees else LIMITS.as_chain(), limit_s=0.5)
        assert target.committed == 30
        after = drafter.grow(TreeBudget(12, 4, 4))
        assert after.tokens.tolist() == before.tokens.tolist() and after.parents.tolist() == before.parents.tolist()
        torch.testing.assert_close(after.scores, before.scores)
        assert [*ids[0].tolist(), *go_on(target, token, 30)] == plain[0].tolist()
    assert cache.get_seq_length() == 30 + 29  # the newest token was not run yet
    assert measured.verify_s.keys() >= {1, 8} and measured.level_s.keys() == ({1, 2, 4, 8} if trees else {1})
    assert min(*measured.verify_s.values(), *measured.level_s.values(), measured.draft_s) > 0


def test_threads_are_chosen_by_passes(clock, monkeypatch):
    """Three of four threads are fastest, by the clock: they are in force, and all else is measured with them."""
    monkeypatch.setattr(machine, "numa_nodes", lambda: [[0]])
    target = FakeTarget(clock)
    honest = target.seconds
    target.seconds = lambda nodes: honest(nodes) * {4: 1.0, 3: 0.5, 2: 0.8}[torch.get_num_threads()]
    before = torch.get_num_threads()
    with machine.thread_count(4):
        measured = measure(target, FakeDrafter(clock), vary_threads=True, limit_s=60.0)
        assert torch.get_num_threads() == 3
        assert (measured.threads, measured.processors) == (3, None)
        assert measured.verify_s == pytest.approx({nodes: 0.5 * honest(nodes) for nodes in (1, 2, 4, 8, 16, 32, 48)})
    tried = 3 * SETTINGS.thread_turns
    assert sum(len(tree) == 8 for tree in target.trees) <= tried * (SETTINGS.probe_repeats + 1)  # and not once more
    assert torch.get_num_threads() == before
