"""`Measurements`: what a probe of this machine found."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurements:
    """Of one target, draft and machine.

    verify_s: nodes -> seconds of a pass behind `context` tokens, after one over as many nodes.
    level_s: rows -> seconds of one more draft level.
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
            seconds_of = {
                name: {int(count): float(seconds) for count, seconds in values[name].items()}
                for name in ("verify_s", "level_s", "transfer_s")
            }
            processors = values["processors"]
            found = Measurements(
                draft_s=float(values["draft_s"]),
                context=int(values["context"]),
                threads=None if values["threads"] is None else int(values["threads"]),
                processors=None if processors is None else tuple(int(p) for p in processors),
                **seconds_of,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"incomplete measurements: {error!r}") from error
        tables = (found.verify_s, found.level_s, found.transfer_s)
        seconds = [found.draft_s, *(s for table in tables for s in table.values())]
        if not found.verify_s or not found.level_s or not all(math.isfinite(s) and s >= 0 for s in seconds):
            raise ValueError("measurements without counts, or with seconds that are no positive numbers")
        if min(*found.verify_s, *found.level_s, 1 if found.threads is None else found.threads) < 1:
            raise ValueError("measurements with counts of rows or threads below 1")
        return found
