"""The constants of the policy, each with its reason. Pass other values as `DeviceSplitPolicy(settings=...)`.

Where a reason names the simulation, it is `benchmarks/policy_simulation.py`, which compares the tokens per second of
the policy with those of the best static budget.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicySettings:
    """Constants of the policy. The docstring of each field gives its reason."""

    # --- seconds -------------------------------------------------------------------------------

    follow: float = 0.2
    """Share of a round's error that is attributed to the machine as a whole. The model then adapts to a lasting change
    of the machine within ten rounds, and a round that is off by 20 % moves an average by 4 %."""

    rounds_of_count: int = 16
    """Number of rounds over which the rest of the error is averaged for one row count. A probe counts as much."""

    row_change_follow: float = 0.1
    """Share of a round's error that is attributed to a change of the row count, or to its absence."""

    largest_error: float = 1.5
    """Largest factor by which a round counts as slower or faster than its forecast. One slow round is not evidence."""

    slowest: float = 3.0
    """The same limit for whole rounds and for phases other than draft and verification, whose forecasts are less
    accurate."""

    usual_gain: float = 1.7
    """Assumed tokens per second of drafted rounds, relative to plain rounds, before the first drafted round."""

    # --- acceptance ----------------------------------------------------------------------------

    acceptance_prior_weight: float = 6.0
    """Weight of a bin's prior, as a number of observed nodes."""

    acceptance_memory: float = 0.995
    """Factor on the weight of earlier rounds. About 200 rounds count, which is a topic of a text, not a sentence."""

    acceptance_after_rest: float = 0.2
    """Factor on the weight of all observations when drafting rests. Without it the next trial would verify nothing and
    learn nothing."""

    greedy_exponent: float = 1.8
    """Without a calibration, a greedy target is assumed to accept a node of probability p with probability
    1 - (1 - p) ** 1.8, because it takes likely tokens more often than the draft says. Fitted to the bundled pair."""

    sampling_share: float = 0.9
    """Without a calibration, a sampling target is assumed to accept a node with this share of its probability, because
    drafts have errors."""

    refit_from: int = 16
    """Number of first rounds after each of which the acceptance curve is fitted."""

    refit_every: int = 4
    """Number of rounds between later fits, and between updates of the lookahead. Fitting after every round takes time,
    and in the simulation it lowers the rate by 1 %, because the rule reacts to single misses."""

    children: int = 128
    """Number of nodes whose children are remembered, which is about ten to twenty rounds."""

    least_parent: float = 0.02
    """Least acceptance of a node whose children are remembered. For less likely nodes they are mostly noise."""

    # --- trials and rests ----------------------------------------------------------------------

    rate_memory: float = 0.96
    """Factor on the weight of earlier rounds in the running rate, so that about 25 rounds count."""

    first_trial: int = 4
    """Number of drafted rounds before drafting may rest for the first time."""

    trial: int = 2
    """Number of drafted rounds of a later trial. In the simulation a useless draft then costs 2 % of plain decoding."""

    long_trial: int = 8
    """Number of drafted rounds of a trial in which a drafted token was accepted. A good draft can start badly."""

    estimated_rounds: int = 16
    """Number of drafted rounds after a rest in which expected tokens count besides emitted ones, because a few rounds
    are not enough to compare rates."""

    first_rest: int = 16
    """Number of plain rounds of the first rest. Each further rest is twice as long."""

    longest_rest: int = 2048
    """Number of plain rounds of the longest rest. It limits how late the policy notices that a text became easy."""

    # --- the probe -----------------------------------------------------------------------------

    probe_nodes: tuple[int, ...] = (1, 8, 4, 16, 2, 32)
    """Row counts of the timed passes, followed by that of the largest tree. They are timed in this order until the time
    is up, the first two in any case."""

    probe_widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Row counts of the timed draft levels, up to `top_k` of the largest tree."""

    probe_limit_s: float = 5.0
    """Time limit of a probe, in seconds. A probe of a slow target takes as long as its first two passes."""

    probe_repeats: int = 5
    """Number of warm repetitions of a fast pass. The median counts."""

    probe_enough_s: float = 0.25
    """Time in seconds after which a pass is not repeated again, because slow passes vary less."""

    probe_transfer_bytes: int = 1 << 16
    """Size of the timed transfer: the features of four rows of 8192 16-bit numbers, which a typical round of an 8B
    target sends. At this size latency matters, not bandwidth."""

    thread_turns: int = 2
    """Number of times that each number of threads is tried, because another process may slow down one turn."""

    thread_turn_s: float = 1.0
    """Duration of a turn, in seconds, above which there is no second turn."""

    thread_gain: float = 1.05
    """Factor by which another number of threads must be faster than the current one."""
