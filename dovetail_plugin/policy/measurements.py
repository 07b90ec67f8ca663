"""`Measurements`, the result of a probe of this machine, and its JSON form."""

from dataclasses import asdict, dataclass
from typing import Any

MOST_ROWS, MOST_COUNTS, LONGEST_CONTEXT, LONGEST_S = 1 << 20, 1024, 1 << 31, 1e6
"""Bounds of what a stored file may say: rows of a pass, number of row counts, tokens, seconds of a pass."""


@dataclass(frozen=True)
class Measurements:
    """Measured seconds of one target and one draft on one machine.

    Attributes:
        verify_s: row count -> seconds of a pass after `context` tokens, when the previous pass had as many rows.
        level_s: row count -> seconds of one more draft level.
        draft_s: seconds of a tree with one level.
        transfer_s: seconds of a typical transfer to the draft's device; 0 if nothing is moved.
        context: number of tokens of the text during the measurements.
        threads: number of torch threads during the measurements; None if torch does not run the target.
        processors: processors that the threads were bound to; None if they were not bound.
    """

    verify_s: dict[int, float]
    level_s: dict[int, float]
    draft_s: float
    transfer_s: float
    context: int
    threads: int | None = None
    processors: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the values as a dictionary that JSON can store."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Measurements":
        """Read the result of `as_dict`, or of version 0.1.0, where `transfer_s` maps bytes to seconds.

        Raises:
            ValueError: a value is missing, is not a number, or is out of range.
        """
        try:
            verify_s, level_s = (
                {int(count): float(seconds) for count, seconds in values[name].items()}
                for name in ("verify_s", "level_s")
            )
            transfer_s = values["transfer_s"]
            if isinstance(transfer_s, dict):
                transfer_s = min(map(float, transfer_s.values()), default=0.0)
            processors = values["processors"]
            found = Measurements(
                verify_s=verify_s,
                level_s=level_s,
                draft_s=float(values["draft_s"]),
                transfer_s=float(transfer_s),
                context=int(values["context"]),
                threads=None if values["threads"] is None else int(values["threads"]),
                processors=None if processors is None else tuple(int(p) for p in processors),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"incomplete measurements: {error!r}") from error
        found._check()
        return found

    def _check(self) -> None:
        """Refuse values that no probe gives.

        Raises:
            ValueError: names the kind of the value.
        """
        seconds = [self.draft_s, self.transfer_s, *self.verify_s.values(), *self.level_s.values()]
        if not self.verify_s or not self.level_s or not all(0 <= s <= LONGEST_S for s in seconds):
            raise ValueError(f"measurements without row counts, or with seconds that are not 0 to {LONGEST_S}")
        if len(self.verify_s) > MOST_COUNTS or len(self.level_s) > MOST_COUNTS:
            raise ValueError(f"measurements of more than {MOST_COUNTS} row counts")
        if not all(1 <= count <= MOST_ROWS for count in (*self.verify_s, *self.level_s)):
            raise ValueError(f"measurements with row counts that are not 1 to {MOST_ROWS}")
        if not 0 <= self.context <= LONGEST_CONTEXT:
            raise ValueError(f"measurements with a context that is not 0 to {LONGEST_CONTEXT} tokens")
        if self.threads is not None and self.threads < 1:
            raise ValueError("measurements with a number of threads below 1")
        if self.processors is not None and (not self.processors or min(self.processors) < 0):
            raise ValueError("measurements with processors that are not numbers from 0")
