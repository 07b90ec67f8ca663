"""Seconds by row count: interpolation, what rounds teach, and isotonic regression against its formula."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_plugin.policy.curve import Curve, rising
from dovetail_plugin.policy.settings import PolicySettings

LARGEST_ERROR = math.log(PolicySettings().largest_error)


def curve_of(measured):
    return Curve(measured, PolicySettings())


def at(curve, count):
    return curve(np.array([count])).item()


def learn(curve, seconds, rounds=1):
    """Show the curve rounds of these seconds by count, with bounded errors."""
    for _ in range(rounds):
        for count, seen_s in seconds.items():
            error = math.log(seen_s / at(curve, count))
            curve.observe(count, min(max(error, -LARGEST_ERROR), LARGEST_ERROR))


def test_curve_is_straight_between_counts_and_beyond_them():
    curve = curve_of({8: 0.5, 1: 0.1, 4: 0.3})
    expected = [0.1, 0.1 + 0.2 / 3, 0.3, 0.4, 0.5, 0.5 + 12 * 0.05]  # beyond: the slope of the last two
    assert curve(np.array([1, 2, 4, 6, 8, 20])).tolist() == pytest.approx(expected)


def test_curve_of_one_count_is_flat():
    assert curve_of({4: 0.2})(np.array([1, 4, 50])).tolist() == pytest.approx([0.2, 0.2, 0.2])


def test_curve_never_falls_where_measurements_do():
    """Two counts whose order is reversed by noise get their mean."""
    curve = curve_of({1: 0.1, 2: 0.3, 4: 0.2, 8: 0.4})
    assert curve(np.array([1, 2, 4, 8])).tolist() == pytest.approx([0.1, 0.25, 0.25, 0.4])


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
    st.lists(st.tuples(st.integers(1, 80), st.floats(-LARGEST_ERROR, LARGEST_ERROR)), max_size=60),
)
def test_curves_stay_positive_and_rising(measured, errors):
    curve = curve_of(measured)
    for count, error in errors:
        curve.observe(count, error)
    seconds = curve(np.arange(1, 81))
    assert (seconds > 0).all() and (np.diff(seconds) >= -1e-12 * seconds[:-1]).all()


def test_an_error_counts_most_at_its_count():
    """All other measured counts take the same smaller share, for the machine as a whole."""
    curve, measured = curve_of({1: 1.0, 8: 2.0, 16: 3.0, 32: 4.0}), {1: 1.0, 16: 3.0, 32: 4.0}
    curve.observe(8, 0.4)
    others = [at(curve, count) / seconds for count, seconds in measured.items()]
    assert others == pytest.approx([others[0]] * 3)
    assert 1.0 < others[0] < at(curve, 8) / 2.0 < math.exp(0.4)


STEP = {1: 0.18, 2: 0.38, 3: 0.55, 4: 0.56, 5: 0.57, 6: 0.58, 7: 0.59, 8: 0.60, 12: 0.70, 16: 0.80}
"""Seconds of passes of a float32 target on an old CPU, whose kernel for one row differs from that for three."""


@pytest.mark.parametrize("order", [(3, 5, 8, 4, 6), (8, 6, 5, 4, 3)], ids=str)
def test_counts_that_were_not_measured_are_learned_from_their_first_rounds(order):
    """A slow target leaves time to measure two counts, and the line between them is wrong by half."""
    curve = curve_of({1: STEP[1], 8: STEP[8]})
    assert at(curve, 3) < 0.6 * STEP[3]
    learn(curve, {count: STEP[count] for count in order}, rounds=3)
    for count in (3, 4, 5, 6, 7, 8):  # 7 was never seen
        assert at(curve, count) == pytest.approx(STEP[count], rel=0.13)


def test_one_round_corrects_its_neighbors_that_were_never_seen_in_proportion():
    curve, measured = curve_of({1: 1.0, 8: 2.0}), np.interp(np.arange(1, 9), [1, 8], [1.0, 2.0])
    curve.observe(3, 0.3)
    moved = np.log(curve(np.arange(1, 9)) / measured)
    assert moved[2] == pytest.approx(0.3)
    assert (np.diff(moved[:3]) > 0).all() and (np.diff(moved[2:]) < 0).all()
    assert moved[0] == pytest.approx(moved[7])  # measured: the share of the machine as a whole


def test_measured_counts_are_believed_more_than_lines_between_them():
    curve = curve_of({1: 1.0, 8: 2.0})
    moved = []
    for count in (8, 3):
        before = at(curve, count)
        curve.observe(count, 0.3)
        moved.append(math.log(at(curve, count) / before))
    assert 0 < 1.2 * moved[0] < moved[1] <= 0.3 + 1e-9


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_machine_that_changes_changes_all_counts(factor):
    """After some rounds of one count, the others are believed to have changed nearly as much."""
    measured = {1: 1.0, 4: 1.2, 16: 2.0}
    curve = curve_of(measured)
    learn(curve, {4: factor * 1.2}, rounds=30)
    assert at(curve, 4) == pytest.approx(factor * 1.2, rel=0.03)
    for count in (1, 16):
        assert math.log(at(curve, count) / measured[count]) / math.log(factor) > 0.55


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_curves_never_fall_whatever_is_learned(factor):
    """Only one count is ever seen. The others follow, or more rows would seem cheaper than fewer."""
    curve = curve_of({1: 1.0, 4: 1.05, 8: 1.1})
    learn(curve, {4: factor * 1.05}, rounds=40)
    assert at(curve, 4) == pytest.approx(factor * 1.05, rel=0.01)
    seconds = curve(np.arange(1, 65))
    assert (seconds > 0).all() and (np.diff(seconds) >= -1e-12).all()
