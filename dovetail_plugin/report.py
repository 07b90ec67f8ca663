"""What happened in a generation: counts, seconds of each phase, acceptance.

Enters: phases as they are timed and rounds as they end. Leaves: a `GenerationReport` that prints itself.
It measures and never decides anything.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("draft", "transfer", "verify", "accept")
"""Phases of a round; what is left of its seconds is "other"."""


class PhaseClock:
    """Adds up wall-clock seconds by phase name. Phases do not nest."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from zero, as when the prompt is done and the rounds begin."""
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start_s


@dataclass(frozen=True)
class Round:
    """One verification.

    nodes: rows verified. emitted: tokens of the text it gave, the bonus token included. depth: of the deepest node.
    widths: rows of each draft level after the first; None where nothing was drafted, or no policy chose them.
    context: tokens of the text before it. seconds: by phase, "other" included.
    predicted_s, predicted_tokens: what the policy expected; None without one.
    """

    nodes: int
    emitted: int
    depth: int = 0
    widths: tuple[int, ...] | None = field(default=None, compare=False)
    context: int = field(default=0, compare=False)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    predicted_s: float | None = field(default=None, compare=False)
    predicted_tokens: float | None = field(default=None, compare=False)

    @property
    def total_s(self) -> float:
        """Seconds of the round."""
        return sum(self.seconds.values())


@dataclass
class GenerationReport:
    """Of one call of `generate` with a draft.

    prompt_tokens: tokens before generation. new_tokens: tokens generated.
    prefill_s: the target's prompt pass, with the draft's. decode_s: all rounds.
    probe_s: measuring the machine, which happens once for a target, a draft and a machine.
    rounds: one `Round` for every verification. warnings: why drafting stopped, if it did.
    clock: seconds of the rounds' phases.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    probe_s: float = 0.0
    decode_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens a verification gave: accepted drafts plus the bonus token. Plain decoding is 1."""
        return sum(r.emitted for r in self.rounds) / len(self.rounds) if self.rounds else 0.0

    @property
    def nodes_per_round(self) -> float:
        """Mean rows the target scored in a round."""
        return sum(r.nodes for r in self.rounds) / len(self.rounds) if self.rounds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens over all seconds, prefill included; not those of measuring the machine."""
        total_s = self.prefill_s + self.decode_s
        return self.new_tokens / total_s if total_s else 0.0

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of every phase of the rounds, "other" included; they sum to `decode_s`."""
        seconds = dict(self.clock.seconds)
        return seconds | {"other": max(self.decode_s - sum(seconds.values()), 0.0)}

    def summary(self) -> str:
        """Three lines: what a round took and gave, what limited the speed, and what would help."""
        if not self.rounds:
            return "nothing was generated beyond the prompt's first token."
        seconds = self.phase_seconds
        total_s = sum(seconds.values()) or 1.0
        plain = sum(r.nodes == 1 for r in self.rounds) / len(self.rounds)
        shares = {name: seconds[name] / total_s for name in seconds}
        first = (
            f"a round took {1e3 * total_s / len(self.rounds):.1f} ms (draft {shares['draft']:.0%}, transfer "
            f"{shares['transfer']:.0%}, verify {shares['verify']:.0%}) and gave {self.acceptance_length:.2f} tokens "
            f"for {self.nodes_per_round:.1f} verified; {plain:.0%} of the rounds were plain."
        )
        return "\n".join([first, *_limits(shares, self.acceptance_length, plain)])

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phase_seconds.items())
        lines = [
            f"{self.new_tokens} tokens in {self.prefill_s + self.decode_s:.2f} s ({self.tokens_per_s:.1f} tokens/s)",
            f"{len(self.rounds)} rounds, acceptance length {self.acceptance_length:.2f}, "
            f"{self.nodes_per_round:.1f} nodes verified a round",
            f"seconds: prefill {self.prefill_s:.3f}, {phases}",
        ]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def _limits(shares: dict[str, float], acceptance_length: float, plain: float) -> tuple[str, str]:
    """What limited the speed, and what would help."""
    if plain > 0.5:
        return (
            "limited by acceptance: what the draft proposed was not worth its time, so most rounds went without it.",
            "would help: a draft trained for this target on text like yours (`dovetail train`).",
        )
    if shares["draft"] + shares["transfer"] > 0.4:
        where = "draft" if shares["draft"] > shares["transfer"] else "transfer"
        return (
            f"limited by the {where}: {shares[where]:.0%} of the time went there.",
            "would help: the draft on a GPU, fewer draft blocks, or a quantised draft beside an OpenVINO target.",
        )
    if acceptance_length < 2.0:
        return (
            f"limited by acceptance: a verification gave {acceptance_length:.2f} tokens.",
            "would help: a draft trained longer, with more blocks, or on text like yours (`dovetail train`).",
        )
    return (
        f"limited by verification: {shares['verify']:.0%} of the time is the target's passes.",
        "would help: a quantised target (`dovetail export`), more CPU cores, or target layers on the GPU.",
    )
