"""The latency model: measured seconds in, expected seconds of a round out. Pure numbers, no tensors, no clock.

    round = draft(widths of its levels) + transfer + verify(rows, context) + accept(tokens)

`CostModel` starts from what a probe of this machine found and follows every round. Corrections are bounded and made in
proportion, so one slow round changes little. What is left of a round's seconds ("other") counts as accepting.
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
    """Sizes of a target, which say what a longer context costs.

    Attributes:
        parameters: numbers read in a pass.
        kv_numbers: numbers of keys and values for a token, in all layers.
        query_numbers: width of all queries of a token, in all layers.
    """

    parameters: int
    kv_numbers: int
    query_numbers: int


@dataclass(frozen=True)
class Forecast:
    """What is expected of a round.

    Attributes:
        draft_s: seconds of growing the tree.
        transfer_s: seconds of moving features and tokens between devices.
        verify_s: seconds of the verification pass.
        accept_s: seconds of accepting tokens, and of everything else.
        tokens: tokens emitted.
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
    """Expected seconds, kept up to date by `observe`.

    Attributes:
        measured: the result of a probe.
        shape: sizes of the target; without them a longer context costs nothing.
        settings: how rounds are followed.
        last_nodes: rows of the pass before; None after any other work of the target.
        row_change: logarithm of how much longer a pass takes when its row count differs from the pass before.
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
        self._accept_s = 0.0  # of one token; learned from the first round

    def verify_table(self, context: int, nodes: int) -> np.ndarray:
        """Return (nodes,) seconds of passes over 1, 2, ... `nodes` rows behind `context` tokens.

        A pass of one row is bound by memory: a cached token costs what as many weights cost. A further row is bound by
        arithmetic: 2 operations for a weight, 4 for a query number and a cached token (q k and p v).
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
        """Return (nodes,) factors of passes over 1, 2, ... `nodes` rows, for coming after the pass before."""
        factors = np.full(nodes, math.exp(self.row_change))
        if self.last_nodes is not None and self.last_nodes <= nodes:
            factors[self.last_nodes - 1] = 1.0
        return factors

    def level_table(self, rows: int) -> np.ndarray:
        """Return (rows + 1,) seconds of one more draft level over 0, 1, ... `rows` rows."""
        seconds = self._draft_scale * self._level(np.arange(rows + 1))
        seconds[0] = 0.0
        return seconds

    def plain_s(self, context: int) -> float:
        """Return the seconds of a round without a draft."""
        return float(self.verify_table(context, 1)[0]) + self._accept_s

    def forecast(self, widths: list[int] | None, nodes: int, context: int, tokens: float) -> Forecast:
        """Forecast a round.

        Args:
            widths: rows of every draft level after the first; None where nothing is drafted.
            nodes: rows verified.
            context: tokens of the text.
            tokens: tokens expected to be emitted.
        """
        draft_s = transfer_s = 0.0
        if widths is not None:
            draft_s = self._draft_scale * (self.measured.draft_s + float(self._level(np.array(widths)).sum()))
            transfer_s = self._transfer_s
        verify_s = float(self.verify_table(context, nodes)[-1] * self.changed_table(nodes)[-1])
        return Forecast(draft_s, transfer_s, verify_s, self._accept_s * tokens, tokens)

    def observe(self, round_: Round, expected: Forecast) -> None:
        """Learn from a round and its forecast."""
        seconds, follow = round_.seconds, self.settings.follow
        error = self._error(seconds["verify"], expected.verify_s)
        self._verify.observe(round_.nodes, error)
        # Both ways, so that a machine that is slower in all rounds is not taken for a cost of changes.
        sign = 1.0 if round_.nodes != self.last_nodes else -1.0
        self.row_change = max(self.row_change + sign * self.settings.row_change_follow * error, 0.0)
        self.last_nodes = round_.nodes
        if round_.widths is not None:
            self._draft_scale *= math.exp(follow * self._error(seconds["draft"], expected.draft_s))
            self._transfer_s = self._average(self._transfer_s, seconds["transfer"])
        self._accept_s = self._average(self._accept_s, (seconds["accept"] + seconds["other"]) / round_.emitted)

    def _average(self, average_s: float, seen_s: float) -> float:
        """Exponential average of seconds; the first ones count fully, slow ones as a multiple of the average."""
        if average_s == 0.0:
            return seen_s
        return average_s + self.settings.follow * (min(seen_s, self.settings.slowest * average_s) - average_s)

    def _error(self, seen_s: float, expected_s: float) -> float:
        """log(seen / expected), bounded."""
        if seen_s <= 0.0 or expected_s <= 0.0:
            return 0.0
        most = math.log(self.settings.largest_error)
        return min(max(math.log(seen_s / expected_s), -most), most)
