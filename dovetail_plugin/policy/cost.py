"""The latency model: measured seconds in, expected seconds of a round out. Pure numbers, no tensors, no clock.

    round = draft(widths of its levels) + transfer(bytes) + verify(nodes, context) + accept(tokens) + other

`Measurements` is what a probe of this machine found; `CostModel` starts from it and follows every round. A single
slow round moves it a little only: corrections are bounded, and made in proportion.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from .curve import Curve
from .measurements import Measurements

FOLLOW = 0.2
"""Share of an observed error that is taken over at once, where a curve does not say otherwise."""

LARGEST_ERROR = math.log(1.5)
"""A round that is off by more counts as off by this: one slow round is no news about the machine."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the target that tell what a longer context costs before it was seen.

    parameters: numbers read in a pass. kv_numbers: numbers of keys and values for a token, all layers.
    query_numbers: width of all queries of a token, all layers.
    """

    parameters: int
    kv_numbers: int
    query_numbers: int


@dataclass(frozen=True)
class RoundCost:
    """Expected seconds of a round's phases."""

    draft_s: float
    transfer_s: float
    verify_s: float
    accept_s: float

    @property
    def total_s(self) -> float:
        """Of the whole round."""
        return self.draft_s + self.transfer_s + self.verify_s + self.accept_s


@dataclass
class CostModel:
    """Expected seconds, kept up to date by `observe`.

    Args:
        measured: what a probe found.
        shape: of the target; None if nothing is known of it, then context costs nothing until seen.
    """

    measured: Measurements
    shape: Shape | None = None
    verify: Curve = field(init=False)
    level: Curve = field(init=False)
    rounds: int = 0
    last_nodes: int | None = None  # of the pass before; None after any other work of the target

    def __post_init__(self) -> None:
        self.verify, self.level = Curve(self.measured.verify_s), Curve(self.measured.level_s)
        self._draft_scale = 1.0
        self._transfer_s = min(self.measured.transfer_s.values(), default=0.0)
        self._accept_s = 0.0  # a token's share of accepting and of all else; learnt from the first rounds
        self._per_token_s, self._per_token_row_s = self._context_costs()

    def _context_costs(self) -> tuple[float, float]:
        """Seconds that one more token of context costs a pass, and each row of it.

        A pass of one row is bound by memory: a cached token costs what as many weights cost. A further row is
        bound by arithmetic: 2 operations for a weight, 4 for a query number and a cached token (q k and p v).
        """
        if self.shape is None:
            return 0.0, 0.0
        one_s, last = self.verify(1), max(self.measured.verify_s)
        row_s = (self.verify(last) - one_s) / max(last - 1, 1)
        memory_s = one_s * self.shape.kv_numbers / self.shape.parameters
        return memory_s, row_s * 4 * self.shape.query_numbers / (2 * self.shape.parameters)

    def verify_s(self, nodes: int, context: int) -> float:
        """Of a pass over `nodes` rows behind `context` tokens, after one over as many."""
        beyond = context - self.measured.context
        seconds = self.verify(nodes) + beyond * (self._per_token_s + self._per_token_row_s * nodes)
        return max(seconds, 0.2 * self.verify(1))

    def verify_table(self, context: int, nodes: int) -> np.ndarray:
        """(nodes,) seconds of passes over 1, 2, ... `nodes` rows."""
        counts = np.arange(1, nodes + 1)
        beyond = context - self.measured.context
        seconds = self.verify.many(counts) + beyond * (self._per_token_s + self._per_token_row_s * counts)
        return np.maximum(seconds, 0.2 * self.verify(1))

    def switch_table(self, nodes: int) -> np.ndarray:
        """(nodes,) share of a pass over 1, 2, ... `nodes` rows that it takes more after the pass before."""
        shares = np.full(nodes, math.expm1(self.verify.switch))
        if self.last_nodes is not None and self.last_nodes <= nodes:
            shares[self.last_nodes - 1] = 0.0
        return shares

    def _switch_factor(self, nodes: int) -> float:
        return 1.0 if nodes == self.last_nodes else math.exp(self.verify.switch)

    def level_table(self, rows: int) -> np.ndarray:
        """(rows + 1,) seconds of one more draft level over 0, 1, ... `rows` rows."""
        seconds = self.level.many(np.arange(rows + 1)) * self._draft_scale
        seconds[0] = 0.0
        return seconds

    def plain_s(self, context: int) -> float:
        """Of a round without a draft."""
        return self.verify_s(1, context) + self._accept_s

    def round(self, widths: list[int] | None, nodes: int, context: int, tokens: float) -> RoundCost:
        """Of a round.

        Args:
            widths: rows of every draft level after the first; None where nothing is drafted.
            nodes: rows verified. context: tokens of the text. tokens: expected to be emitted.
        """
        draft_s = transfer_s = 0.0
        if widths is not None:
            levels_s = sum(self.level(width) for width in widths)
            draft_s = (self.measured.draft_s + levels_s) * self._draft_scale
            transfer_s = self._transfer_s
        verify_s = self.verify_s(nodes, context) * self._switch_factor(nodes)
        return RoundCost(draft_s, transfer_s, verify_s, self._accept_s * tokens)

    def observe(
        self, expected: RoundCost, seconds: dict[str, float], *, nodes: int, context: int, tokens: int, drafted: bool
    ) -> None:
        """Learn from a round.

        Args:
            expected: of `round`. seconds: measured, by phase. tokens: emitted. drafted: whether there was a tree.
        """
        self.rounds += 1
        self._observe_verify(_error(seconds["verify"], expected.verify_s), nodes, context)
        if drafted:
            self._draft_scale *= math.exp(FOLLOW * _error(seconds["draft"], expected.draft_s))
            self._transfer_s += FOLLOW * (min(seconds["transfer"], 4 * self._transfer_s + 1e-4) - self._transfer_s)
        rest_s = (seconds["accept"] + seconds.get("other", 0.0)) / tokens
        if self._accept_s:
            rest_s = min(rest_s, 4 * self._accept_s)
        self._accept_s += (FOLLOW if self._accept_s else 1.0) * (rest_s - self._accept_s)

    def _observe_verify(self, error: float, nodes: int, context: int) -> None:
        """Errors far from the probe's context are put down to what context costs, in proportion."""
        beyond = context - self.measured.context
        part_s = beyond * (self._per_token_s + self._per_token_row_s * nodes)
        share = min(max(part_s / self.verify_s(nodes, context), 0.0), 1.0)
        correction = math.exp(FOLLOW * share * error)
        self._per_token_s, self._per_token_row_s = self._per_token_s * correction, self._per_token_row_s * correction
        self.verify.observe(nodes, (1.0 - share) * error, nodes != self.last_nodes)
        self.last_nodes = nodes


def _error(seen_s: float, expected_s: float) -> float:
    """log(seen / expected), bounded."""
    if seen_s <= 0.0 or expected_s <= 0.0:
        return 0.0
    return min(max(math.log(seen_s / expected_s), -LARGEST_ERROR), LARGEST_ERROR)
