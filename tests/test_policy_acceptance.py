"""Acceptance of a node: priors, and what is learned from accepted and rejected nodes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_plugin.drafts.config import BINS, CENTERS, EDGES
from dovetail_plugin.policy.acceptance import AcceptanceCurve, prior
from dovetail_plugin.policy.settings import PolicySettings

GREEDY, SAMPLING = prior(None, 0.0), prior(None, 1.0)


def curve_from(start):
    return AcceptanceCurve(start, PolicySettings())


def simulate(curve, truth, rounds, rng, nodes=12):
    """Rounds whose nodes fall on all bins alike, accepted with probability truth(their draft probability)."""
    for _ in range(rounds):
        drafted = CENTERS[rng.integers(0, BINS, nodes)]
        curve.observe(np.log(drafted), rng.random(nodes) < truth(drafted))


@pytest.mark.parametrize("start", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_acceptance_starts_at_its_prior(start):
    curve = curve_from(start)
    np.testing.assert_allclose(curve(np.log(CENTERS)), start)
    assert curve(np.array([-1e9])).item() == 0.0
    assert curve(np.array([0.0])).item() == pytest.approx(start[-1])
    assert curve(np.log(CENTERS).reshape(2, -1)).shape == (2, BINS // 2)


@pytest.mark.parametrize(
    "truth", [lambda p: 0.5 * p, lambda p: p**0.4, lambda p: 0.0 * p], ids=["half", "high", "none"]
)
@pytest.mark.parametrize("start", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_acceptance_follows_what_is_accepted(truth, start):
    curve = curve_from(start)
    simulate(curve, truth, 600, np.random.default_rng(3))
    np.testing.assert_allclose(curve(np.log(CENTERS)), truth(CENTERS), atol=0.1)


def test_acceptance_forgets():
    """A text on which nothing is accepted any more outweighs one on which all was."""
    curve = curve_from(SAMPLING)
    rng = np.random.default_rng(4)
    simulate(curve, lambda p: 1.0 + p, 400, rng)
    assert (curve(np.log(CENTERS)) > 0.85).all()
    simulate(curve, lambda p: 0.0 * p, 900, rng)
    assert (curve(np.log(CENTERS)) < 0.1).all()


def test_acceptance_fades_towards_its_prior():
    """Little is left of what a text that is long ago brought: a few nodes turn it."""
    curve, at = curve_from(SAMPLING), np.log(CENTERS)
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
    curve = curve_from(SAMPLING)
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
    curve = curve_from(prior(None, temperature))
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
