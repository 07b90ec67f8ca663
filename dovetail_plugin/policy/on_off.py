"""Decides whether rounds draft at all, with trials, rests and the running rate of drafted rounds."""

from dataclasses import dataclass, field

from .acceptance import AcceptanceCurve
from .settings import PolicySettings
from .tree_rule import Lookahead


@dataclass
class DraftingSwitch:
    """Switches drafting on and off for one target at one temperature, and keeps what rounds have shown.

    Attributes:
        curve: acceptance of drafted nodes.
        settings: lengths of trials and rests.
        lookahead: children of the latest nodes.
        tokens: weighted number of tokens that drafted rounds emitted; older rounds count less.
        estimated: number of tokens that trees like these are expected to bring, with the same weights.
        seconds: seconds of these rounds, with the same weights.
        since: number of drafted rounds since the last rest.
        accepted: number of drafted tokens accepted since the last rest.
        trial: number of drafted rounds until drafting may rest.
        rest: number of plain rounds until the next trial; 0 while drafting is on.
        interval: number of plain rounds of the next rest.
    """

    curve: AcceptanceCurve
    settings: PolicySettings
    lookahead: Lookahead = field(init=False)
    tokens: float = 0.0
    estimated: float = 0.0
    seconds: float = 0.0
    since: int = 0
    accepted: float = 0.0
    trial: int = field(init=False)
    rest: int = 0
    interval: int = field(init=False)

    def __post_init__(self) -> None:
        self.lookahead = Lookahead(self.settings)
        self.trial, self.interval = self.settings.first_trial, self.settings.first_rest

    def rate(self) -> float:
        """Return the tokens per second of drafted rounds.

        In the first rounds after a rest the estimate counts too, because it varies less than the emitted tokens.
        """
        share = max(0.5 * (1.0 - self.since / self.settings.estimated_rounds), 0.0)
        return ((1.0 - share) * self.tokens + share * self.estimated) / self.seconds if self.seconds else 0.0

    def count(self, tokens: float, estimated: float, seconds: float) -> None:
        """Add a drafted round."""
        memory = self.settings.rate_memory
        self.tokens = memory * self.tokens + tokens
        self.estimated = memory * self.estimated + estimated
        self.seconds = memory * self.seconds + seconds
        self.since += 1
        self.accepted += tokens - 1.0

    def judge(self, plain_rate: float) -> None:
        """Decide after a drafted round whether to rest, because plain decoding (tokens per second) is faster."""
        settings = self.settings
        self.trial -= 1
        if self.trial > 0:
            return
        if self.rate() >= plain_rate:
            if self.since > settings.estimated_rounds:
                self.interval = settings.first_rest
            return
        if self.accepted and self.since < settings.long_trial:
            return
        self.rest, self.interval = self.interval, min(2 * self.interval, settings.longest_rest)
        self.trial, self.since, self.accepted = settings.trial, 0, 0.0
        self.curve.fade()  # otherwise the next trial would verify nothing and learn nothing
        weight = settings.trial / plain_rate / self.seconds  # the next trial counts as much as all before
        self.tokens, self.estimated, self.seconds = (
            part * weight for part in (self.tokens, self.estimated, self.seconds)
        )
