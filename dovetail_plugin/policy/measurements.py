"""`Measurements`, the result of a probe of this machine, and its JSON form."""

import math
from dataclasses import asdict, dataclass
from typing import Any


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
        seconds = [found.draft_s, found.transfer_s, *verify_s.values(), *level_s.values()]
        if not verify_s or not level_s or not all(math.isfinite(s) and s >= 0 for s in seconds):
            raise ValueError("measurements without row counts, or with seconds that are not positive numbers")
        if min(*verify_s, *level_s, 1 if found.threads is None else found.threads) < 1:
            raise ValueError("measurements with counts of rows or threads below 1")
        return found
