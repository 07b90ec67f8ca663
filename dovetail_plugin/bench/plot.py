"""Draws the figures of `dovetail bench` as one picture with four panels.

Takes a `BenchResult`, its rounds and a `Sweep`, and writes an image file. It measures nothing and runs no model.
matplotlib, an optional package, is imported only when something is drawn.
"""

import importlib.util
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import Round
from ..tree import TreeBudget
from .compare import BenchResult
from .sweep import Sweep

FORMATS = (".png", ".pdf", ".svg")
"""Suffixes of the files that can be written."""

COLORS = {
    "draft": "#4c72b0",
    "transfer": "#8172b3",
    "verify": "#dd8452",
    "accept": "#55a868",
    "other": "#8c8c8c",
}
"""Color of each phase of a round."""


def check_file(file: Path) -> None:
    """Check that a plot can be written to `file`, before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is not one of `FORMATS`, or the directory does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install '.[plot]' in a checkout.")
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"{str(file)!r} is not a valid plot file. Use a name that ends in {', '.join(FORMATS)}.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{str(file.parent)!r} is not a directory. Create it before plotting to {file.name}.")


def draw(file: Path, result: BenchResult, rounds: Sequence[Round], sweep: Sweep) -> None:
    """Write the picture to a file.

    Args:
        file: where to write; its suffix is one of `FORMATS`.
        result: figures of all prompts.
        rounds: rounds of all drafted generations behind `result`.
        sweep: speeds of fixed budgets.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: see `check_file`.
    """
    check_file(file)
    picture(result, rounds, sweep).savefig(file, dpi=120)


def picture(result: BenchResult, rounds: Sequence[Round], sweep: Sweep) -> Any:
    """Build the matplotlib `Figure`; see `draw` for the arguments."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    (phases, depths), (seconds, budgets) = figure.subplots(2, 2)
    figure.suptitle(
        _title(result), fontsize=13, color="firebrick" if result.synthetic_acceptance is not None else "black"
    )
    _draw_phases(phases, result)
    _draw_depths(depths, rounds)
    _draw_seconds(seconds, rounds, result.settings.get("budget", "policy"))
    _draw_budgets(budgets, sweep)
    for panel in (phases, depths, seconds, budgets):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure


def _title(result: BenchResult) -> str:
    settings = result.settings
    parts = [str(settings[name]) for name in ("target", "weights", "dtype") if name in settings]
    if "draft_device" in settings:
        parts.append(f"draft on {settings['draft_device']}")
    parts.append(
        f"plain {result.plain_tokens_per_s:.1f}, with the draft {result.draft_tokens_per_s:.1f} tokens/s: "
        f"ratio {result.ratio:.2f}"
    )
    lines = [", ".join(parts)]
    if result.synthetic_acceptance is not None:
        lines.append(f"SYNTHETIC: acceptance simulated at {result.synthetic_acceptance:.2f}")
    return "\n".join(lines)


def _draw_phases(panel: Any, result: BenchResult) -> None:
    """Mean milliseconds of each phase of a round and its share."""
    names = list(result.phase_ms_per_round)
    values = list(result.phase_ms_per_round.values())
    bars = panel.barh(names, values, color=[COLORS.get(name, "#8c8c8c") for name in names])
    total = result.round_ms or 1.0
    panel.bar_label(bars, [f"{_number(ms)} ms, {ms / total:.1%}" for ms in values], padding=4)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.4 * max(*values, 1e-3))  # room for the labels
    panel.set_xlabel("ms per round")
    panel.set_title(f"Phases of a round of {_number(result.round_ms)} ms (mean of {result.rounds})")
    panel.grid(axis="x", alpha=0.3)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _draw_depths(panel: Any, rounds: Sequence[Round]) -> None:
    """Share of rounds whose tree, and whose accepted path, reached each depth."""
    deepest = max([r.depth for r in rounds] or [0])
    levels = range(1, max(deepest, 1) + 1)
    count = max(len(rounds), 1)
    drafted = [sum(r.depth >= level for r in rounds) / count for level in levels]
    accepted = [sum(r.emitted > level for r in rounds) / count for level in levels]
    panel.bar(levels, drafted, width=0.8, color="#d0d7e5", label="drafted")
    bars = panel.bar(levels, accepted, width=0.55, color=COLORS["draft"], label="accepted")
    panel.bar_label(bars, [f"{share:.0%}" for share in accepted], padding=2, fontsize=9)
    panel.set_ylim(0, 1.25)  # room for the legend
    panel.set_xticks(levels)
    panel.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.set_xlabel("depth below the last token")
    panel.set_ylabel("share of rounds that reached it")
    title = f"Acceptance by depth: {sum(r.emitted for r in rounds) / count:.2f} tokens per round"
    expected = [r.predicted_tokens for r in rounds if r.predicted_tokens is not None]
    if expected:
        title += f", {statistics.fmean(expected):.2f} predicted"
    panel.set_title(title)
    panel.legend(loc="upper right", ncols=2)
    panel.grid(axis="y", alpha=0.3)


def _draw_seconds(panel: Any, rounds: Sequence[Round], budget: str) -> None:
    """Predicted and measured milliseconds of each round, as points."""
    known = [r for r in rounds if r.predicted_s]
    panel.set_xlabel("predicted ms of a round")
    panel.set_ylabel("measured ms")
    if not known:
        panel.set_title("Predicted and measured time of rounds")
        panel.text(
            0.5, 0.5, f"no predictions: every round used {budget}", ha="center", va="center", transform=panel.transAxes
        )
        panel.set(xticks=[], yticks=[])
        return
    predicted = [1e3 * r.predicted_s for r in known if r.predicted_s]
    measured = [1e3 * r.total_s for r in known]
    points = panel.scatter(predicted, measured, c=[r.nodes for r in known], s=14, alpha=0.6, cmap="viridis")
    panel.figure.colorbar(points, ax=panel, label="nodes verified")
    ends = _limits([*predicted, *measured])
    panel.plot(ends, ends, color="black", linewidth=1, linestyle="--", label="as predicted")
    panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (panel.xaxis, panel.yaxis):
        _plain_ticks(axis, *ends)
    error = statistics.median(abs(m / p - 1) for p, m in zip(predicted, measured, strict=True))
    panel.set_title(f"Predicted and measured time of rounds: median error {error:.1%}")
    panel.legend(loc="upper left")
    panel.grid(alpha=0.3)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that shows nearly all values. Outliers are cut, because they would squeeze the others."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return 0.8 * ordered[math.floor(0.005 * last)], 1.25 * ordered[math.ceil(0.99 * last)]


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Set ticks of a logarithmic axis at simple multiples of powers of ten, written as plain numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 1.5, 2, 3, 5, 7)]
    axis.set_ticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_budgets(panel: Any, sweep: Sweep) -> None:
    """Tokens/s of fixed budgets over their nodes, with the draft's own budget and plain generation as lines."""
    for name, color, marker, chosen in (
        ("chains", COLORS["accept"], "o", [b for b in sweep.tokens_per_s if b.top_k == 1]),
        ("trees", COLORS["draft"], "s", [b for b in sweep.tokens_per_s if b.top_k > 1]),
    ):
        _draw_series(panel, sweep, sorted(chosen, key=lambda b: b.nodes), label=name, color=color, marker=marker)
    panel.axhline(sweep.own_tokens_per_s, color=COLORS["verify"], label=f"{sweep.own}: {sweep.own_tokens_per_s:.1f}")
    panel.axhline(
        sweep.plain_tokens_per_s, color="black", linestyle="--", label=f"plain: {sweep.plain_tokens_per_s:.1f}"
    )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    sizes = sorted({budget.nodes for budget in sweep.tokens_per_s})
    panel.set_xlim(0.75 * sizes[0], 1.5 * sizes[-1])
    speeds = [sweep.own_tokens_per_s, sweep.plain_tokens_per_s, *sweep.tokens_per_s.values()]
    panel.set_ylim(0, 1.3 * max(speeds))  # room for the legend
    panel.set_xlabel("nodes verified per round (labels: nodes/depth/top_k)")
    panel.set_ylabel("median tokens/s, prompt included")
    panel.set_title(f"Fixed budgets, {sweep.own} and plain generation")
    panel.legend(loc="upper left", ncols=2)
    panel.grid(alpha=0.3)


def _draw_series(panel: Any, sweep: Sweep, budgets: Sequence[TreeBudget], **style: Any) -> None:
    panel.plot([b.nodes for b in budgets], [sweep.tokens_per_s[b] for b in budgets], **style)
    for budget in budgets:
        panel.annotate(
            str(budget),
            (budget.nodes, sweep.tokens_per_s[budget]),
            (0, -15 if budget.top_k == 1 else 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=style["color"],
            bbox=dict(facecolor="white", alpha=0.7, edgecolor="none", pad=0.5),
        )
