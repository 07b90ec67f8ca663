"""The rule for one tree, against brute force and with a real drafter."""

import numpy as np
import pytest
import torch
from families import prompt
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dovetail_plugin import TreeBudget
from dovetail_plugin.drafts.config import CENTERS
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.policy.acceptance import AcceptanceCurve, prior
from dovetail_plugin.policy.settings import PolicySettings
from dovetail_plugin.policy.tree_rule import Lookahead, TreeJudge
from dovetail_plugin.report import PhaseClock

SETTINGS = PolicySettings()

scores_lists = st.lists(st.floats(-8, 0), min_size=1, max_size=40).map(np.array)
prices = st.floats(0.1, 1000)


@st.composite
def tables(draw, size, start=0.0):
    """(size,) seconds that never fall."""
    steps = draw(st.lists(st.floats(0, 0.02), min_size=size, max_size=size))
    return start + np.cumsum(steps)


class Learned:
    """An acceptance curve and a lookahead."""

    def __init__(self, curve=None):
        self.curve = curve or AcceptanceCurve(prior(None, 1.0), SETTINGS)
        self.lookahead = Lookahead(SETTINGS)


def learned_from(seed=0):
    """A curve that has seen some rounds."""
    rng, learned = np.random.default_rng(seed), Learned()
    for _ in range(seed % 30):
        scores = -5 * rng.random(10)
        learned.curve.observe(scores, rng.random(10) < np.exp(scores) ** 0.6)
    return learned


def judge_of(budget, price, verify_s, level_s=None, learned=None):
    level_s = np.zeros(budget.top_k + 1) if level_s is None else level_s
    return TreeJudge(budget, price, verify_s, level_s, learned.curve, learned.lookahead)


@settings(deadline=None)
@given(scores_lists, prices, st.integers(2, 30), st.integers(0, 1000), st.data())
def test_rows_are_worth_most(scores, price, nodes, seed, data):
    """Of all numbers of nodes none gives more tokens after the price of its seconds."""
    verify_s, learned = data.draw(tables(nodes, start=0.01)), learned_from(seed)
    judge = judge_of(TreeBudget(nodes, 6, 8), price, verify_s, learned=learned)
    chosen = judge.rows(scores)
    likely = sorted(learned.curve(scores).tolist(), reverse=True)

    def worth(count):
        return 1.0 + sum(likely[: count - 1]) - price * verify_s[count - 1]

    assert 1 <= chosen <= min(nodes, len(scores) + 1)
    assert worth(chosen) == pytest.approx(max(worth(n) for n in range(1, min(nodes, len(scores) + 1) + 1)), abs=1e-9)
    assert judge.expected == pytest.approx(1.0 + sum(likely[: chosen - 1]))


@settings(deadline=None)
@given(scores_lists, prices, st.integers(2, 30), st.floats(0, 0.5), st.data())
def test_rows_are_worth_most_where_a_change_of_the_row_count_costs(scores, price, nodes, share, data):
    """Seconds that are lower at the row count of the pass before than at its neighbors."""
    verify_s, learned = data.draw(tables(nodes, start=0.01)), learned_from(3)
    last = data.draw(st.integers(1, nodes))
    verify_s = verify_s * np.where(np.arange(1, nodes + 1) == last, 1.0, 1.0 + share)
    chosen = judge_of(TreeBudget(nodes, 6, 8), price, verify_s, learned=learned).rows(scores)
    likely = sorted(learned.curve(scores).tolist(), reverse=True)

    def worth(count):
        return sum(likely[: count - 1]) - price * verify_s[count - 1]

    assert worth(chosen) == pytest.approx(max(worth(n) for n in range(1, min(nodes, len(scores) + 1) + 1)), abs=1e-9)


def learned_whose_children_are(share):
    """Every node's only child is accepted that often if the node itself is."""
    learned = Learned(AcceptanceCurve(CENTERS, SETTINGS))
    learned.lookahead.observe(np.ones(200), np.full((200, 1), np.log(share)))
    learned.lookahead.refresh(learned.curve)
    return learned


@settings(deadline=None)
@given(scores_lists, prices, st.integers(2, 30), st.floats(0.05, 1.0), st.floats(0, 0.05), st.data())
def test_a_level_is_drafted_if_the_tree_is_worth_more_with_it(scores, price, nodes, share, level_s, data):
    """One row of one child, which takes the place of another node or makes the pass longer, whatever is cheaper."""
    steps = sorted(data.draw(st.lists(st.floats(0, 0.02), min_size=nodes, max_size=nodes)))
    verify_s, learned = 0.01 + np.cumsum(steps), learned_whose_children_are(share)
    chosen = judge_of(TreeBudget(nodes, 6, 1), price, verify_s, np.array([0.0, level_s]), learned).width(scores)
    likely = learned.curve(scores).tolist()
    child = max(likely) * learned.lookahead.gains(np.ones(1), np.zeros(2))[0]

    def worth(candidates):
        best = sorted(candidates, reverse=True)
        return max(sum(best[:n]) - price * verify_s[n] for n in range(min(len(best), nodes - 1) + 1))

    gain = worth([*likely, child]) - worth(likely) - price * level_s
    assume(abs(gain) > 1e-9)
    assert chosen == int(gain > 0)


@pytest.mark.parametrize(("depth", "nodes", "width"), [(6, 16, 1), (2, 16, 0), (6, 3, 0)])
def test_a_path_pays_that_its_first_level_does_not_pay_for(depth, nodes, width):
    """A child brings 0.8 * 0.9 tokens and costs 0.75; the three below it cost 0.1 each."""
    verify_s = 1.0 + np.concatenate([[0.0, 0.5, 1.25], 1.35 + 0.1 * np.arange(13)])
    judge = judge_of(TreeBudget(nodes, depth, 1), 1.0, verify_s[:nodes], np.array([0.0, 0.04]), learned_of_path(0.9))
    assert judge.width(np.log([0.8])) == width


def learned_of_path(share):
    """As `learned_whose_children_are`, and nothing else was ever seen."""
    learned = learned_whose_children_are(share)
    assert learned.lookahead.path(1)[0] == pytest.approx(share, abs=0.02)
    return learned


@settings(deadline=None)
@given(scores_lists, prices, st.floats(1.01, 20), st.integers(2, 30), st.data())
def test_a_higher_price_of_seconds_never_buys_more(scores, price, factor, nodes, data):
    verify_s = data.draw(tables(nodes, start=0.01))
    level_s = np.concatenate([[0.0], data.draw(tables(8, start=1e-4))])
    budget = TreeBudget(nodes, 6, 8)
    cheap = judge_of(budget, price, verify_s, level_s, learned_from(7))
    dear = judge_of(budget, price * factor, verify_s, level_s, learned_from(7))
    assert dear.width(scores) <= cheap.width(scores)
    assert dear.rows(scores) <= cheap.rows(scores)


@given(scores_lists, prices, st.integers(2, 60))
def test_free_rows_are_all_used(scores, price, nodes):
    judge = judge_of(TreeBudget(nodes, 6, 8), price, np.full(nodes, 0.1), learned=learned_from())
    room = nodes - 1 - len(scores)  # for children
    assert judge.width(scores) >= min(8, len(scores), max((room + 1) // 2, 0))
    assert judge.rows(scores) == min(nodes, len(scores) + 1)


@given(scores_lists)
def test_nothing_is_drafted_that_costs_too_much(scores):
    """A row that takes as long as a plain pass, a level that does: no draft is worth that."""
    judge = judge_of(TreeBudget(16, 6, 8), 10.0, 0.1 * np.arange(1, 17), 0.1 * np.arange(9), learned_from())
    assert judge.width(scores) == 0
    assert (judge.rows(scores), judge.expected) == (1, 1.0)


@pytest.mark.parametrize("price", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("children", [(0.7, 0.2), (0.4, 0.35), (0.9,)], ids=str)
def test_lookahead_expects_what_earlier_children_brought(children, price):
    """Children are accepted that often if their parent is; a further node brings what the price leaves of that."""
    curve, lookahead, rng = AcceptanceCurve(CENTERS, SETTINGS), Lookahead(SETTINGS), np.random.default_rng(2)
    for _ in range(100):
        parents = rng.uniform(0.3, 1.0, 3)
        lookahead.observe(parents, np.log(parents[:, None] * np.array(children)))
        lookahead.refresh(curve)
    likely = np.array([0.2, 0.5, 0.84])
    brought = sum(np.maximum(likely * child - price, 0.0) for child in children)
    np.testing.assert_allclose(lookahead.gains(likely, np.full(6, price)), brought, atol=0.02)
    assert lookahead.gains(np.zeros(1), np.zeros(2)) == 0.0


def test_the_likeliest_child_takes_the_cheapest_place():
    lookahead = learned_whose_children_are(0.5).lookahead
    share = lookahead.gains(np.ones(1), np.zeros(2))[0]
    gains = lookahead.gains(np.array([0.4, 0.8]), np.array([0.1, 0.15, np.inf, np.inf]))
    np.testing.assert_allclose(gains, [0.4 * share - 0.15, 0.8 * share - 0.1])


def drafter_of(draft):
    """A drafter that has read six random features."""
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(torch.randn(6, 32, generator=torch.Generator().manual_seed(2)), prompt(7)[0])
    return drafter


@pytest.mark.parametrize("bound", [TreeBudget(7, 6, 1), TreeBudget(3, 5, 1), TreeBudget(48, 4, 1)], ids=str)
@torch.no_grad()
def test_chains_stay_chains(draft, bound):
    """Under a bound of one child a real drafter's tree is a line, no longer than nodes and depth allow."""
    drafter = drafter_of(draft)
    judge = judge_of(bound, 1e-3, np.full(bound.nodes, 0.1), learned=learned_from())
    tree = drafter.grow(bound, judge)
    assert len(tree) == min(bound.nodes, bound.depth + 1)
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1))
    assert judge.widths == [1] * (min(bound.depth, bound.nodes - 1) - 1)  # no level for which there is no row


@torch.no_grad()
def test_the_drafter_does_what_the_judge_decides(draft):
    drafter = drafter_of(draft)

    class Scripted:
        seen = []

        def width(self, scores):
            self.seen.append(len(scores))
            return [3, 2, 0][len(self.seen) - 1]

        def rows(self, scores):
            self.seen.append(len(scores))
            return 6

    tree = drafter.grow(TreeBudget(20, 8, 5), Scripted())
    assert Scripted.seen == [5, 3 * 5, 2 * 5, 5 + 3 * 5 + 2 * 5]  # candidates of three levels, then all of them
    assert len(tree) == 6 and tree.depths.max() <= 3
