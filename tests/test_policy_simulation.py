"""The policy in the simulated world of `support/simulation.py`, against the best static budget of each text."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.scenarios import SCENARIOS, very_good
from support.simulation import (
    COMPUTERS,
    KINDS,
    Pair,
    best_static_rate,
    planner_on,
    play,
    rate,
    static_tokens,
)

from dovetail_plugin.policy.settings import PolicySettings

SETTINGS = PolicySettings()


def test_the_table_of_static_budgets_is_what_rounds_give():
    """The simulation checked against itself: tokens from the table, and from trees grown for each budget."""

    class All:
        def __init__(self, budget):
            self.budget = budget

        def width(self, scores):
            return self.budget.top_k

        def rows(self, scores):
            return self.budget.nodes

    pair = Pair()
    for budget, gains in static_tokens(pair, 0, 60).items():
        for position in range(60):
            tree, path = pair.round(position, budget, All(budget))
            assert (len(tree), len(path)) == (min(budget.nodes, len(tree)), gains[position])
            assert tree.parents[path[1:]].tolist() == path[:-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("draft", ["good", "very good"])
def test_a_good_draft_is_used_as_well_as_the_best_budget(computer, draft, kind, tmp_path):
    """On average over three texts: on a single one, luck decides a hundredth."""
    computer, shares = COMPUTERS[computer], []
    for text in range(1, 4):
        pair = Pair(greedy=kind == "greedy", seed=text)
        if draft == "very good":
            pair = very_good(pair)
        best = best_static_rate(pair, computer, 0, 2000)
        assert best > 1.1 * computer.plain_rate()  # or there is nothing to find
        played = play(planner_on(computer, tmp_path / str(text), KINDS[kind]), pair, {0: computer}, 2000)
        shares.append(rate(played) / best)
    assert np.mean(shares) >= 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_row_counts_change_seldom_where_that_costs(kind, tmp_path):
    """Where another number of rows costs a tenth of a pass, the policy is at least as good as the best fixed one."""
    pair = Pair(greedy=kind == "greedy")
    computer = replace(COMPUTERS["rows cost a little"], switch=0.1)
    planner = planner_on(computer, tmp_path, KINDS[kind])
    played = play(planner, pair, {0: computer}, 2000)
    assert planner.cost.row_change == pytest.approx(math.log(1.1), abs=0.03)
    free = replace(computer, switch=0.0)
    freely = play(planner_on(free, tmp_path / "free", KINDS[kind]), pair, {0: free}, 2000)
    seldom, often = (np.mean(np.diff([one.nodes for one in p if one.position >= 500]) != 0) for p in (played, freely))
    assert seldom < 0.5 * often
    assert rate(played) >= 0.97 * best_static_rate(pair, computer, 0, 2000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_a_useless_draft_costs_little(computer, kind, tmp_path):
    computer = COMPUTERS[computer]
    played = play(planner_on(computer, tmp_path, KINDS[kind]), Pair(quality=((0, 0.0),)), {0: computer}, 500)
    assert rate(played) >= 0.95 * computer.plain_rate()
    rests = [one.rest for one in played if one.drafted and one.rest]
    assert rests == [SETTINGS.first_rest * 2**i for i in range(len(rests))] and len(rests) >= 3
    first = next(i for i, one in enumerate(played) if not one.drafted)
    assert first >= SETTINGS.first_trial
    assert not any(one.drafted for one in played[first : first + SETTINGS.first_rest])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_a_draft_that_becomes_good_is_found_again(computer, kind, tmp_path):
    """Useless for 300 tokens: after a thousand good ones nearly all rounds are drafted, but for an unlucky text."""
    computer, found = COMPUTERS[computer], 0
    for text in range(1, 6):
        pair = Pair(quality=((0, 0.0), (300, 0.95)), greedy=kind == "greedy", seed=text)
        played = play(planner_on(computer, tmp_path / str(text), KINDS[kind]), pair, {0: computer}, 1600)
        assert not all(one.drafted for one in played if one.position < 300)
        late = [one.drafted for one in played if one.position >= 1300]
        found += sum(late) >= 0.9 * len(late)
    assert found >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computer", COMPUTERS)
def test_passes_that_become_slower_are_followed(computer, kind, tmp_path):
    pair, before = Pair(greedy=kind == "greedy"), COMPUTERS[computer]
    after = before.slower(2.0)
    played = play(planner_on(before, tmp_path, KINDS[kind]), pair, {0: before, 1000: after}, 2000)
    assert rate(played, 1000) >= 0.95 * best_static_rate(pair, after, 1000, 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stepped_kernel_is_learned_from_two_row_counts(kind, tmp_path):
    """A slow target leaves time to measure two counts, and the line between them is wrong by half."""
    assert SCENARIOS["a stepped kernel, 1 and 8 rows probed"].share(kind, 1, tmp_path) >= 0.97


@pytest.mark.parametrize(
    "scenario",
    ["no bf16 units, a very good draft, 1 and 8 rows probed", "a mixture of experts, a very good draft"],
)
def test_a_path_is_found_behind_rows_that_do_not_pay_alone(scenario, tmp_path):
    """Chains of 4 and 9 tokens are best, and after the second row the next one alone is not worth its seconds."""
    shares = [SCENARIOS[scenario].share("greedy", text, tmp_path / str(text)) for text in (1, 2)]
    assert np.mean(shares) >= 0.97
