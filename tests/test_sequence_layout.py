"""Layout of a sequence: the window rule as a mask, positions, and which token predicts which code."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import shaped

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.sequence.layout import CODES, OBSERVATION, Layout, Placed, context, history_layout


def rule(t: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Design section 3, word for word: the segments ``(s, kind)`` of the decision at ``t``, in time order."""
    first = t - (window - 1)
    observations = {(s, OBSERVATION) for s in range(t) if s % stride == 0 and first <= s < t}
    codes = {(s, CODES) for s in range(t) if first <= s < t}
    return [*sorted(observations | codes), (t, OBSERVATION)]


def attended(layout: Layout, token: int) -> set[tuple[int, int, bool]]:
    """Segments ``(frame, kind, scratch)`` that a token attends to, each wholly or, for its own, up to itself."""
    row, found = layout.mask[token], set()
    for s in layout.segments:
        part = row[s.start : s.start + s.length]
        own = s.start <= token < s.start + s.length
        if own:
            assert part.tolist() == [s.start + j <= token for j in range(s.length)], "causal within a segment"
        elif part.any():
            assert part.all(), "a segment is in context wholly or not at all"
        if own or part.any():
            found.add((s.frame, s.kind, s.scratch))
    return found


def in_window(s: Placed, entered: int, window: int, stride: int, phase: int) -> set[tuple[int, int, bool]]:
    """What ``s`` must attend to by the rule: the context at the decision it entered at, up to itself in time."""
    seen = {(f - phase, kind, False) for f, kind in rule(entered + phase, window, stride) if f >= phase}
    return {x for x in seen if (x[0], x[1]) < (s.frame, s.kind)} | {(s.frame, s.kind, s.scratch)}


@settings(max_examples=120, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 2), st.integers(1, 30),
    st.integers(0, 5), st.sampled_from(["all", "last"]),
)  # fmt: skip
def test_every_token_attends_to_exactly_its_context(
    window: int, stride: int, slots: int, side: int, frames: int, phase: int, decisions: str
) -> None:
    phase %= stride
    cfg = shaped(slots, side, window, stride)
    layout = history_layout(cfg, frames, phase, decisions)
    patches = side * side
    chosen = range(frames) if decisions == "all" else [frames - 1]
    blocks = {(s.frame, s.kind, s.scratch) for s in layout.segments}
    expected = {(i, OBSERVATION, False) for i in range(frames) if (phase + i) % stride == 0 or i in chosen}
    expected |= {(i, CODES, False) for i in range(frames - 1)}
    expected |= {(i, CODES, True) for i in chosen if slots > 1}
    assert blocks == expected
    assert len(layout.segments) == len(blocks)
    assert sum(s.length for s in layout.segments) == len(layout.positions) == len(layout.mask)
    for s in layout.segments:
        # an observation enters when it is seen, codes when the next frame has come, scratch codes at their own decision
        entered = s.frame if s.kind == OBSERVATION or s.scratch else s.frame + 1
        for token in (s.start, s.start + s.length - 1):
            assert attended(layout, token) == in_window(s, entered, window, stride, phase)
        assert s.length == (patches if s.kind == OBSERVATION else slots - 1 if s.scratch else slots)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.integers(0, 5))
def test_positions_count_persistent_tokens_and_only_grow(
    window: int, stride: int, slots: int, frames: int, phase: int
) -> None:
    phase %= stride
    cfg = shaped(slots, 2, window, stride)
    layout = history_layout(cfg, frames, phase, "all")
    place = {
        (s.frame, s.kind, s.scratch): layout.positions[s.start : s.start + s.length].tolist() for s in layout.segments
    }
    count = 0  # of persistent tokens, as a session would count them
    for t in range(frames):
        if t:
            assert place[t - 1, CODES, False] == list(range(count, count + slots))
            count += slots
        assert place[t, OBSERVATION, False] == list(range(count, count + 4))
        after = count + 4
        if slots > 1:
            assert place[t, CODES, True] == list(range(after, after + slots - 1))
        count = after if (phase + t) % stride == 0 else count


@pytest.mark.parametrize("decisions", ["all", "last"])
@pytest.mark.parametrize(
    ("window", "stride", "slots", "phase"), [(8, 4, 5, 0), (8, 4, 5, 3), (5, 2, 1, 1), (3, 7, 2, 2)]
)
def test_every_code_is_predicted_once_by_the_token_before_it(
    window: int, stride: int, slots: int, phase: int, decisions: str
) -> None:
    frames = 2 * window + 1
    layout = history_layout(shaped(slots, 2, window, stride), frames, phase, decisions)
    asked = list(zip(layout.frame.tolist(), layout.slot.tolist(), strict=True))
    assert len(set(asked)) == len(asked)
    missing = {(i, j) for i in range(frames) for j in range(slots)} - set(asked)
    # nothing stands before the first block of a window that starts off the grid
    assert missing == ({(0, 0)} if decisions == "last" and phase else set())
    places = {(s.frame, s.kind, s.scratch): s for s in layout.segments}
    for source, (i, j) in zip(layout.source.tolist(), asked, strict=True):
        now = decisions == "all" or i == frames - 1
        if now and j == 0:
            o = places[i, OBSERVATION, False]
            assert source == o.start + o.length - 1
        elif now:
            assert source == places[i, CODES, True].start + j - 1
        elif j:
            assert source == places[i, CODES, False].start + j - 1
        else:
            assert int(layout.positions[source]) + 1 == places[i, CODES, False].position
            assert not layout.segments[
                [s.start <= source < s.start + s.length for s in layout.segments].index(True)
            ].scratch


def test_context_is_the_rule_and_dmlab_has_39_segments_of_2496_tokens() -> None:
    for window, stride in [(34, 8), (8, 4), (7, 3), (2, 1), (3, 9)]:
        for t in range(120):
            assert [(s.frame, s.kind) for s in context(t, window, stride)] == rule(t, window, stride)
    cfg = FlexLAMConfig.preset("dmlab")
    most = max(len(context(t, 34, 8)) for t in range(34, 200))
    assert most == 39
    for t in (33, 41, 57):
        layout = history_layout(cfg, t + 1, 0, "last")
        newest = next(s for s in layout.segments if (s.frame, s.kind) == (t, OBSERVATION))
        last = newest.start + newest.length - 1
        assert attended(layout, last) == {(s, kind, False) for s, kind in rule(t, 34, 8)}
        assert len(attended(layout, last)) == 39
        assert int(layout.mask[last].sum()) == 2496
        own = [s for s in layout.segments if s.scratch]
        assert [(s.frame, s.length) for s in own] == [(t, 63)]
