"""The cases that the policy is judged by in the simulated world."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from support.simulation import (
    COMPUTERS,
    EXPERTS,
    KINDS,
    STEPPED,
    SWITCHING,
    WITHOUT_BF16_UNITS,
    Computer,
    Pair,
    best_static_rate,
    planner_on,
    play,
    rate,
)


def very_good(pair: Pair) -> Pair:
    """The same text with a draft that is sure and mostly right."""
    return replace(pair, quality=((0, 1.0),), fading=1.0, sureness=(6.0, 1.0))


@dataclass(frozen=True)
class Scenario:
    """A case that the policy is judged by: its rate from `start` to `end` over that of the best static budget.

    Attributes:
        computers: position -> the computer from there on; the policy has measured the first.
        start: first position that counts.
        end: tokens that are generated.
        change: makes the draft of the case from the usual one.
        noise: see `play`.
    """

    computers: dict[int, Computer]
    start: int = 0
    end: int = 2000
    change: Callable[[Pair], Pair] = lambda pair: pair
    noise: float = 0.05

    def pair(self, kind: str, text: int) -> Pair:
        """Text number `text` of a kind."""
        return self.change(Pair(greedy=kind == "greedy", seed=text))

    def share(self, kind: str, text: int, directory: Path, **options) -> float:
        """Rate of a new policy over the rate of the best static budget, on one text."""
        pair, (first, *_) = self.pair(kind, text), self.computers.values()
        planner = planner_on(first, directory, KINDS[kind], **options)
        played = play(planner, pair, self.computers, self.end, noise=self.noise, seed=text)
        last = list(self.computers.values())[-1]
        return rate(played, self.start) / best_static_rate(pair, last, self.start, self.end)


SCENARIOS = {name: Scenario({0: computer}) for name, computer in COMPUTERS.items()}
SCENARIOS |= {f"{name}, a very good draft": Scenario({0: c}, change=very_good) for name, c in COMPUTERS.items()}
SCENARIOS |= {
    "another number of rows costs 10 %": Scenario({0: SWITCHING}),
    "seconds vary by 20 %": Scenario({0: COMPUTERS["rows cost a little"]}, noise=0.2),
    "passes take twice as long from 1000 on": Scenario(
        {0: COMPUTERS["rows cost a little"], 1000: COMPUTERS["rows cost a little"].slower(2.0)}, start=1000
    ),
    "passes take half as long from 1000 on": Scenario(
        {0: COMPUTERS["rows cost a lot"], 1000: COMPUTERS["rows cost a lot"].slower(0.5)}, start=1000
    ),
    "a stepped kernel, 1 and 8 rows probed": Scenario({0: STEPPED}),
    "no bf16 units": Scenario({0: WITHOUT_BF16_UNITS}),
    "no bf16 units, a very good draft": Scenario({0: WITHOUT_BF16_UNITS}, change=very_good),
    "no bf16 units, a very good draft, 1 and 8 rows probed": Scenario(
        {0: replace(WITHOUT_BF16_UNITS, probed=(1, 8))}, end=600, change=very_good
    ),
    "a mixture of experts": Scenario({0: EXPERTS}),
    "a mixture of experts, a very good draft": Scenario({0: EXPERTS}, end=600, change=very_good),
    "a useless draft": Scenario(
        {0: COMPUTERS["rows cost a little"]}, end=1000, change=lambda pair: replace(pair, quality=((0, 0.0),))
    ),
    "a draft that is good from 300 on": Scenario(
        {0: COMPUTERS["rows cost a little"]},
        start=300,
        end=1600,
        change=lambda pair: replace(pair, quality=((0, 0.0), (300, 0.95))),
    ),
}
"""Name -> scenario; `benchmarks/policy_simulation.py` prints them all."""
