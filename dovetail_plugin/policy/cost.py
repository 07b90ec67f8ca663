"""The latency model: predicts the seconds of a round from measured seconds.

    round = draft(widths of its levels) + transfer + verify(rows, context) + accept(tokens)

`CostModel` starts from the measurements of a probe and is corrected after every round. Corrections are proportional and
bounded, so one slow round changes little. The seconds of a round that belong to no phase ("other") count as accepting.
The module computes with numbers only: it reads no clock and sees no tensors.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..report import Round
from .curve import Curve
from .measurements import Measurements
from .settings import PolicySettings


@dataclass(frozen=True)
class Shape:
    """Sizes of a target that determine how much a longer context costs.

    Attributes:
        parameters: number of weights read in one pass.
        kv_numbers: number of keys and values of one token, over all layers.
        query_numbers: number of queries of one token, over all layers.
    """

    parameters: int
    kv_numbers: int
    query_numbers: int


@dataclass(frozen=True)
class Forecast:
    """Expected seconds and tokens of one round.

    Attributes:
        draft_s: seconds of growing the tree.
        transfer_s: seconds of moving features and tokens between devices.
        verify_s: seconds of the verification pass.
        accept_s: seconds of accepting tokens and of everything else.
        tokens: number of tokens emitted.
    """

    draft_s: float
    transfer_s: float
    verify_s: float
    accept_s: float
    tokens: float

    @property
    def total_s(self) -> float:
        """Seconds of the whole round."""
        return self.draft_s + self.transfer_s + self.verify_s + self.accept_s


@dataclass
class CostModel:
    """Predicts the seconds of rounds; `observe` keeps it up to date.

    Attributes:
        measured: result of a probe.
        shape: sizes of the target. If None, a longer context is assumed to cost nothing.
        settings: constants of the corrections.
        last_nodes: number of rows of the previous pass; None if the target did other work in between.
        row_change: logarithm of the factor by which a pass is slower if its row count differs from the previous pass.
    """

    measured: Measurements
    shape: Shape | None = None
    settings: PolicySettings = field(default_factory=PolicySettings)
    last_nodes: int | None = None
    row_change: float = 0.0

    def __post_init__(self) -> None:
        self._verify = Curve(self.measured.verify_s, self.settings)
        self._level = Curve(self.measured.level_s, self.settings)
        self._draft_scale = 1.0
        self._transfer_s = self.measured.transfer_s
        self._accept_s = 0.0  # for one token; learned from the first round

    def verify_table(self, context: int, nodes: int) -> np.ndarray:
        """Return the seconds of passes over 1, 2, ... `nodes` rows after `context` tokens, (nodes,).

        A pass over one row is bound by memory, so a cached token costs as much as the same number of weights. Each
        further row is bound by arithmetic: 2 operations per weight, and 4 per query number and cached token (q k and
        p v).
        """
        seconds = self._verify(np.arange(1, nodes + 1))
        if self.shape is None:
            return seconds
        first, further = (
            (1.0 + share * context) / (1.0 + share * self.measured.context)
            for share in (
                self.shape.kv_numbers / self.shape.parameters,
                2 * self.shape.query_numbers / self.shape.parameters,
            )
        )
        return seconds[0] * first + (seconds - seconds[0]) * further

    def changed_table(self, nodes: int) -> np.ndarray:
        """Return the factors by which passes over 1, 2, ... `nodes` rows are slower after the last pass, (nodes,)."""
        factors = np.full(nodes, math.exp(self.row_change))
        if self.last_nodes is not None and self.last_nodes <= nodes:
            factors[self.last_nodes - 1] = 1.0
        return factors

    def level_table(self, rows: int) -> np.ndarray:
        """Return the seconds of one more draft level over 0, 1, ... `rows` rows, (rows + 1,)."""
        seconds = self._draft_scale * self._level(np.arange(rows + 1))
        seconds[0] = 0.0
        return seconds

    def plain_s(self, context: int) -> float:
        """Return the seconds of a round without a draft."""
        return float(self.verify_table(context, 1)[0]) + self._accept_s

    def forecast(self, widths: list[int] | None, nodes: int, context: int, tokens: float) -> Forecast:
        """Forecast a round.

        Args:
            widths: rows of each draft level after the first; None if nothing is drafted.
            nodes: number of rows to verify.
            context: number of tokens of the text.
            tokens: number of tokens that the round is expected to emit.
        """
        draft_s = transfer_s = 0.0
        if widths is not None:
            draft_s = self._draft_scale * (self.measured.draft_s + float(self._level(np.array(widths)).sum()))
            transfer_s = self._transfer_s
        verify_s = float(self.verify_table(context, nodes)[-1] * self.changed_table(nodes)[-1])
        return Forecast(draft_s, transfer_s, verify_s, self._accept_s * tokens, tokens)

    def observe(self, round_: Round, expected: Forecast) -> None:
        """Correct the model with a finished round and its forecast."""
        seconds, follow = round_.seconds, self.settings.follow
        error = self._error(seconds["verify"], expected.verify_s)
        self._verify.observe(round_.nodes, error)
        # Rounds without a change lower it: a machine that is slower in all rounds must not look like a cost of changes.
        sign = 1.0 if round_.nodes != self.last_nodes else -1.0
        self.row_change = max(self.row_change + sign * self.settings.row_change_follow * error, 0.0)
        self.last_nodes = round_.nodes
        if round_.widths is not None:
            self._draft_scale *= math.exp(follow * self._error(seconds["draft"], expected.draft_s))
            self._transfer_s = self._average(self._transfer_s, seconds["transfer"])
        self._accept_s = self._average(self._accept_s, (seconds["accept"] + seconds["other"]) / round_.emitted)

    def _average(self, average_s: float, seen_s: float) -> float:
        """Return the updated exponential average. The first value counts fully; slow values are clipped."""
        if average_s == 0.0:
            return seen_s
        return average_s + self.settings.follow * (min(seen_s, self.settings.slowest * average_s) - average_s)

    def _error(self, seen_s: float, expected_s: float) -> float:
        """Return log(seen / expected), clipped to the largest error that counts."""
        if seen_s <= 0.0 or expected_s <= 0.0:
            return 0.0
        most = math.log(self.settings.largest_error)
        return min(max(math.log(seen_s / expected_s), -most), most)
