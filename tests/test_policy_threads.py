"""One policy in several threads: nobody waits for another's measurement, and nothing shared changes under a reader."""

import copy
import pickle
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from support.simulation import COMPUTERS, PROMPT, Pair, play
from support.workers import workers

from dovetail_plugin import DraftTree, TreeBudget, machine
from dovetail_plugin.policy import tree_rule
from dovetail_plugin.policy.acceptance import AcceptanceCurve, prior
from dovetail_plugin.policy.device_split import LIMITS, DeviceSplitPolicy
from dovetail_plugin.policy.planner import PLAIN
from dovetail_plugin.policy.settings import PolicySettings
from dovetail_plugin.policy.tree_rule import Lookahead
from dovetail_plugin.report import Round

COMPUTER = COMPUTERS["passes cost, rows hardly do"]
MEASURED = COMPUTER.measurements()
SETTINGS = PolicySettings()
SECONDS = {"draft": 0.0, "transfer": 0.0, "verify": 0.1, "accept": 0.0, "other": 0.0}


@pytest.fixture
def policy(tmp_path):
    return DeviceSplitPolicy(vram_budget=0, measured_in=tmp_path)


def planner(policy, key="a"):
    return policy.planner(key, temperature=0.0)


def refuse(_settings):
    raise AssertionError("measured twice")


def test_rounds_are_plain_while_another_thread_measures(policy):
    """They neither wait nor fail, teach nothing, and draft as soon as the measurements are there."""
    second, rounds = planner(policy), []

    def measure(_settings):
        def meanwhile():
            assert second.prepare(refuse) is None
            plan = second.plan(PROMPT, LIMITS)
            assert (plan.budget, plan.judge) == (PLAIN, None)
            rounds.append(Round(1, 1, context=PROMPT, seconds=SECONDS))
            assert second.forecast(plan, 1, PROMPT) is None
            second.observe(rounds[0], DraftTree.root(3), [0], None)

        other(meanwhile)
        return MEASURED

    with workers(1) as (other,):
        assert planner(policy).prepare(measure) == MEASURED
    assert len(rounds) == 1
    plan = second.plan(PROMPT, LIMITS)
    assert plan.budget == LIMITS and plan.judge is not None
    assert second.forecast(plan, 8, PROMPT).verify_s > 0.0
    assert planner(policy).prepare(refuse) == MEASURED


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_measurement_that_fails_leaves_the_next_generation_to_measure(policy, error):
    def fail(_settings):
        raise error("half-way")

    with pytest.raises(error, match="half-way"):
        planner(policy).prepare(fail)
    with workers(1) as (other,):
        assert other(planner(policy).prepare, lambda _: MEASURED) == MEASURED


def test_another_pair_is_measured_meanwhile(policy):
    """Nothing that the two need is held while one of them measures."""
    with workers(1) as (other,):

        def measure(_settings):
            assert other(planner(policy, "b").prepare, lambda _: MEASURED) == MEASURED
            return MEASURED

        planner(policy, "a").prepare(measure)
    assert policy.costs.keys() == {"a", "b"}


@pytest.mark.parametrize("begins", ["before", "meanwhile", "never"])
def test_disturbed_measurements_are_not_stored(policy, tmp_path, begins):
    """They serve this policy; a later process, which may have the machine for itself, measures again."""
    with workers(1) as (other,), machine.thread_count(None), ExitStack() as stack:

        def generate():
            other(stack.enter_context, machine.thread_count(None))

        def measure(_settings):
            if begins == "meanwhile":
                generate()
                other(stack.close)
            return MEASURED

        if begins == "before":
            generate()
        assert planner(policy).prepare(measure) == MEASURED
        other(stack.close)
    assert len(list(tmp_path.iterdir())) == (1 if begins == "never" else 0)
    assert planner(policy).prepare(refuse) == MEASURED


def test_threads_learn_into_one_policy_at_once(policy):
    """Rounds of four generations in whatever order: every plan is within its bound, and all rounds count."""
    ready = threading.Barrier(4)
    planner(policy).prepare(lambda _: MEASURED)

    def generate():
        own = planner(policy)
        own.prepare(refuse)
        ready.wait(timeout=60)
        return [each.drafted for each in play(own, Pair(), {0: COMPUTER}, 60)]

    with workers(4) as threads:
        waits = [worker.start(generate) for worker in threads]
        drafted = [wait() for wait in waits]
    assert all(len(rounds) >= 1 for rounds in drafted) and any(map(any, drafted))
    (switch,) = policy.switches.values()
    assert np.isfinite(switch.rate()) and switch.rate() > 0.0


# --- what trees of other threads read while it changes ---------------------------------------------


def curve():
    return AcceptanceCurve(prior(None, 0.0, SETTINGS), SETTINGS)


def seen(share):
    return np.ones(1), np.log([[share, share / 2]])


def once(function):
    """A function that runs `function` at its first call only."""
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 1:
            function()

    return run


def test_children_seen_during_a_refresh_count_in_the_next(monkeypatch):
    lookahead, concatenate = Lookahead(SETTINGS), np.concatenate
    lookahead.observe(*seen(0.5))
    with workers(1) as (other,):
        grow = once(lambda: other(lookahead.observe, *seen(0.9)))

        def joined(*args):
            grow()
            return concatenate(*args)

        with monkeypatch.context() as patch:
            patch.setattr(tree_rule.np, "concatenate", joined)
            lookahead.refresh(curve())
    wanted = Lookahead(SETTINGS)
    for share in (0.5, 0.9):
        wanted.observe(*seen(share))
        wanted.refresh(curve())
    lookahead.refresh(curve())
    prices = np.full(2, 0.01)
    assert lookahead.gains(np.ones(1), prices) == wanted.gains(np.ones(1), prices)


def test_gains_are_of_one_state(monkeypatch):
    """A refresh between the two reads of one call changes nothing for it."""
    lookahead, empty = Lookahead(SETTINGS), np.empty
    likely, prices = np.array([0.9, 0.5]), np.full(4, 0.05)
    before = lookahead.gains(likely, prices)
    for _ in range(200):
        lookahead.observe(*seen(0.99))
    with workers(1) as (other,):
        change = once(lambda: other(lookahead.refresh, curve()))

        def allocated(*args):
            change()
            return empty(*args)

        with monkeypatch.context() as patch:
            patch.setattr(tree_rule.np, "empty", allocated)
            assert np.array_equal(lookahead.gains(likely, prices), before)
    assert not np.array_equal(lookahead.gains(likely, prices), before)


def test_a_copy_of_a_policy_starts_anew(policy):
    """As evaluation tools copy a draft for every request: settings go along, measurements stay."""
    policy.limits = TreeBudget(5, 2, 2)
    planner(policy).prepare(lambda _: MEASURED)
    assert policy.costs
    for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert not copied.costs and not copied.switches and copied.limits == policy.limits
        assert planner(copied).prepare(lambda _: MEASURED) == MEASURED
        assert planner(copied).plan(PROMPT, TreeBudget(5, 2, 2)).judge is not None
