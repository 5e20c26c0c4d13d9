"""Timelines of a profile: gaps and tables on hand-made events."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_cases import HOST, REPLAY

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from timeline import Busy, Gap, Work, find_gaps, markdown, of_graphs, read_ranges, report_gaps  # noqa: E402


def works(*spans: tuple[int, int]) -> list[Work]:
    return [Work(f"{start}-{end}", start, end) for start, end in spans]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], Busy(0, 0, [])),
        ([(5, 9)], Busy(4, 4, [])),
        ([(0, 2), (2, 5)], Busy(5, 5, [])),
        ([(4, 6), (0, 1), (2, 3)], Busy(6, 4, [Gap(1, "0-1", "2-3"), Gap(1, "2-3", "4-6")])),
        ([(0, 4), (2, 6), (9, 10)], Busy(10, 7, [Gap(3, "2-6", "9-10")])),
        # the gap begins where the longest ends, not the one that began last
        ([(0, 8), (1, 2), (3, 4), (10, 11)], Busy(11, 9, [Gap(2, "0-8", "10-11")])),
        ([(0, 1), (2, 3), (8, 9)], Busy(9, 3, [Gap(5, "2-3", "8-9"), Gap(1, "0-1", "2-3")])),
    ],
    ids=["none", "one", "touching", "unsorted", "overlapping", "contained", "largest first"],
)
def test_gaps(spans: list[tuple[int, int]], expected: Busy) -> None:
    assert find_gaps(works(*spans)) == expected


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), min_size=1, max_size=12), st.randoms())
def test_gaps_are_the_units_of_time_in_which_nothing_runs(pieces: list[tuple[int, int]], random: Any) -> None:
    spans = [(start, start + length) for start, length in pieces]
    found = find_gaps(works(*spans))
    covered = {unit for start, end in spans for unit in range(start, end)}
    assert found.busy == len(covered)
    assert found.total == max(covered) - min(covered) + 1
    assert sum(gap.us for gap in found.gaps) == found.total - found.busy
    assert [gap.us for gap in found.gaps] == sorted((gap.us for gap in found.gaps), reverse=True)
    random.shuffle(spans)
    again = find_gaps(works(*spans))
    assert (again.total, again.busy, [gap.us for gap in again.gaps]) == (
        found.total,
        found.busy,
        [gap.us for gap in found.gaps],
    )


def test_a_replay_is_what_its_launch_put_on_the_device() -> None:
    names = [found["name"].split()[0] for found in of_graphs(REPLAY)]
    assert sorted(names) == ["Memcpy", "Memcpy", "attend_kernel", "few_rows_kernel", "join_kernel"]


def test_a_gap_over_the_limit_is_named_and_fails() -> None:
    text, fine = report_gaps(REPLAY, graphs=True, most_gap_us=5)
    assert text.splitlines() == [
        "3 kernels, 2 copies and fills in 25.0 us, 72.0% of it busy, 2 gaps",
        "      6.00 us after few_rows_kernel, before join_kernel",
        "      1.00 us after Memcpy HtoD (Pinned -> Device), before attend_kernel",
        "1 gap of more than 5 us",
    ]
    assert not fine


def test_a_gap_within_the_limit_will_do_and_without_graphs_there_is_no_verdict() -> None:
    text, fine = report_gaps(REPLAY, graphs=True, most_gap_us=6)
    assert fine
    assert text.endswith("\nno gap of more than 6 us")
    text, fine = report_gaps(REPLAY, graphs=False, most_gap_us=5)
    assert fine
    assert text.startswith("4 kernels, 2 copies and fills in 65.0 us")
    assert "of more than" not in text


def test_a_trace_without_a_replay_fails_in_one_sentence() -> None:
    launched_singly = [found for found in REPLAY if "GraphLaunch" not in found["name"]]
    for events, graphs in ((launched_singly, True), ([], True), ([], False)):
        text, fine = report_gaps(events, graphs, 5)
        assert re.match("gaps: expected work of .* in the trace, got none: .*CUPTI", text)
        assert not fine


def test_ranges_are_summed_by_path_and_operators_by_what_they_take_themselves() -> None:
    rows = read_ranges(HOST[::-1])
    inside = [("encode",), ("codes",), ("codes", "layer")]
    assert list(rows) == [("decision",), *(("decision", *path) for path in inside)]
    encode, codes, layer = rows["decision", "encode"], rows["decision", "codes"], rows["decision", "codes", "layer"]
    assert (encode.times, encode.us, encode.calls, encode.within) == (1, 30, 2, 25)
    assert encode.operators == {"aten::linear": 5, "aten::addmm": 15, "aten::gelu": 5}
    assert (codes.times, codes.us, codes.calls, codes.within) == (1, 60, 2, 28)
    assert (layer.times, layer.us, layer.calls, layer.within) == (2, 50, 2, 28)
    whole = rows["decision",]
    assert (whole.times, whole.us, whole.calls, whole.within) == (2, 200, 4, 53)
    assert whole.operators.total() == whole.within


def test_the_table_is_per_decision_and_adds_up() -> None:
    lines = markdown(read_ranges(HOST), 2).splitlines()
    assert lines[2:] == [
        "| decision | 0.10 | 100.0% | 1 | 2 | 0.07 | aten::mm 0.01, aten::addmm 0.01, aten::linear 0.00 |",
        "| encode | 0.01 | 15.0% | 0.5 | 1 | 0.00 | aten::addmm 0.01, aten::linear 0.00, aten::gelu 0.00 |",
        "| codes | 0.03 | 30.0% | 0.5 | 1 | 0.02 | aten::mm 0.01 |",
        "| codes / layer | 0.03 | 25.0% | 1 | 1 | 0.01 | aten::mm 0.01 |",
        "| in no stage | 0.06 | 55.0% | | | | |",
    ]
