"""Whether rounds draft at all: trials, rests, and the running rate of drafted rounds."""

from dataclasses import dataclass, field

from .acceptance import AcceptanceCurve
from .tree_rule import Lookahead

REMEMBER = 0.96
"""What a round leaves of the weight of those before it in the running rate: some 25 rounds count."""


FIRST_TRIAL, TRIAL, LONG_TRIAL = 4, 2, 8
"""Drafted rounds before drafting may be switched off: at first, when it is tried again, and if any of it was right."""


ESTIMATES = 16
"""Drafted rounds after a rest until only what really came counts."""


FIRST_REST, LONGEST_REST = 16, 2048
"""Plain rounds before drafting is tried again; doubled each time that it does not pay."""


@dataclass
class Mode:
    """What is known about drafting for one target at one temperature.

    tokens, estimated, seconds: of drafted rounds, older ones counting less: what came, and what trees like these bring
        by all that is known. since, accepted: drafted rounds since the last rest, and drafted tokens that were accepted
        in them.
    trial: drafted rounds until they are judged. rest: plain rounds until the next trial. interval: of the next rest.
    """

    curve: AcceptanceCurve
    lookahead: Lookahead = field(default_factory=Lookahead)
    tokens: float = 0.0
    estimated: float = 0.0
    seconds: float = 0.0
    since: int = 0
    accepted: float = 0.0
    trial: int = FIRST_TRIAL
    rest: int = 0
    interval: int = FIRST_REST

    def rate(self) -> float:
        """Tokens a second of drafted rounds. The estimate, less noisy and less sure, counts at first only."""
        share = max(0.5 * (1.0 - self.since / ESTIMATES), 0.0)
        return ((1.0 - share) * self.tokens + share * self.estimated) / self.seconds if self.seconds else 0.0

    def count(self, tokens: float, estimated: float, seconds: float) -> None:
        """Add a drafted round."""
        self.tokens = REMEMBER * self.tokens + tokens
        self.estimated = REMEMBER * self.estimated + estimated
        self.seconds = REMEMBER * self.seconds + seconds
        self.since += 1
        self.accepted += tokens - 1.0

    def judge(self, plain_rate: float) -> None:
        """After a drafted round: go on, or rest when plain decoding is faster."""
        self.trial -= 1
        if self.trial > 0:
            return
        if self.rate() >= plain_rate:
            if self.since > ESTIMATES:
                self.interval = FIRST_REST
            return
        if self.accepted and self.since < LONG_TRIAL:
            return  # some of it is right: look longer
        self.rest, self.interval = self.interval, min(2 * self.interval, LONGEST_REST)
        self.trial, self.since, self.accepted = TRIAL, 0, 0.0
        self.curve.fade()  # or the next trial would verify nothing, and learn nothing
        weight = TRIAL * (1 / plain_rate) / self.seconds  # the next trial weighs as much as all that was before
        self.tokens, self.estimated, self.seconds = (
            part * weight for part in (self.tokens, self.estimated, self.seconds)
        )
