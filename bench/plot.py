"""One plot of a results file: grouped bars of ours and every peer, as multiples of the row's floor.

An SVG carries a digest of the rows and of this file, so that whether it is fresh can be told without matplotlib, whose
versions do not draw alike to the byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

OURS = "ours"
# of Okabe and Ito's colours, which people with any colour vision can tell apart
BLUE, LIGHT, ORANGE, GREY = "#0072b2", "#56b4e9", "#e69f00", "#555555"
INCHES_WIDE, BAR_INCHES, GAP_BARS, FRAME_INCHES = 9.0, 0.19, 0.6, 0.9
#: What somebody waits for, a decision or a training step; the other rows are parts of these.
WHOLE = ("decide", "generate", "train", "sample")
FARTHEST = 1000  # a row this far above its floor, as a host cost is, is not about the floor: it is left out


def digest(report: dict[str, Any]) -> str:
    """Sha256 of the results and of the code that draws them."""
    rows = json.dumps(report, sort_keys=True).encode()
    return hashlib.sha256(rows + Path(__file__).read_bytes()).hexdigest()


def is_fresh(svg: str, report: dict[str, Any]) -> bool:
    """Tell whether ``svg`` was drawn from this report by this code."""
    return f"sha256 {digest(report)}" in svg


def shown_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of whole tasks, and without any of those all that have a floor worth comparing with."""
    rows = [row for row in report["rows"] if row["floor_ms"] and row["ours_ms"] < FARTHEST * row["floor_ms"]]
    return [row for row in rows if row["id"].partition("/")[0] in WHOLE] or rows


def draw(report: dict[str, Any]) -> str:
    """Return the plot as SVG: the same text for the same report and the same matplotlib."""
    import matplotlib

    salt = {"svg.fonttype": "none", "svg.hashsalt": report["device"]}
    about = {"Date": None, "Title": f"Benches on {report['device']}", "Description": f"sha256 {digest(report)}"}
    buffer = io.StringIO()
    with matplotlib.rc_context(salt):
        make_figure(report).savefig(buffer, format="svg", metadata=about)
    return re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.M)


def make_figure(report: dict[str, Any]) -> Any:
    """Return the matplotlib figure, as high as its bars need."""
    from matplotlib.figure import Figure

    rows = shown_rows(report)
    bars = sum(1 + len(row["peers"]) + GAP_BARS for row in rows)
    figure = Figure(figsize=(INCHES_WIDE, FRAME_INCHES + BAR_INCHES * bars), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    draw_bars(axes, rows)
    dress(axes, report, rows)
    return figure


def draw_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """From the floor, which is 1, to what each side takes; its name and milliseconds stand at the end of a bar."""
    y, ticks = 0.0, []
    for row in rows:
        sides = {OURS: row["ours_ms"], **row["peers"]}
        for i, (name, ms) in enumerate(sides.items()):
            times = ms / row["floor_ms"]
            color = BLUE if name == OURS else ORANGE if name.endswith("torch.compile") else LIGHT
            axes.barh(y + i, times - 1, left=1, height=0.86, color=color, linewidth=0)
            told = f"{name}: {ms:.3g} ms" + ("" if name == OURS else f", {ms / row['ours_ms']:.2f} x ours")
            axes.text(max(times, 1) * 1.03, y + i, told, va="center", fontsize=7, color="black")
        ticks.append(y + (len(sides) - 1) / 2)
        y += len(sides) + GAP_BARS
    axes.set_yticks(ticks, [row["id"] for row in rows], fontsize=8)
    axes.set_ylim(y - GAP_BARS, -1)


def dress(axes: Any, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Scale, title and grid; half of the axis on the right is room for the words of the longest bar."""
    from matplotlib.ticker import LogLocator

    taken = [ms / row["floor_ms"] for row in rows for ms in (row["ours_ms"], *row["peers"].values())]
    low, high = min([1.0, *taken]), max([2.0, *taken])
    axes.set_xscale("log")
    axes.set_xlim(low if low == 1 else low / 1.1, high * high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("times the floor (1: what memory or arithmetic allow; shorter is faster)", fontsize=8)
    axes.set_title(f"{report['device']}, commit {report['commit'][:9]}", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
