"""Seconds of a round: what is forecast from measurements, and what rounds teach."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_plugin.policy.cost import CostModel, Forecast, Shape
from dovetail_plugin.policy.measurements import Measurements
from dovetail_plugin.report import Round

MEASURED = Measurements(
    verify_s={1: 0.10, 2: 0.102, 4: 0.106, 8: 0.114, 16: 0.13, 32: 0.18, 48: 0.24},
    level_s={1: 0.003, 2: 0.0032, 4: 0.0036, 8: 0.0044},
    draft_s=0.005,
    transfer_s=0.0002,
    context=100,
)
SHAPE = Shape(parameters=1_000_000, kv_numbers=200, query_numbers=400)


# --- following the machine -------------------------------------------------------------------------


def pass_s(model, nodes, context=100):
    """Seconds of a pass after one over as many rows."""
    return model.verify_table(context, nodes)[-1]


def observe(model, verify_s, *, nodes, context=100, tokens=1, drafted=False, draft_s=0.0, **others):
    """Show the model one round of these seconds."""
    widths = (4, 4) if drafted else None
    expected = model.forecast(widths, nodes, context, tokens)
    seconds = dict.fromkeys(("transfer", "accept", "other"), 0.0) | {"verify": verify_s, "draft": draft_s}
    seconds |= {name.removesuffix("_s"): spent for name, spent in others.items()}
    model.observe(Round(nodes, tokens, widths=widths, context=context, seconds=seconds), expected)


@pytest.mark.parametrize("nodes", [1, 6, 8, 32, 40])
@pytest.mark.parametrize("factor", [0.3, 0.9, 1.4, 5.0])
def test_repeated_rounds_teach_the_true_seconds(nodes, factor):
    model = CostModel(MEASURED)
    truth = factor * pass_s(model, nodes, 100)
    for _ in range(60):
        observe(model, truth, nodes=nodes)
    assert pass_s(model, nodes, 100) == pytest.approx(truth, rel=0.01)


def test_seconds_of_every_phase_are_learned():
    model = CostModel(MEASURED)
    for _ in range(80):
        observe(
            model, 0.2, nodes=16, tokens=3, drafted=True, draft_s=0.03, transfer_s=0.004, accept_s=0.006, other_s=0.003
        )
    cost = model.forecast([4, 4], 16, 100, 3)
    assert cost.verify_s == pytest.approx(0.2, rel=0.01)
    assert cost.draft_s == pytest.approx(0.03, rel=0.01)
    assert cost.transfer_s == pytest.approx(0.004, rel=0.01)
    assert cost.accept_s == pytest.approx(0.009, rel=0.01)
    assert cost.total_s == pytest.approx(0.243, rel=0.01)
    assert model.forecast([4, 4], 16, 100, 6).accept_s == pytest.approx(0.018, rel=0.01)


@pytest.mark.parametrize("nodes", [1, 16])
def test_one_slow_round_moves_little(nodes):
    model = CostModel(MEASURED)
    usual = dict(
        draft_s=model.forecast([4, 4], nodes, 100, 2).draft_s, transfer_s=0.0002, accept_s=0.002, other_s=0.001
    )
    for _ in range(10):
        observe(model, MEASURED.verify_s[nodes], nodes=nodes, tokens=2, drafted=True, **usual)
    before = model.forecast([4, 4], nodes, 100, 2)
    slow = {name: 10 * seconds for name, seconds in usual.items()} | {"transfer_s": 1.0}
    observe(model, 10 * MEASURED.verify_s[nodes], nodes=nodes, tokens=2, drafted=True, **slow)
    after = model.forecast([4, 4], nodes, 100, 2)
    assert before.total_s < after.total_s < 1.12 * before.total_s
    for _ in range(15):
        observe(model, MEASURED.verify_s[nodes], nodes=nodes, tokens=2, drafted=True, **usual)
    assert model.forecast([4, 4], nodes, 100, 2).total_s == pytest.approx(before.total_s, rel=0.02)


@pytest.mark.parametrize("nodes", [1, 6, 16, 48])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_changed_for_good_is_followed(nodes, factor):
    model = CostModel(MEASURED)
    verify_s, draft_s = factor * pass_s(model, nodes, 100), factor * model.forecast([4, 4], nodes, 100, 1).draft_s
    for _ in range(15):
        observe(model, verify_s, nodes=nodes, drafted=True, draft_s=draft_s, transfer_s=0.0002)
    expected = model.forecast([4, 4], nodes, 100, 1)
    assert expected.verify_s == pytest.approx(verify_s, rel=0.1)
    assert expected.draft_s == pytest.approx(draft_s, rel=0.1)


def test_plain_rounds_teach_nothing_of_the_draft():
    model = CostModel(MEASURED)
    before = model.forecast([2, 4], 8, 100, 1.0)
    for _ in range(20):
        observe(model, 0.2, nodes=1)
    after = model.forecast([2, 4], 8, 100, 1.0)
    assert (after.draft_s, after.transfer_s) == (before.draft_s, before.transfer_s)
    assert after.verify_s > before.verify_s


@settings(deadline=None)
@given(st.data())
def test_seconds_stay_positive_and_finite(data):
    """Whatever rounds bring, clocks that stand still among them."""
    second = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))
    tables = st.dictionaries(st.integers(1, 48), st.floats(0, 10), min_size=1, max_size=5)
    draft_s, transfer_s = data.draw(st.floats(1e-6, 10)), data.draw(st.floats(0, 1))
    measured = Measurements(data.draw(tables), data.draw(tables), draft_s, transfer_s, 100)
    model = CostModel(measured, data.draw(st.sampled_from([None, SHAPE])))
    for _ in range(data.draw(st.integers(0, 30))):
        spent = {name: data.draw(second) for name in ("draft_s", "transfer_s", "accept_s", "other_s")}
        nodes, tokens = data.draw(st.integers(1, 48)), data.draw(st.integers(1, 10))
        context, drafted = data.draw(st.integers(1, 5000)), data.draw(st.booleans())
        observe(model, data.draw(second), nodes=nodes, context=context, tokens=tokens, drafted=drafted, **spent)
    for context in (1, 100, 3000):
        table = model.verify_table(context, 48)
        assert (table > 0).all() and np.isfinite(table).all()
        assert 0 < model.plain_s(context) < math.inf
        for cost in (model.forecast([1, 8], 30, context, 3.0), model.forecast(None, 1, context, 1.0)):
            assert 0 < cost.verify_s < math.inf
            assert min(cost.draft_s, cost.transfer_s, cost.accept_s) >= 0
    levels = model.level_table(8)
    assert levels[0] == 0 and (levels[1:] > 0).all() and np.isfinite(levels).all()


# --- context ---------------------------------------------------------------------------------------


def test_longer_context_costs_more():
    model = CostModel(MEASURED, SHAPE)
    assert pass_s(model, 8, 100) == pytest.approx(MEASURED.verify_s[8])
    for nodes in (1, 8, 48):
        seconds = [pass_s(model, nodes, context) for context in (1, 100, 500, 4000)]
        assert seconds == sorted(seconds) and len(set(seconds)) == 4
    # A weight is 2 operations for a row, a query number and a cached token are 4: 800 of 1,000,000 weights' worth.
    further_s = MEASURED.verify_s[48] - MEASURED.verify_s[1]
    more_s = [pass_s(model, nodes, 4000) - pass_s(model, nodes, 100) for nodes in (1, 48)]
    assert more_s[1] - more_s[0] == pytest.approx(further_s * 3900 * 8e-4 / (1 + 100 * 8e-4))
    np.testing.assert_allclose(model.verify_table(4000, 20)[[0, 7]], [pass_s(model, n, 4000) for n in (1, 8)])


def test_context_shorter_than_the_probes_costs_what_the_weights_cost():
    model = CostModel(replace(MEASURED, context=10_000), SHAPE)
    assert (np.diff(model.verify_table(0, 48)) > 0).all()
    assert pass_s(model, 1, 0) == pytest.approx(MEASURED.verify_s[1] / (1 + 10_000 * 200 / 1e6))
    assert pass_s(model, 8, 1) < pass_s(model, 8, 10_000) == pytest.approx(MEASURED.verify_s[8])


def test_a_cached_token_costs_what_as_many_weights_cost():
    """One row: memory alone. 200 of a million numbers more are read for each token."""
    flat = Measurements({1: 0.1, 2: 0.1}, {1: 0.001}, 0.001, 0.0, 0)
    assert pass_s(CostModel(flat, SHAPE), 1, 5000) == pytest.approx(0.1 * (1 + 5000 * 200 / 1e6))


def test_context_costs_nothing_of_an_unknown_shape():
    model = CostModel(MEASURED)
    assert pass_s(model, 8, 10_000) == pass_s(model, 8, 1) == pytest.approx(MEASURED.verify_s[8])


def test_passes_behind_a_long_context_are_learned_and_short_ones_again():
    """An error of the context's cost is learned like any other change of the machine, in both directions."""
    model = CostModel(MEASURED, SHAPE)
    for context, truth in ((30_000, 1.8 * pass_s(model, 8, 30_000)), (100, MEASURED.verify_s[8])):
        for _ in range(15):
            observe(model, truth, nodes=8, context=context)
        assert pass_s(model, 8, context) == pytest.approx(truth, rel=0.1)


# --- row counts that change ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [0.0, 0.1, 0.3])
def test_the_cost_of_a_changed_row_count_is_learned_apart_from_the_counts(more):
    """Rounds of an engine that takes longer after another number of rows, on a clock that is off by a twentieth."""
    truth, rng = {1: 1.0, 4: 1.2, 8: 1.5, 16: 2.4}, np.random.default_rng(0)
    model = CostModel(replace(MEASURED, verify_s=truth))
    for count in rng.choice(list(truth), 150):
        changed = count != model.last_nodes
        observe(model, truth[count] * (1.0 + more * changed) * math.exp(rng.normal(0, 0.05)), nodes=int(count))
    assert model.row_change == pytest.approx(math.log1p(more), abs=0.04)
    for count, seconds in truth.items():
        assert pass_s(model, count) == pytest.approx(seconds, rel=0.1)


def test_a_changed_row_count_never_saves_time():
    model = CostModel(MEASURED)
    for nodes in [4, 8] * 20:
        observe(model, 0.7 * pass_s(model, nodes), nodes=nodes)
    assert model.row_change == 0.0


# --- rounds ----------------------------------------------------------------------------------------


def test_round_adds_up_its_phases():
    model = CostModel(MEASURED)
    drafted = model.forecast([2, 4], 8, 100, 2.5)
    assert drafted == Forecast(pytest.approx(0.005 + 0.0032 + 0.0036), 0.0002, pytest.approx(0.114), 0.0, 2.5)
    assert drafted.total_s == pytest.approx(0.005 + 0.0032 + 0.0036 + 0.0002 + 0.114)
    assert model.forecast([], 4, 100, 2.0).draft_s == pytest.approx(0.005)  # one level: only the tree itself
    plain = model.forecast(None, 1, 100, 1.0)
    assert plain == Forecast(0.0, 0.0, pytest.approx(0.1), 0.0, 1.0)
    assert plain.total_s == pytest.approx(model.plain_s(100))


def test_tables_are_what_a_round_costs():
    model = CostModel(MEASURED, SHAPE)
    for _ in range(5):
        observe(model, 0.2, nodes=8, context=300, drafted=True, draft_s=0.05, accept_s=0.01)
    observe(model, 0.3, nodes=6, context=300)
    table, levels = model.verify_table(300, 48), model.level_table(8)
    assert (table.shape, levels.shape, levels[0]) == ((48,), (9,), 0.0)
    changed = model.changed_table(48)
    assert changed[5] == 1.0 < changed[0] == changed[47]  # the last round, after another row count, took longer
    for nodes in (1, 5, 6, 48):
        assert table[nodes - 1] * changed[nodes - 1] == pytest.approx(model.forecast(None, nodes, 300, 1.0).verify_s)
    for rows in (1, 3, 8):
        more = model.forecast([4, rows], 8, 300, 1.0).draft_s - model.forecast([4], 8, 300, 1.0).draft_s
        assert levels[rows] == pytest.approx(more)
