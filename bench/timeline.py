"""What a chrome trace says: how busy the device was, and which range the host's milliseconds went into.

Plain arithmetic on the events that ``torch.profiler`` exports (times in us); nothing here needs PyTorch or a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MOST_GAPS, MOST_OPERATORS = 5, 3  # that are printed
#: What kineto calls work of the device; ``gpu_user_annotation``, the shadow of a host range, is none.
KERNEL, COPIES = "kernel", ("gpu_memcpy", "gpu_memset")
RANGE, OPERATOR = "user_annotation", "cpu_op"
WHOLE = "decision"

Event = dict[str, Any]
Path = tuple[str, ...]


class Work(NamedTuple):
    """A kernel, copy or fill on the device, and when it began and ended, in us."""

    name: str
    start: float
    end: float


class Gap(NamedTuple):
    """A while in us in which the device had nothing to do, and what lay on either side."""

    us: float
    after: str
    before: str


class Busy(NamedTuple):
    """From the first start to the last end in us, how much of it something ran, and the gaps, the largest first."""

    total: float
    busy: float
    gaps: list[Gap]


def find_gaps(works: list[Work]) -> Busy:
    """Find the gaps between pieces of work in any order; what overlaps is busy once."""
    if not works:
        return Busy(0.0, 0.0, [])
    first, *others = sorted(works, key=lambda work: work.start)
    last, idle, gaps = first, 0.0, []
    for work in others:
        if work.start > last.end:
            gaps.append(Gap(work.start - last.end, last.name, work.name))
            idle += work.start - last.end
        if work.end > last.end:
            last = work
    total = last.end - first.start
    return Busy(total, total - idle, sorted(gaps, key=lambda gap: -gap.us))


def device_events(events: list[Event]) -> list[Event]:
    """Kernels, copies and fills among the events."""
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in (KERNEL, *COPIES)]


def of_graphs(events: list[Event]) -> list[Event]:
    """What graph launches put on the device: a node carries the correlation of the launch of its graph.

    Left out is what lies before the graph: PyTorch itself may fill two small tensors before a replay.
    """
    launches = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "GraphLaunch" in event["name"]
    }
    return [event for event in device_events(events) if event.get("args", {}).get("correlation") in launches]


def report_gaps(events: list[Event], graphs: bool, most_gap_us: float) -> tuple[str, bool]:
    """Say how busy the device was in one decision, and whether that will do.

    Args:
        events: of a chrome trace.
        graphs: whether a graph was replayed; only then there is a verdict, and only its own nodes count.
        most_gap_us: the largest gap that will do.
    """
    found = of_graphs(events) if graphs else device_events(events)
    if not found:
        what = "a graph's replay" if graphs else "the device"
        return f"gaps: expected work of {what} in the trace, got none: can this PyTorch use CUPTI here?", False
    busy = find_gaps([Work(event["name"], event["ts"], event["ts"] + event["dur"]) for event in found])
    kernels = sum(event["cat"] == KERNEL for event in found)
    lines = [
        f"{kernels} kernels, {len(found) - kernels} copies and fills in {busy.total:.1f} us, "
        f"{100 * busy.busy / max(busy.total, 1e-9):.1f}% of it busy, {len(busy.gaps)} gaps"
    ]
    lines += [f"  {gap.us:8.2f} us after {gap.after[:60]}, before {gap.before[:60]}" for gap in busy.gaps[:MOST_GAPS]]
    wide = sum(gap.us > most_gap_us for gap in busy.gaps)
    if graphs:
        lines.append(f"{wide or 'no'} gap{'s' * (wide > 1)} of more than {most_gap_us:g} us")
    return "\n".join(lines), not (graphs and wide)


@dataclass
class Row:
    """What happened inside all ranges of one path: how many there were, their us, operators called from Python, the us
    within those, and the us of every operator less that of the operators it called."""

    times: int = 0
    us: float = 0.0
    calls: int = 0
    within: float = 0.0
    operators: Counter[str] = field(default_factory=Counter)


@dataclass
class _Open:
    """An event that has not ended yet, and the ranges it is in."""

    event: Event
    path: Path
    end: float


def read_ranges(events: list[Event]) -> dict[Path, Row]:
    """Sum up ranges, and the operators in them, by path: ``("decision", "codes")``; an index at the end falls away."""
    rows: dict[Path, Row] = {}
    for event, parent, path in _nested(events):
        name, us = event["name"], event["dur"]
        if event["cat"] == RANGE:
            row = rows.setdefault(path, Row())
            row.times += 1
            row.us += us
            continue
        called_by = parent["name"] if parent is not None and parent["cat"] == OPERATOR else None
        for depth in range(len(path)):
            row = rows[path[: depth + 1]]
            row.operators[name] += us
            if called_by is None:
                row.calls += 1
                row.within += us
            else:
                row.operators[called_by] -= us
    return rows


def _nested(events: list[Event]) -> Iterator[tuple[Event, Event | None, Path]]:
    """Ranges and operators of every thread in the order they began, each with what it is in, and its path of ranges."""
    host = [event for event in events if event.get("ph") == "X" and event.get("cat") in (RANGE, OPERATOR)]
    host = [event for event in host if not event["name"].startswith("ProfilerStep#")]
    around: list[_Open] = []
    # what began and ended together: the range is around the operator
    for event in sorted(host, key=lambda event: (str(event["tid"]), event["ts"], -event["dur"], event["cat"] != RANGE)):
        while around and (around[-1].event["tid"] != event["tid"] or around[-1].end <= event["ts"]):
            around.pop()
        path = around[-1].path if around else ()
        if event["cat"] == RANGE:
            path = (*path, re.sub(r" \d+$", "", event["name"]))
        yield event, around[-1].event if around else None, path
        around.append(_Open(event, path, event["ts"] + event["dur"]))


def markdown(rows: dict[Path, Row], decisions: int) -> str:
    """A table of the ranges in a decision, per decision; its last line is what lies in no stage."""
    whole = rows[(WHOLE,)]
    lines = [
        "| range | ms | share | ranges | operator calls | outside operators, ms | the largest operators, ms |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for path, row in rows.items():
        if path[0] != WHOLE:
            continue
        ms = 1e-3 / decisions
        largest = ", ".join(f"{name} {ms * us:.2f}" for name, us in row.operators.most_common(MOST_OPERATORS))
        lines.append(
            f"| {' / '.join(path[1:]) or WHOLE} | {ms * row.us:.2f} | {row.us / whole.us:.1%} | "
            f"{row.times / decisions:g} | {row.calls / decisions:g} | {ms * (row.us - row.within):.2f} | {largest} |"
        )
    rest = whole.us - sum(row.us for path, row in rows.items() if len(path) == 2 and path[0] == WHOLE)
    lines.append(f"| in no stage | {1e-3 * rest / decisions:.2f} | {rest / whole.us:.1%} | | | | |")
    return "\n".join(lines)
