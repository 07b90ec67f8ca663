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
    """nodes: rows verified. emitted: tokens of the text it gave, the bonus token included."""

    nodes: int
    emitted: int


@dataclass
class GenerationReport:
    """Of one call of `generate` with a draft.

    prompt_tokens: tokens before generation. new_tokens: tokens generated.
    prefill_s: the target's prompt pass, with the draft's. decode_s: all rounds.
    rounds: one `Round` for every verification. warnings: why drafting stopped, if it did.
    clock: seconds of the rounds' phases.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
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
        """New tokens over all seconds, prefill included."""
        total_s = self.prefill_s + self.decode_s
        return self.new_tokens / total_s if total_s else 0.0

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of every phase of the rounds, "other" included; they sum to `decode_s`."""
        seconds = dict(self.clock.seconds)
        return seconds | {"other": max(self.decode_s - sum(seconds.values()), 0.0)}

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phase_seconds.items())
        lines = [
            f"{self.new_tokens} tokens in {self.prefill_s + self.decode_s:.2f} s ({self.tokens_per_s:.1f} tokens/s)",
            f"{len(self.rounds)} rounds, acceptance length {self.acceptance_length:.2f}, "
            f"{self.nodes_per_round:.1f} nodes verified a round",
            f"seconds: prefill {self.prefill_s:.3f}, {phases}",
        ]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])
