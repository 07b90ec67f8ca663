"""Trials and rests of drafting."""

import numpy as np

from dovetail_plugin.policy.acceptance import AcceptanceCurve, prior
from dovetail_plugin.policy.on_off import DraftingSwitch
from dovetail_plugin.policy.settings import PolicySettings

SETTINGS = PolicySettings()


def a_switch():
    return DraftingSwitch(AcceptanceCurve(prior(None, 1.0), SETTINGS), SETTINGS)


def rounds_before_rest(switch: DraftingSwitch, accepted: "list[int]") -> int:
    """Drafted rounds, far slower than plain ones, of so many accepted tokens each, until drafting rests."""
    for number, tokens in enumerate(accepted, start=1):
        switch.count(1.0 + tokens, 1.0, seconds=1.0)
        switch.judge(plain_rate=10.0)
        if switch.rest:
            return number
    return 0


def test_trials_are_short_where_nothing_is_right():
    switch = a_switch()
    for rest, trial in (
        (SETTINGS.first_rest, SETTINGS.first_trial),
        (2 * SETTINGS.first_rest, SETTINGS.trial),
        (4 * SETTINGS.first_rest, SETTINGS.trial),
    ):
        assert rounds_before_rest(switch, [0] * 20) == trial
        assert switch.rest == rest
        switch.rest = 0
    for _ in range(20):
        rounds_before_rest(switch, [0] * 20)
        longest, switch.rest = switch.rest, 0
    assert longest == SETTINGS.longest_rest


def test_trials_are_longer_where_something_is_right():
    switch = a_switch()
    assert rounds_before_rest(switch, [1] + [0] * 20) == SETTINGS.long_trial


def test_a_rest_forgets_most_of_the_acceptance():
    """Or the next trial would verify nothing, and learn nothing."""
    switch, scores = a_switch(), np.log(np.full(30, 0.65))
    for _ in range(SETTINGS.first_trial):
        switch.curve.observe(scores, np.zeros(30, dtype=bool))
    before = switch.curve(scores[:1]).item()
    assert before < 0.1
    rounds_before_rest(switch, [0] * 20)
    assert before < switch.curve(scores[:1]).item() < 0.65 * 0.9
