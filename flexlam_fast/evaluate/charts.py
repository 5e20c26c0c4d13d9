"""Charts as inline SVG that takes its colours and its font from the page, so that it reads on light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from flexlam_fast.data.extras import need
from flexlam_fast.evaluate.summary import Score
from flexlam_fast.evaluate.table import RolloutTable, ScenarioScores

#: Stand-ins that matplotlib writes into the SVG, and the CSS variables of the page that replace them.
_INK, _MUTED, _GRID = "#010203", "#020304", "#030405"
_SERIES = ("#040506", "#050607", "#060708", "#070809")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--rule)",
    **{color: f"var(--series-{i})" for i, color in enumerate(_SERIES)},
}
_SIZE = (4.9, 3.3)


def return_chart(scenario: ScenarioScores, series: int = 0) -> str:
    """Return against k with 95% intervals; random and expert are lines with their intervals as bands.

    Raises:
        DataError: if matplotlib is not installed.
    """
    figure, axes = _axes([cell.budget for cell in scenario.cells])
    for name, level, style in (("expert", scenario.expert, "--"), ("random", scenario.random, ":")):
        _level(axes, name, level, style)
    ks = [cell.budget for cell in scenario.cells]
    color = _SERIES[series % len(_SERIES)]
    means, errors = [c.score.mean for c in scenario.cells], [c.score.ci95 for c in scenario.cells]
    axes.errorbar(ks, means, errors, color=color, marker="o", markersize=6, linewidth=2, capsize=4, zorder=3)
    axes.set_ylabel("return", color=_MUTED)
    axes.margins(y=0.12)
    return _svg(figure, f"return-{scenario.name}")


def latency_chart(table: RolloutTable) -> str:
    """Mean milliseconds per decision against k for every scenario; the bars reach from p50 to p99."""
    ks = [cell.budget for cell in table.scenarios[0].cells]
    figure, axes = _axes(ks)
    for number, scenario in enumerate(table.scenarios):
        times = [cell.latency for cell in scenario.cells]
        # Two scenarios cost the same: a nudge keeps their bars apart.
        nudge = 1.035 ** (number - (len(table.scenarios) - 1) / 2)
        down = [max(0.0, t.mean - t.p50) for t in times]
        up = [max(0.0, t.p99 - t.mean) for t in times]
        axes.errorbar(
            [k * nudge for k in ks],
            [t.mean for t in times],
            [down, up],
            color=_SERIES[number % len(_SERIES)],
            marker="o",
            markersize=6,
            linewidth=2,
            capsize=4,
            label=scenario.name,
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms per decision", color=_MUTED)
    axes.legend(frameon=False, labelcolor=_INK, loc="upper left")
    return _svg(figure, "latency")


def _axes(ks: Sequence[int]) -> tuple[Any, Any]:
    figure = need("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlim(min(ks) / 1.25, max(ks) * 1.25)
    axes.set_xlabel("budget k (codes per decision)", color=_MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    return figure, axes


def _level(axes: Any, name: str, level: Score, style: str) -> None:
    """A reference line with its interval and, outside the right edge, its name."""
    axes.axhspan(level.mean - level.ci95, level.mean + level.ci95, color=_MUTED, alpha=0.12, linewidth=0)
    axes.axhline(level.mean, color=_MUTED, linestyle=style, linewidth=1.5)
    axes.annotate(
        name,
        (1, level.mean),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=_MUTED,
    )


def _svg(figure: Any, name: str) -> str:
    """Render to SVG without anything that a page would load, and with the page's colours, font and unique ids."""
    matplotlib = need("matplotlib")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    # The font is written in one property or in two, depending on matplotlib's version.
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", text).replace("*{", "svg *{")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    width, height = (math.floor(n * 72) for n in _SIZE)
    opening = f'<svg role="img" aria-label="{name}" viewBox="0 0 {width} {height}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"<svg[^>]*>", opening, text, count=1)
