"""The constants of the policy, each with its reason. `DeviceSplitPolicy(settings=...)` takes others.

"Simulation" is `benchmarks/policy_simulation.py`: the rate over that of the best static budget.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicySettings:
    """Constants of the policy; see each field."""

    # --- seconds -------------------------------------------------------------------------------

    follow: float = 0.2
    """Share of a round's error that is put down to the machine as a whole. A machine that changes for good is followed
    within ten rounds, and a clock that is off by 20 % moves an average by 4 %."""

    rounds_of_count: int = 16
    """Rounds that the seconds of one row count are averaged over, after that; a probe counts as much."""

    row_change_follow: float = 0.1
    """Share of a round's error that is put down to a change of the row count, or to its absence."""

    largest_error: float = 1.5
    """A round that is off by a larger factor counts as off by this one: a single slow round is not evidence."""

    slowest: float = 3.0
    """The same for averages of whole rounds and of phases other than draft and verification: they have no forecast
    as good as those two."""

    usual_gain: float = 1.7
    """Rate of drafted rounds over plain ones that is assumed until the first drafted round has been seen."""

    # --- acceptance ----------------------------------------------------------------------------

    acceptance_prior_weight: float = 6.0
    """Observed nodes that the prior of a bin counts as much as."""

    acceptance_memory: float = 0.995
    """Factor on the weight of earlier rounds, so that about 200 rounds count: a topic of a text, not a sentence."""

    acceptance_after_rest: float = 0.2
    """Factor on what was observed when drafting rests. Without it the next trial would verify nothing and learn
    nothing."""

    greedy_exponent: float = 1.8
    """Without a calibration, a greedy target is assumed to accept 1 - (1 - p) ** 1.8 of the nodes of probability p: it
    takes likely tokens more often than the draft says. Fitted to the bundled pair."""

    sampling_share: float = 0.9
    """Without a calibration, a sampling target is assumed to accept this share of p, since drafts have errors."""

    refit_from: int = 16
    """Rounds before which the acceptance curve is fitted after every one."""

    refit_every: int = 4
    """Rounds between later fits, and between updates of what children bring. Fitting after every round costs time,
    and 1 % of the rate in the simulation: the rule would react to single misses."""

    children: int = 128
    """Nodes whose children are remembered: the latest ten or twenty rounds."""

    least_parent: float = 0.02
    """Nodes less likely than this are not remembered, because their children's shares are mostly noise."""

    # --- trials and rests ----------------------------------------------------------------------

    rate_memory: float = 0.96
    """Factor on the weight of earlier rounds in the running rate, so that about 25 rounds count."""

    first_trial: int = 4
    """Drafted rounds before drafting may rest for the first time."""

    trial: int = 2
    """Drafted rounds of a later trial. In the simulation a useless draft costs 2 % of plain decoding."""

    long_trial: int = 8
    """Drafted rounds of a trial in which any drafted token was accepted: a good draft can have an unlucky start."""

    estimated_rounds: int = 16
    """Drafted rounds after a rest in which the expected tokens count beside those that came, because a few rounds are
    too few to compare rates."""

    first_rest: int = 16
    """Plain rounds of the first rest; each further rest is twice as long."""

    longest_rest: int = 2048
    """Plain rounds of the longest rest, after which a text that became easy is noticed again."""

    # --- the probe -----------------------------------------------------------------------------

    probe_nodes: tuple[int, ...] = (1, 8, 4, 16, 2, 32)
    """Row counts of the passes that are timed, in this order until time is up; the first two always. They are followed
    by the largest tree."""

    probe_widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Row counts of the draft levels that are timed, up to `top_k` of the largest tree."""

    probe_limit_s: float = 5.0
    """Seconds that a probe may take. A slower target takes as long as its first passes take."""

    probe_repeats: int = 5
    """Warm repetitions of a quick pass, of which the median counts."""

    probe_enough_s: float = 0.25
    """Seconds after which a pass is not repeated further: slow passes vary less."""

    probe_transfer_bytes: int = 1 << 16
    """Size of the transfer that is timed: features of four accepted rows of 8192 16-bit numbers, which is what a round
    of an 8B target sends. At this size the latency decides, not the bandwidth."""

    thread_turns: int = 2
    """Times that every number of threads is tried: another process may slow down one turn."""

    thread_turn_s: float = 1.0
    """Seconds of a turn above which there is no second one."""

    thread_gain: float = 1.05
    """Factor by which another number of threads must be faster than the one that is set."""
