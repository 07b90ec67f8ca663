"""The two models of numbers: seconds of a round, acceptance of a node. Against slow references and invented worlds."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_plugin.drafts.calibration import BINS, CENTERS, EDGES
from dovetail_plugin.policy.acceptance import GREEDY, SAMPLING, AcceptanceCurve, prior
from dovetail_plugin.policy.cost import LARGEST_ERROR, CostModel, RoundCost, Shape
from dovetail_plugin.policy.curve import Curve, rising
from dovetail_plugin.policy.measurements import Measurements

MEASURED = Measurements(
    verify_s={1: 0.10, 2: 0.102, 4: 0.106, 8: 0.114, 16: 0.13, 32: 0.18, 48: 0.24},
    level_s={1: 0.003, 2: 0.0032, 4: 0.0036, 8: 0.0044},
    draft_s=0.005,
    transfer_s={1 << 14: 0.0002, 1 << 20: 0.0011},
    context=100,
)
SHAPE = Shape(parameters=1_000_000, kv_numbers=200, query_numbers=400)


# --- curves ----------------------------------------------------------------------------------------


def test_curve_is_straight_between_counts_and_beyond_them():
    curve = Curve({8: 0.5, 1: 0.1, 4: 0.3})
    assert [curve(count) for count in (1, 4, 8)] == pytest.approx([0.1, 0.3, 0.5])
    assert curve(2) == pytest.approx(0.1 + 0.2 / 3)
    assert curve(6) == pytest.approx(0.4)
    assert curve(20) == pytest.approx(0.5 + 12 * 0.05)  # the slope of the last two
    assert curve.many(np.array([4, 1, 20])).tolist() == pytest.approx([0.3, 0.1, 1.1])
    assert [curve(count) for count in (1, 4, 8)] == pytest.approx([0.1, 0.3, 0.5])


def test_curve_of_one_count_is_flat():
    assert Curve({4: 0.2}).many(np.array([1, 4, 50])).tolist() == [0.2, 0.2, 0.2]


def test_curve_never_falls_where_measurements_do():
    """Two counts whose order noise has turned round get their mean."""
    curve = Curve({1: 0.1, 2: 0.3, 4: 0.2, 8: 0.4})
    assert [curve(count) for count in (1, 2, 4, 8)] == pytest.approx([0.1, 0.25, 0.25, 0.4])


def rising_ref(values, weights):
    """Isotonic regression by its minimax formula: over all stretches that hold i, the highest of the lowest means."""
    count = len(values)

    def mean(first, last):
        return np.average(values[first : last + 1], weights=weights[first : last + 1])

    return [
        max(min(mean(first, last) for last in range(i, count)) for first in range(i + 1))
        for i in range(count)
    ]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 10)), min_size=1, max_size=9))
def test_rising_is_isotonic_regression(pairs):
    values, weights = np.array(pairs).T
    found = rising(values, weights)
    np.testing.assert_allclose(found, rising_ref(values, weights), atol=1e-9)
    assert (np.diff(found) >= 0).all()


@given(
    st.dictionaries(st.integers(1, 48), st.floats(1e-4, 10), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 64), st.floats(-LARGEST_ERROR, LARGEST_ERROR)), max_size=60),
)
def test_curves_stay_positive_and_rising(measured, errors):
    curve = Curve(measured)
    for count, error in errors:
        curve.observe(count, error)
    seconds = curve.many(np.arange(1, 65))
    assert (seconds > 0).all() and (np.diff(seconds) >= -1e-12 * seconds[:-1]).all()
    np.testing.assert_allclose([curve(count) for count in range(1, 65)], seconds)


def test_an_error_counts_most_at_its_count():
    """A little of it is put down to the machine, which is all counts."""
    curve = Curve({1: 1.0, 8: 2.0, 16: 3.0, 32: 4.0})
    curve.observe(8, 0.4)
    eight, *others = [curve(count) / seconds for count, seconds in ((8, 2.0), (1, 1.0), (16, 3.0), (32, 4.0))]
    assert 1.0 < min(others) <= max(others) < 1.03 < 1.05 < eight < math.exp(0.4)


STEP = {1: 0.18, 2: 0.38, 3: 0.55, 4: 0.56, 5: 0.57, 6: 0.58, 7: 0.59, 8: 0.60, 12: 0.70, 16: 0.80}
"""Seconds of passes as a float32 target on an old CPU takes them: one row is another kernel than three."""


@pytest.mark.parametrize("order", [(3, 5, 8, 4, 6), (8, 6, 5, 4, 3)], ids=str)
def test_counts_that_were_never_measured_are_learnt_from_their_first_rounds(order):
    """A slow target leaves time to measure two counts, and the line between them is wrong by half."""
    curve = Curve({1: STEP[1], 8: STEP[8]})
    assert curve(3) < 0.6 * STEP[3]
    for count in order * 3:
        curve.observe(count, min(math.log(STEP[count] / curve(count)), LARGEST_ERROR))
    for count in (3, 4, 5, 6, 7, 8):  # 7 was not seen either
        assert curve(count) == pytest.approx(STEP[count], rel=0.13)
    assert curve(1) == pytest.approx(STEP[1], rel=0.11)  # which was measured, and is not blamed


def test_measured_counts_are_believed_more_than_lines_between_them():
    curve = Curve({1: 1.0, 8: 2.0})
    moved = []
    for count in (8, 3):
        before = curve(count)
        curve.observe(count, 0.3)
        moved.append(math.log(curve(count) / before))
    assert 0 < 1.2 * moved[0] < moved[1] < 0.3


def test_a_slower_machine_slows_all_counts():
    """After some rounds of one count, the others are believed to have changed as much."""
    curve = Curve({1: 1.0, 4: 1.2, 16: 2.0})
    for _ in range(30):
        curve.observe(4, min(math.log(1.8 / curve(4)), LARGEST_ERROR))
    assert curve(4) == pytest.approx(1.8, rel=0.03)
    assert curve(1) > 1.25 and curve(16) > 2.5


@pytest.mark.parametrize("more", [0.0, 0.1, 0.3])
def test_what_a_switch_costs_is_learnt_apart_from_what_counts_cost(more):
    """Rounds of an engine that takes longer after another number of rows, on a clock that is off by a twentieth."""
    truth, rng = {1: 1.0, 4: 1.2, 8: 1.5, 16: 2.4}, np.random.default_rng(0)
    curve, last = Curve(truth), 0
    for count in rng.choice(list(truth), 150):
        switched = bool(count != last)
        expected = curve(count) * math.exp(curve.switch * switched)
        seen = truth[count] * (1.0 + more * switched) * math.exp(rng.normal(0, 0.05))
        curve.observe(int(count), math.log(seen / expected), switched)
        last = count
    assert curve.switch == pytest.approx(math.log1p(more), abs=0.04)
    for count, seconds in truth.items():
        assert curve(count) == pytest.approx(seconds, rel=0.1)


def test_a_switch_never_saves_time():
    curve = Curve({1: 1.0, 8: 2.0})
    for _ in range(20):
        curve.observe(4, -0.3, switched=True)
    assert curve.switch == 0.0


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_curves_never_fall_whatever_is_learnt(factor):
    """Only one count is ever seen: the others follow, or more rows would seem cheaper than fewer."""
    curve = Curve({1: 1.0, 4: 1.05, 8: 1.1})
    for _ in range(40):
        curve.observe(4, min(max(math.log(factor * 1.05 / curve(4)), -LARGEST_ERROR), LARGEST_ERROR))
    assert curve(4) == pytest.approx(factor * 1.05, rel=0.01)
    seconds = curve.many(np.arange(1, 65))
    assert (seconds > 0).all() and (np.diff(seconds) >= -1e-12).all()


# --- following the machine -------------------------------------------------------------------------


def seconds_of(verify_s, *, draft_s=0.0, transfer_s=0.0, accept_s=0.0, other_s=0.0):
    return {"verify": verify_s, "draft": draft_s, "transfer": transfer_s, "accept": accept_s, "other": other_s}


def observe(model, verify_s, *, nodes, context=100, tokens=1, drafted=False, **others):
    """One round of these seconds."""
    expected = model.round([4, 4] if drafted else None, nodes, context, tokens)
    seconds = seconds_of(verify_s, **others)
    model.observe(expected, seconds, nodes=nodes, context=context, tokens=tokens, drafted=drafted)


@pytest.mark.parametrize("nodes", [1, 6, 8, 32, 40])
@pytest.mark.parametrize("factor", [0.3, 0.9, 1.4, 5.0])
def test_repeated_rounds_teach_the_true_seconds(nodes, factor):
    model = CostModel(MEASURED)
    truth = factor * model.verify_s(nodes, 100)
    for _ in range(60):
        observe(model, truth, nodes=nodes)
    assert model.verify_s(nodes, 100) == pytest.approx(truth, rel=0.01)


def test_seconds_of_every_phase_are_learnt():
    model = CostModel(MEASURED)
    for _ in range(80):
        observe(
            model, 0.2, nodes=16, tokens=3, drafted=True, draft_s=0.03, transfer_s=0.004, accept_s=0.006, other_s=0.003
        )
    cost = model.round([4, 4], 16, 100, 3)
    assert cost.verify_s == pytest.approx(0.2, rel=0.01)
    assert cost.draft_s == pytest.approx(0.03, rel=0.01)
    assert cost.transfer_s == pytest.approx(0.004, rel=0.01)
    assert cost.accept_s == pytest.approx(0.009, rel=0.01)
    assert cost.total_s == pytest.approx(0.243, rel=0.01)
    assert model.round([4, 4], 16, 100, 6).accept_s == pytest.approx(0.018, rel=0.01)
    assert model.rounds == 80


@pytest.mark.parametrize("nodes", [1, 16])
def test_one_slow_round_moves_little(nodes):
    model = CostModel(MEASURED)
    usual = dict(draft_s=model.round([4, 4], nodes, 100, 2).draft_s, transfer_s=0.0002, accept_s=0.002, other_s=0.001)
    for _ in range(10):
        observe(model, MEASURED.verify_s[nodes], nodes=nodes, tokens=2, drafted=True, **usual)
    before = model.round([4, 4], nodes, 100, 2)
    slow = {name: 10 * seconds for name, seconds in usual.items()} | {"transfer_s": 1.0}
    observe(model, 10 * MEASURED.verify_s[nodes], nodes=nodes, tokens=2, drafted=True, **slow)
    after = model.round([4, 4], nodes, 100, 2)
    assert before.total_s < after.total_s < 1.12 * before.total_s
    for _ in range(15):
        observe(model, MEASURED.verify_s[nodes], nodes=nodes, tokens=2, drafted=True, **usual)
    assert model.round([4, 4], nodes, 100, 2).total_s == pytest.approx(before.total_s, rel=0.02)


@pytest.mark.parametrize("nodes", [1, 6, 16, 48])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_changed_for_good_is_followed(nodes, factor):
    model = CostModel(MEASURED)
    verify_s, draft_s = factor * model.verify_s(nodes, 100), factor * model.round([4, 4], nodes, 100, 1).draft_s
    for _ in range(15):
        observe(model, verify_s, nodes=nodes, drafted=True, draft_s=draft_s, transfer_s=0.0002)
    expected = model.round([4, 4], nodes, 100, 1)
    assert expected.verify_s == pytest.approx(verify_s, rel=0.1)
    assert expected.draft_s == pytest.approx(draft_s, rel=0.1)


def test_plain_rounds_teach_nothing_of_the_draft():
    model = CostModel(MEASURED)
    before = model.round([2, 4], 8, 100, 1.0)
    for _ in range(20):
        observe(model, 0.2, nodes=1)
    after = model.round([2, 4], 8, 100, 1.0)
    assert (after.draft_s, after.transfer_s) == (before.draft_s, before.transfer_s)
    assert after.verify_s > before.verify_s


@settings(deadline=None)
@given(st.data())
def test_nothing_learnt_makes_a_second_vanish(data):
    """Whatever rounds bring, clocks that stand still among them: seconds stay positive and finite."""
    second = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))
    tables = st.dictionaries(st.integers(1, 48), st.floats(0, 10), min_size=1, max_size=5)
    measured = Measurements(data.draw(tables), data.draw(tables), data.draw(st.floats(1e-6, 10)), {}, 100)
    model = CostModel(measured, data.draw(st.sampled_from([None, SHAPE])))
    for _ in range(data.draw(st.integers(0, 30))):
        seconds = seconds_of(*data.draw(st.tuples(second))) | {
            name: data.draw(second) for name in ("draft", "transfer", "accept", "other")
        }
        nodes, tokens = data.draw(st.integers(1, 48)), data.draw(st.integers(1, 10))
        context, drafted = data.draw(st.integers(1, 5000)), data.draw(st.booleans())
        expected = model.round([4, 2] if drafted else None, nodes, context, 2.0)
        model.observe(expected, seconds, nodes=nodes, context=context, tokens=tokens, drafted=drafted)
    for context in (1, 100, 3000):
        table = model.verify_table(context, 48)
        assert (table > 0).all() and np.isfinite(table).all()
        assert 0 < model.plain_s(context) < math.inf
        for cost in (model.round([1, 8], 30, context, 3.0), model.round(None, 1, context, 1.0)):
            assert 0 < cost.verify_s < math.inf
            assert min(cost.draft_s, cost.transfer_s, cost.accept_s) >= 0
    levels = model.level_table(8)
    assert levels[0] == 0 and (levels[1:] > 0).all() and np.isfinite(levels).all()


# --- context ---------------------------------------------------------------------------------------


def test_longer_context_costs_more():
    model = CostModel(MEASURED, SHAPE)
    assert model.verify_s(8, 100) == pytest.approx(MEASURED.verify_s[8])
    for nodes in (1, 8, 48):
        seconds = [model.verify_s(nodes, context) for context in (1, 100, 500, 4000)]
        assert seconds == sorted(seconds) and len(set(seconds)) == 4
    # Weights are 2 operations a row, a cached token is 4 for each query number: 800 of 1,000,000 numbers' worth.
    row_s = (MEASURED.verify_s[48] - MEASURED.verify_s[1]) / 47
    more_s = [model.verify_s(nodes, 4000) - model.verify_s(nodes, 100) for nodes in (1, 48)]
    assert more_s[1] - more_s[0] == pytest.approx(47 * 3900 * row_s * 800 / 1e6)
    np.testing.assert_allclose(model.verify_table(4000, 20)[[0, 7]], [model.verify_s(n, 4000) for n in (1, 8)])


def test_shorter_context_than_the_probes_never_costs_nothing():
    model = CostModel(replace(MEASURED, context=10_000), SHAPE)
    assert (model.verify_table(1, 48) > 0).all() and model.verify_s(48, 1) > 0
    assert model.verify_s(8, 1) < model.verify_s(8, 10_000) == pytest.approx(MEASURED.verify_s[8])


def test_a_cached_token_costs_what_as_many_weights_cost():
    """One row: memory alone. 200 of a million numbers more are read for each token."""
    flat = Measurements({1: 0.1, 2: 0.1}, {1: 0.001}, 0.001, {}, 0)
    assert CostModel(flat, SHAPE).verify_s(1, 5000) == pytest.approx(0.1 * (1 + 5000 * 200 / 1e6))


def test_context_costs_nothing_of_an_unknown_shape():
    model = CostModel(MEASURED)
    assert model.verify_s(8, 10_000) == model.verify_s(8, 1) == pytest.approx(MEASURED.verify_s[8])


def test_errors_far_from_the_probe_go_to_the_context():
    """Passes behind much more text than the probe's are slower than told: the passes of short texts are not blamed."""
    model = CostModel(MEASURED, SHAPE)
    short, far = model.verify_s(8, 100), model.verify_s(8, 30_000)
    assert far > 5 * short  # or there is nothing to tell apart
    for _ in range(40):
        observe(model, 1.8 * far, nodes=8, context=30_000)
    assert model.verify_s(8, 30_000) == pytest.approx(1.8 * far, rel=0.05)
    assert short <= model.verify_s(8, 100) < 1.3 * short


def test_errors_at_the_probes_context_are_not_the_contexts():
    model = CostModel(MEASURED, SHAPE)
    added = model.verify_s(8, 4000) - model.verify_s(8, 100)
    for _ in range(40):
        observe(model, 0.3, nodes=8, context=100)
    assert model.verify_s(8, 100) == pytest.approx(0.3, rel=0.01)
    assert model.verify_s(8, 4000) - model.verify_s(8, 100) == pytest.approx(added)


# --- rounds ----------------------------------------------------------------------------------------


def test_round_adds_up_its_phases():
    model = CostModel(MEASURED)
    drafted = model.round([2, 4], 8, 100, 2.5)
    assert drafted == RoundCost(pytest.approx(0.005 + 0.0032 + 0.0036), 0.0002, pytest.approx(0.114), 0.0)
    assert drafted.total_s == pytest.approx(0.005 + 0.0032 + 0.0036 + 0.0002 + 0.114)
    assert model.round([], 4, 100, 2.0).draft_s == pytest.approx(0.005)  # one level: only the tree itself
    plain = model.round(None, 1, 100, 1.0)
    assert plain == RoundCost(0.0, 0.0, pytest.approx(0.1), 0.0)
    assert plain.total_s == pytest.approx(model.plain_s(100))


def test_tables_are_what_a_round_costs():
    model = CostModel(MEASURED, SHAPE)
    for _ in range(5):
        observe(model, 0.2, nodes=8, context=300, drafted=True, draft_s=0.05, accept_s=0.01)
    table, levels = model.verify_table(300, 48), model.level_table(8)
    assert (table.shape, levels.shape, levels[0]) == ((48,), (9,), 0.0)
    switch = model.switch_table(48)
    assert switch[7] == 0.0 < switch[0] == switch[47]  # the first of these rounds was a little longer
    for nodes in (1, 5, 8, 48):
        assert table[nodes - 1] * (1.0 + switch[nodes - 1]) == pytest.approx(
            model.round(None, nodes, 300, 1.0).verify_s
        )
    for rows in (1, 3, 8):
        more = model.round([4, rows], 8, 300, 1.0).draft_s - model.round([4], 8, 300, 1.0).draft_s
        assert levels[rows] == pytest.approx(more)


# --- measurements as stored ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measured",
    [MEASURED, Measurements({1: 0.1}, {1: 0.1}, 0.0, {}, 7, threads=6, processors=(0, 2, 4))],
    ids=["free", "bound"],
)
def test_measurements_survive_json(measured):
    assert Measurements.from_dict(json.loads(json.dumps(measured.as_dict()))) == measured


@pytest.mark.parametrize("name", ["verify_s", "level_s", "draft_s", "transfer_s", "context", "threads", "processors"])
def test_incomplete_measurements(name):
    values = MEASURED.as_dict()
    del values[name]
    with pytest.raises(ValueError, match=name):
        Measurements.from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verify_s", {}),
        ("verify_s", None),
        ("verify_s", [0.1, 0.2]),
        ("verify_s", {"one": 0.1}),
        ("verify_s", {"1": "slow"}),
        ("verify_s", {"1": None}),
        ("verify_s", {"1": float("nan")}),
        ("verify_s", {"1": 0.1, "2": float("inf")}),
        ("verify_s", {"1": -0.1}),
        ("verify_s", {"0": 0.1}),
        ("verify_s", {"-4": 0.1, "1": 0.1}),
        ("level_s", {}),
        ("level_s", {"1": -1e-3}),
        ("level_s", {"0": 0.1}),
        ("transfer_s", {"1024": float("nan")}),
        ("transfer_s", 3),
        ("draft_s", "fast"),
        ("draft_s", None),
        ("draft_s", -1.0),
        ("context", None),
        ("context", float("inf")),
        ("threads", "many"),
        ("threads", 0),
        ("processors", 3),
        ("processors", ["first"]),
    ],
)
def test_measurements_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=r"measurements|invalid literal|could not convert|cannot convert"):
        Measurements.from_dict(MEASURED.as_dict() | {name: value})


@pytest.mark.parametrize("values", [None, [], "measured", 3])
def test_measurements_that_are_no_dictionary(values):
    with pytest.raises(ValueError, match="incomplete measurements"):
        Measurements.from_dict(values)


# --- acceptance ------------------------------------------------------------------------------------


def simulate(curve, truth, rounds, rng, nodes=12):
    """Rounds whose nodes fall on all bins alike, accepted with probability truth(their draft probability)."""
    for _ in range(rounds):
        drafted = CENTERS[rng.integers(0, BINS, nodes)]
        curve.observe(np.log(drafted), rng.random(nodes) < truth(drafted))


@pytest.mark.parametrize("start", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_acceptance_starts_at_its_prior(start):
    curve = AcceptanceCurve(start)
    np.testing.assert_allclose(curve(np.log(CENTERS)), start)
    assert curve(np.array([-1e9])).item() == 0.0
    assert curve(np.array([0.0])).item() == pytest.approx(start[-1])
    assert curve(np.log(CENTERS).reshape(2, -1)).shape == (2, BINS // 2)


@pytest.mark.parametrize(
    "truth", [lambda p: 0.5 * p, lambda p: p**0.4, lambda p: 0.0 * p], ids=["half", "high", "none"]
)
@pytest.mark.parametrize("start", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_acceptance_follows_what_is_accepted(truth, start):
    curve = AcceptanceCurve(start)
    simulate(curve, truth, 600, np.random.default_rng(3))
    np.testing.assert_allclose(curve(np.log(CENTERS)), truth(CENTERS), atol=0.1)


def test_acceptance_forgets():
    """A text on which nothing is accepted any more outweighs one on which all was."""
    curve = AcceptanceCurve(SAMPLING)
    rng = np.random.default_rng(4)
    simulate(curve, lambda p: 1.0 + p, 400, rng)
    assert (curve(np.log(CENTERS)) > 0.85).all()
    simulate(curve, lambda p: 0.0 * p, 900, rng)
    assert (curve(np.log(CENTERS)) < 0.1).all()


def test_acceptance_fades_towards_its_prior():
    """Little is left of what a text that is long ago brought: a few nodes turn it."""
    curve, at = AcceptanceCurve(SAMPLING), np.log(CENTERS)
    simulate(curve, lambda p: 0.0 * p, 100, np.random.default_rng(5))
    before = curve(at)
    curve.fade()
    faded = curve(at)
    assert (faded > before).all() and (faded < SAMPLING).all()
    assert (np.diff(faded) >= 0).all()
    for _ in range(20):
        curve.fade()
    np.testing.assert_allclose(curve(at), SAMPLING, rtol=1e-3)


def test_one_round_changes_acceptance_in_part():
    curve = AcceptanceCurve(SAMPLING)
    at = np.log(np.array([CENTERS[12]]))
    before = curve(at).item()
    curve.observe(at, np.array([True]))
    assert before < curve(at).item() < before + 0.15


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-20, 0), st.booleans()), max_size=12),
        max_size=20,
    ),
    st.floats(0, 2),
)
def test_acceptance_is_a_probability_and_never_falls(rounds, temperature):
    curve = AcceptanceCurve(prior(None, temperature))
    for nodes in rounds:
        scores, accepted = (np.array([node[i] for node in nodes], dtype=kind) for i, kind in ((0, float), (1, bool)))
        curve.observe(scores, accepted)
    likely = curve(np.linspace(-12, 0, 400))
    assert (np.diff(likely) >= 0).all()
    assert (likely >= 0).all() and (likely <= 1).all()


def test_prior_mixes_by_temperature():
    greedy, sampling = np.linspace(0.1, 0.9, BINS), np.linspace(0.0, 0.5, BINS)
    calibration = {"greedy": greedy.tolist(), "sampling": sampling.tolist()}
    np.testing.assert_allclose(prior(calibration, 0.0), greedy)
    np.testing.assert_allclose(prior(calibration, 0.25), 0.75 * greedy + 0.25 * sampling)
    np.testing.assert_allclose(prior(calibration, 1.0), sampling)
    np.testing.assert_allclose(prior(calibration, 1.7), sampling)


def test_prior_without_a_calibration_is_the_rule_of_thumb():
    np.testing.assert_allclose(prior(None, 0.0), GREEDY)
    np.testing.assert_allclose(prior({}, 1.0), SAMPLING)
    np.testing.assert_allclose(prior({"sampling": [0.5] * BINS}, 0.5), 0.5 * GREEDY + 0.25)


def test_bins_fit_together():
    """Every centre lies in its own bin, and the rules of thumb are rising probabilities."""
    assert np.searchsorted(EDGES, CENTERS).tolist() == list(range(BINS))
    for rule in (GREEDY, SAMPLING):
        assert (np.diff(rule) >= 0).all() and rule[0] >= 0 and rule[-1] <= 1
