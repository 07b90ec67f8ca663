"""The latency model: measured seconds in, expected seconds of a round out. Pure numbers, no tensors, no clock.

    round = draft(widths of its levels) + transfer(bytes) + verify(nodes, context) + accept(tokens) + other

`Measurements` is what a probe of this machine found; `CostModel` starts from it and follows every round. A single
slow round moves it a little only: corrections are bounded, and made in proportion.
"""

import bisect
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

FOLLOW = 0.2
"""Share of an observed error that is taken over at once, where a curve does not say otherwise."""

LARGEST_ERROR = math.log(1.5)
"""A round that is off by more counts as off by this: one slow round is no news about the machine."""

KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Counts whose seconds a `Curve` learns, beside the measured ones."""

# What a `Curve` takes for granted of its seconds, as standard deviations of their logarithm.
SPREAD, REACH, ROUGHNESS = 0.4, 1.5, 0.03
"""Of the truth from the straight line between measured counts, far from both; how far apart, in octaves, two counts
have little to do with each other; and of one count from the smooth curve through its neighbours. So what lies between
measured neighbours is believed, and what lies in a gap of several octaves is learnt."""
NOISE_OF_PROBE, NOISE_OF_ROUND = 0.06, 0.2
"""Of a measured count, and of one round."""
DRIFT_OF_MACHINE, DRIFT_OF_COUNT = 0.05, 0.005
"""From round to round: of all counts alike, and of each for itself."""


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
class Measurements:
    """Of one target, draft and machine.

    verify_s: nodes -> seconds of a pass behind `context` tokens. level_s: rows -> seconds of one more draft level.
    draft_s: seconds of a tree of one level. transfer_s: bytes -> seconds from the target's device to the draft's.
    threads: torch's, that all this was measured with; None where torch does not run the target.
    processors: that the threads were bound to; None where they were free.
    """

    verify_s: dict[int, float]
    level_s: dict[int, float]
    draft_s: float
    transfer_s: dict[int, float]
    context: int
    threads: int | None = None
    processors: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are strings."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Measurements":
        """The way back.

        Raises:
            ValueError: a part is missing, is no number, or makes no sense.
        """
        try:
            tables = {
                name: {int(count): float(seconds) for count, seconds in values[name].items()}
                for name in ("verify_s", "level_s", "transfer_s")
            }
            processors = values["processors"]
            found = Measurements(
                draft_s=float(values["draft_s"]),
                context=int(values["context"]),
                threads=None if values["threads"] is None else int(values["threads"]),
                processors=None if processors is None else tuple(int(p) for p in processors),
                **tables,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"incomplete measurements: {error!r}") from error
        seconds = [found.draft_s, *found.verify_s.values(), *found.level_s.values(), *found.transfer_s.values()]
        if not found.verify_s or not found.level_s or not all(math.isfinite(s) and s >= 0 for s in seconds):
            raise ValueError("measurements without counts, or with seconds that are no positive numbers")
        if min(*found.verify_s, *found.level_s, 1 if found.threads is None else found.threads) < 1:
            raise ValueError("measurements with counts of rows or threads below 1")
        return found


class Curve:
    """Seconds as a function of a count: straight between knots, and on beyond the last two.

    It begins as the straight line through what was measured and follows rounds as a Kalman filter over the logarithms
    of its knots' seconds. An error is put down to the machine (all counts alike), to its count and to counts near it,
    in proportion to what is not known of each: a count that was never measured is learnt from its first rounds.

    Args:
        measured: count -> seconds, one entry or more.
    """

    def __init__(self, measured: dict[int, float]) -> None:
        known = np.array(sorted(measured), dtype=float)
        # More rows never take less time for good; where they seemed to, both get the mean.
        seconds = np.array([measured[int(count)] for count in known])
        seconds = np.maximum(rising(seconds, np.ones(len(seconds))), 1e-7)
        knots = np.array(sorted({*KNOTS, *measured}), dtype=float)
        self._counts, self._known = knots.tolist(), set(measured)
        self._seconds: list[float] = _straight(knots, known, seconds).tolist()
        octaves = np.log2(knots)
        apart = (octaves[:, None] - octaves) / REACH
        alike = SPREAD**2 * np.exp(-0.5 * apart**2) + ROUGHNESS**2 * np.eye(len(knots))
        at = np.isin(knots, known).nonzero()[0]
        seen = alike[np.ix_(at, at)] + NOISE_OF_PROBE**2 * np.eye(len(at))
        self._covariance = alike - alike[:, at] @ np.linalg.solve(seen, alike[at])
        self._drift = DRIFT_OF_MACHINE**2 + DRIFT_OF_COUNT**2 * np.eye(len(knots))

    def __call__(self, count: float) -> float:
        """Seconds for one count. Plain Python: a round of a small model takes a few milliseconds."""
        left, share = self._place(count)
        return self._seconds[left] + share * (self._seconds[left + 1] - self._seconds[left])

    def _place(self, count: float) -> tuple[int, float]:
        """The knot at or before a count, and how far it is to the next one as a share; above 1 beyond the last."""
        counts = self._counts
        left = min(max(bisect.bisect_right(counts, count) - 1, 0), len(counts) - 2)
        return left, (count - counts[left]) / (counts[left + 1] - counts[left])

    def many(self, counts: np.ndarray) -> np.ndarray:
        """Seconds for each of `counts`."""
        return _straight(counts, np.array(self._counts), np.array(self._seconds))

    def observe(self, count: int, error: float) -> None:
        """Take over an error, log(seen / expected) at `count`."""
        left, share = self._place(count)
        share = min(share, 1.0)
        covariance = self._covariance + self._drift
        shared = (1.0 - share) * covariance[left] + share * covariance[left + 1]
        variance = (1.0 - share) * shared[left] + share * shared[left + 1] + NOISE_OF_ROUND**2
        self._covariance = covariance - np.outer(shared, shared) / variance
        logs = np.log(self._seconds) + shared * (error / variance)
        # More rows still never take less time: where they seem to, both get what is known better.
        self._seconds = np.exp(rising(logs, 1.0 / self._covariance.diagonal())).tolist()
        self._known.add(int(self._counts[left + round(share)]))

    def measured(self) -> dict[int, float]:
        """Seconds of the counts that were measured or learnt, for the next process."""
        at = {int(count): seconds for count, seconds in zip(self._counts, self._seconds, strict=True)}
        return {count: at[count] for count in sorted(self._known)}


def _straight(counts: np.ndarray, known: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Straight between known counts and on beyond the last two; flat before the first."""
    found = np.interp(counts, known, seconds)
    if len(known) == 1:
        return found
    (x0, x1), (y0, y1) = known[-2:], seconds[-2:]
    return np.where(counts > x1, y1 + (counts - x1) * (y1 - y0) / (x1 - x0), found)


def rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence that never falls, in weighted squares (pool adjacent violators)."""
    pools: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight, length = pools.pop()
            last = pools[-1]
            total = last[1] + weight
            last[0] = (last[0] * last[1] + mean * weight) / total if total else last[0]
            last[1], last[2] = total, last[2] + length
    return np.repeat([mean for mean, _, _ in pools], [int(length) for _, _, length in pools])


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
        """Of a pass over `nodes` rows behind `context` tokens."""
        beyond = context - self.measured.context
        seconds = self.verify(nodes) + beyond * (self._per_token_s + self._per_token_row_s * nodes)
        return max(seconds, 0.2 * self.verify(1))

    def verify_table(self, context: int, nodes: int) -> np.ndarray:
        """(nodes,) seconds of passes over 1, 2, ... `nodes` rows."""
        counts = np.arange(1, nodes + 1)
        beyond = context - self.measured.context
        seconds = self.verify.many(counts) + beyond * (self._per_token_s + self._per_token_row_s * counts)
        return np.maximum(seconds, 0.2 * self.verify(1))

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
        return RoundCost(draft_s, transfer_s, self.verify_s(nodes, context), self._accept_s * tokens)

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
        self.verify.observe(nodes, (1.0 - share) * error)

    def as_measurements(self) -> Measurements:
        """What is known now, to be kept for the next process."""
        scale = self._draft_scale
        return Measurements(
            verify_s=self.verify.measured(),
            level_s={rows: seconds * scale for rows, seconds in self.level.measured().items()},
            draft_s=self.measured.draft_s * scale,
            transfer_s=self.measured.transfer_s,
            context=self.measured.context,
            threads=self.measured.threads,
            processors=self.measured.processors,
        )


def _error(seen_s: float, expected_s: float) -> float:
    """log(seen / expected), bounded."""
    if seen_s <= 0.0 or expected_s <= 0.0:
        return 0.0
    return min(max(math.log(seen_s / expected_s), -LARGEST_ERROR), LARGEST_ERROR)
