"""Draws the figures of `dovetail bench --engines` as one picture with two panels. It measures nothing."""

from pathlib import Path
from typing import Any

from .engines import EnginesResult
from .plot import COLORS, check_file


def draw(file: Path, result: EnginesResult) -> None:
    """Write the picture to a file.

    Args:
        file: where to write; its suffix is one of `plot.FORMATS`.
        result: figures of all engines.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: see `plot.check_file`.
    """
    check_file(file)
    picture(result).savefig(file, dpi=120)


def picture(result: EnginesResult) -> Any:
    """Build the matplotlib `Figure`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 5.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    passes, speeds = figure.subplots(1, 2)
    title = f"{result.settings.get('target', 'target')}, {result.parameters / 1e6:.0f} million parameters"
    if result.roofline is not None:
        title += f", {result.roofline.instructions}, {result.roofline.read_bytes_per_s / 1e9:.1f} GB/s"
    figure.suptitle(title, fontsize=13)
    _draw_passes(passes, result)
    _draw_speeds(speeds, result)
    for panel in (passes, speeds):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure


def _draw_passes(panel: Any, result: EnginesResult) -> None:
    """Milliseconds of passes over the number of rows, and the floors that are known, dashed."""
    for name, by_rows in result.passes.pass_ms.items():
        (line,) = panel.plot(list(by_rows), list(by_rows.values()), marker="o", markersize=4, label=name)
        floors = result.floors.get(name)
        if floors is not None:
            panel.plot(list(by_rows), [floors.ms(n) for n in by_rows], linestyle="--", color=line.get_color())
    counts = list(next(iter(result.passes.pass_ms.values())))
    panel.set(xscale="log", yscale="log", xticks=counts)
    panel.set_xticks([], minor=True)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("rows of a pass (N)")
    panel.set_ylabel("ms")
    panel.set_title(f"A pass behind {result.context} tokens (dashed: floor)")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    panel.legend(loc="upper left", fontsize=9, ncols=2)
    panel.grid(alpha=0.3, which="both")


def _draw_speeds(panel: Any, result: EnginesResult) -> None:
    """Tokens/s of whole generations without and with the draft."""
    names = list(result.texts)
    for shift, label, color, speeds in (
        (-0.2, "plain", "#8c8c8c", [text.plain_tokens_per_s for text in result.texts.values()]),
        (0.2, "with the draft", COLORS["draft"], [text.draft_tokens_per_s for text in result.texts.values()]),
    ):
        bars = panel.barh([place + shift for place in range(len(names))], speeds, height=0.38, color=color, label=label)
        panel.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    most = max(max(text.plain_tokens_per_s, text.draft_tokens_per_s) for text in result.texts.values())
    panel.set_xlim(0, 1.9 * most)  # room for the legend
    panel.set_xlabel("median tokens/s, prompt included")
    panel.set_title("Whole generations")
    panel.legend(loc="lower right")
    panel.grid(axis="x", alpha=0.3)
