"""Figures of a comparison of engines, as tables and as one JSON line."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .compare import BenchResult
from .provenance import provenance
from .roofline import Roofline


@dataclass(frozen=True)
class Floors:
    """Milliseconds that a pass takes at least.

    Attributes:
        memory_ms: to read the weights once, whatever the number of rows.
        arithmetic_ms: by the number of rows; None where the engine's instructions are not known.
    """

    memory_ms: float
    arithmetic_ms: dict[int, float] | None

    def ms(self, rows: int) -> float:
        """Return the higher one of the two floors."""
        return max(self.memory_ms, self.arithmetic_ms[rows] if self.arithmetic_ms else 0.0)

    def limit(self, rows: int) -> str:
        """Return the name of the higher one: "memory" or "arithmetic"."""
        return "memory" if self.ms(rows) == self.memory_ms else "arithmetic"


@dataclass(frozen=True)
class Passes:
    """Median milliseconds of passes, by engine and by number of rows.

    Attributes:
        pass_ms: whole passes.
        kernels_ms: the products of the CPU kernels in these passes, for engines that use them.
        other_ms: the rest of the same passes: attention, norms, quantizing activations, Python.
    """

    pass_ms: dict[str, dict[int, float]]
    kernels_ms: dict[str, dict[int, float]]
    other_ms: dict[str, dict[int, float]]


@dataclass
class EnginesResult:
    """Figures of all engines.

    Attributes:
        context: tokens in the cache before each timed pass.
        parameters: number of parameters of the target.
        multiply_adds: of a row, in the linear layers.
        roofline: limits of this machine; None without the library of CPU kernels.
        passes: times of passes. "torch" is transformers alone.
        floors: by engine, for those whose weights are known.
        texts: by engine: speeds of whole generations. All but "torch" and those without drafts.
        plain_tokens_per_s: by engine without drafts: its median speed.
        settings: what was measured.
    """

    context: int
    parameters: int
    multiply_adds: int
    roofline: Roofline | None
    passes: Passes
    floors: dict[str, Floors]
    texts: dict[str, BenchResult]
    plain_tokens_per_s: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def differences(self) -> int:
        """Number of texts with a draft that differ from plain ones other than at a tie."""
        return sum(text.differences for text in self.texts.values())

    def table(self) -> str:
        """The result as Markdown tables whose columns are aligned."""
        parts = [] if self.roofline is None else [self.roofline.lines()]
        parts += [
            aligned(rows) for rows in (self._passes(), self._floors(), self._others(), self._speeds()) if rows[1:]
        ]
        return "\n\n".join(parts)

    def json_line(self) -> str:
        """All figures with command, versions and machine, as one line of JSON."""
        return json.dumps(asdict(self) | provenance())

    def _passes(self) -> list[list[str]]:
        rows, pass_ms = self._row_counts(), self.passes.pass_ms
        most = 8 if 8 in rows else rows[-1]
        lines = [[f"ms per pass, {self.context} tokens of context", *(f"N={n}" for n in rows), f"V({most})/V(1)"]]
        for name, ms in pass_ms.items():
            lines.append([name, *(f"{ms[n]:.1f}" for n in rows), f"{ms[most] / ms[rows[0]]:.2f}"])
        return lines

    def _floors(self) -> list[list[str]]:
        rows = self._row_counts()
        lines = [["times the floor (m: memory, a: arithmetic)", *(f"N={n}" for n in rows), "memory floor, ms"]]
        for name, floors in self.floors.items():
            times = (f"{self.passes.pass_ms[name][n] / floors.ms(n):.2f} {floors.limit(n)[0]}" for n in rows)
            lines.append([name, *times, f"{floors.memory_ms:.1f}"])
        return lines

    def _others(self) -> list[list[str]]:
        rows = self._row_counts()
        lines = [["ms of a pass outside of the kernels", *(f"N={n}" for n in rows)]]
        return lines + [[name, *(f"{ms[n]:.1f}" for n in rows)] for name, ms in self.passes.other_ms.items()]

    def _speeds(self) -> list[list[str]]:
        columns = ["engine", "budget", "plain tokens/s", "draft tokens/s", "ratio to own plain", "ratio to torch plain"]
        lines = [[*columns, "acceptance length", "draft ms", "verify ms", "accept ms", "texts"]]
        first = next(iter(self.texts.values())).plain_tokens_per_s
        for name, text in self.texts.items():
            phases = (f"{text.phase_ms_per_round[phase]:.1f}" for phase in ("draft", "verify", "accept"))
            speeds = f"{text.plain_tokens_per_s:.1f}", f"{text.draft_tokens_per_s:.1f}"
            ratios = f"{text.ratio:.2f}", f"{text.draft_tokens_per_s / first:.2f}", f"{text.acceptance_length:.2f}"
            lines.append([name, str(text.settings["budget"]), *speeds, *ratios, *phases, text.about_texts()])
        for name, speed in self.plain_tokens_per_s.items():
            lines.append([name, "-", f"{speed:.1f}", "-", "-", f"{speed / first:.2f}", *"-----"])
        return lines

    def _row_counts(self) -> list[int]:
        return list(next(iter(self.passes.pass_ms.values())))


def aligned(rows: list[list[str]]) -> str:
    """Return rows of cells, the first one with the titles, as a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
