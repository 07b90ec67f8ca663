"""Report of one generation: token counts, seconds of each phase and acceptance.

The generation loop times phases with a `PhaseClock` and appends a `Round` after each verification pass. The resulting
`GenerationReport` can be printed or summarized. This module only records; it makes no decisions.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("draft", "transfer", "verify", "accept")
"""Timed phases of a round. The remaining seconds of a round are reported as "other"."""


class PhaseClock:
    """Adds up wall-clock seconds by phase. Phases do not nest.

    Attributes:
        seconds: seconds of each of `PHASES` since the last reset.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all phases to zero, for example when prefill is done and the rounds begin."""
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent in the `with` block to the phase `name`, one of `PHASES`."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start_s


@dataclass(frozen=True)
class Round:
    """One round: draft, verify, accept.

    Attributes:
        nodes: nodes verified, the root included. 1 in a plain round.
        emitted: tokens added to the text, the target's own token included.
        depth: depth of the deepest node.
        widths: rows of each draft level after the first. None if nothing was drafted or if the budget was fixed.
        context: tokens of the text before the round.
        seconds: seconds by phase, "other" included.
        predicted_s: seconds that the policy expected. None without a policy.
        predicted_tokens: emitted tokens that the policy expected. None without a policy.
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
        """Seconds of the whole round."""
        return sum(self.seconds.values())


@dataclass
class GenerationReport:
    """Record of one call of `generate` with a draft.

    Attributes:
        prompt_tokens: tokens before generation.
        new_tokens: tokens generated.
        prefill_s: seconds of the prompt passes of the target and the draft.
        probe_s: seconds of measuring the machine, which happens once for each target, draft and machine.
        decode_s: seconds of all rounds.
        rounds: one `Round` for each verification pass.
        warnings: the reasons why drafting stopped or did not begin, if so.
        clock: seconds of the phases, summed over the rounds.
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
        """Mean tokens emitted per round, the target's own token included. 1 in plain generation, 0 without rounds."""
        return sum(r.emitted for r in self.rounds) / len(self.rounds) if self.rounds else 0.0

    @property
    def nodes_per_round(self) -> float:
        """Mean nodes that the target verified per round, 0 without rounds."""
        return sum(r.nodes for r in self.rounds) / len(self.rounds) if self.rounds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens divided by the seconds of prefill and rounds. The seconds of measuring are not included."""
        total_s = self.prefill_s + self.decode_s
        return self.new_tokens / total_s if total_s else 0.0

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase, "other" included. They sum to `decode_s`."""
        seconds = dict(self.clock.seconds)
        return seconds | {"other": max(self.decode_s - sum(seconds.values()), 0.0)}

    def summary(self) -> str:
        """Return three lines: time and tokens of a round, what limited the speed, and what would help."""
        if not self.rounds and self.warnings:
            return "\n".join(["No rounds were run.", *self.warnings])
        if not self.rounds:
            return "No rounds were run: the prompt pass gave the only new token, if any."
        seconds = self.phase_seconds
        total_s = sum(seconds.values())
        plain = sum(r.nodes == 1 for r in self.rounds) / len(self.rounds)
        shares = {name: seconds[name] / (total_s or 1.0) for name in seconds}
        first = (
            f"A round took {1e3 * total_s / len(self.rounds):.1f} ms (draft {shares['draft']:.0%}, transfer "
            f"{shares['transfer']:.0%}, verify {shares['verify']:.0%}) and emitted {self.acceptance_length:.2f} tokens "
            f"from {self.nodes_per_round:.1f} verified nodes. {plain:.0%} of the rounds were plain."
        )
        return "\n".join([first, *_bottleneck(shares, self.acceptance_length, plain)])

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phase_seconds.items())
        lines = [
            f"{self.new_tokens} tokens in {self.prefill_s + self.decode_s:.2f} s ({self.tokens_per_s:.1f} tokens/s)",
            f"{len(self.rounds)} rounds, acceptance length {self.acceptance_length:.2f}, "
            f"{self.nodes_per_round:.1f} nodes verified per round",
            f"seconds: prefill {self.prefill_s:.3f}, {phases}",
        ]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def _bottleneck(shares: dict[str, float], acceptance_length: float, plain: float) -> tuple[str, str]:
    """Return a line that says what limited the speed, and one that says what would help.

    Args:
        shares: share of the rounds' seconds by phase, "other" included.
        acceptance_length: mean tokens emitted per round.
        plain: share of plain rounds.
    """
    if plain > 0.5:
        return (
            "Limited by acceptance: the draft's tokens were not worth their time, so most rounds ran without a draft.",
            "What would help: a draft trained for this target on text like yours (`dovetail train`).",
        )
    if shares["draft"] + shares["transfer"] > 0.4:
        if shares["transfer"] >= shares["draft"]:
            return (
                f"Limited by transfers: {shares['transfer']:.0%} of the time was spent copying between devices.",
                "What would help: the draft on the target's device, or a faster connection to the GPU.",
            )
        return (
            f"Limited by drafting: {shares['draft']:.0%} of the time was spent in the draft.",
            "What would help: the draft on a GPU, fewer draft blocks, or a quantized draft with an OpenVINO target.",
        )
    if acceptance_length < 2.0:
        return (
            f"Limited by acceptance: a round emitted only {acceptance_length:.2f} tokens.",
            "What would help: a draft trained longer, with more blocks, or on text like yours (`dovetail train`).",
        )
    return (
        f"Limited by verification: {shares['verify']:.0%} of the time was spent in the target's passes.",
        "What would help: a quantized target (`dovetail export`), more CPU cores, or target layers on the GPU.",
    )


def joined_report(reports: list[GenerationReport]) -> GenerationReport:
    """Return one report of several generations that ran one after another, as the sequences of a batch do."""
    whole = GenerationReport()
    for report in reports:
        whole.prompt_tokens += report.prompt_tokens
        whole.new_tokens += report.new_tokens
        whole.prefill_s += report.prefill_s
        whole.probe_s += report.probe_s
        whole.decode_s += report.decode_s
        whole.rounds += report.rounds
        whole.warnings += [warning for warning in report.warnings if warning not in whole.warnings]
        for phase, seconds in report.clock.seconds.items():
            whole.clock.seconds[phase] += seconds
    return whole
