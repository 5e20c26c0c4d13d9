"""Many sessions in one pool: opening, closing, running out, independence, bookkeeping over many random decisions."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
from pathlib import Path

import pytest
import torch
from small import small_config
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.errors import BudgetError, CacheError, InputError
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.cache import PagedCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from soak import soak

CPU = torch.device("cpu")
CFG = small_config()


def frames(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)


def make(batch: int, capacity: int | None = None, backend: str = "auto", cfg: FlexLAMConfig = CFG) -> Policy:
    policy = Policy(cfg, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for name, p in policy.sequence.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0))
    policy.reset(batch, capacity=capacity)
    return policy


def test_sessions_open_and_close_and_pages_come_back() -> None:
    policy = make(2, capacity=4)
    per = policy.cache.session_pages
    assert policy.cache.opened == [0, 1]
    assert policy.open(2) == [2, 3]
    with pytest.raises(CacheError, match=rf"^sessions: expected {per} free pages for 1 more, got 0 of {4 * per}$"):
        policy.open()
    policy.close([1, 3])
    with pytest.raises(CacheError, match=rf"^sessions: expected {3 * per} free pages for 3 more, got {2 * per} of "):
        policy.open(3)
    assert policy.cache.opened == [0, 2], "a refused opening takes nothing"
    assert policy.act(frames(2, 0), 2).frames.tolist() == [0, 0]
    assert sorted(policy.open(2)) == [1, 3]
    policy.cache.verify()
    text = str(policy.cache)
    assert text.startswith(f"4 of 4 sessions open, {4 * per} of {4 * per} pages of {CFG.page} tokens taken")
    assert "session 0: t=0, 4 tokens kept: O0@0" in text
    assert "session 1: t=-1, 0 tokens kept: empty" in text


def test_wrong_sessions_are_refused_in_one_sentence_and_nothing_has_moved() -> None:
    policy = make(3, capacity=5)
    for wrong in ([3], [0, 0], [-1], [5]):
        for call in (
            policy.close,
            lambda s: policy.reset(sessions=s),
            lambda s: policy.act(frames(len(s), 0), 1, sessions=s),
        ):
            with pytest.raises(InputError, match=r"^sessions: expected open ones, each once, of \[0, 1, 2\], got \["):
                call(wrong)
    with pytest.raises(InputError, match=r"^frames: expected \[1,16,16,3\] uint8, got \[2,16,16,3\]"):
        policy.act(frames(2, 0), 1, sessions=[1])
    with pytest.raises(BudgetError, match=r"^capacity: expected an integer in 2\.\."):
        policy.reset(2, capacity=1)
    with pytest.raises(BudgetError, match=r"^count: expected an integer in 1\.\."):
        policy.open(0)
    with pytest.raises(InputError, match=r"^top_k: expected an integer in 1\.\.20, got 21$"):
        policy.act(frames(3, 0), 1, temperature=1.0, top_k=21)
    with pytest.raises(InputError, match=r"^pages: expected float32, bfloat16, float16, got torch.float64$"):
        Policy(CFG, pages=torch.float64)
    policy.close([0, 1, 2])
    with pytest.raises(InputError, match=r"^sessions: expected at least one that acts, got none$"):
        policy.act(frames(0, 0), 1)
    assert policy.cache.t.tolist() == [-1] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_session_does_not_notice_by_a_bit_who_shares_its_pool(backend: str, temperature: float) -> None:
    """Session 2 alone, beside a still pool of five, and beside five that act, reset, open and close in between."""
    logits: dict[str, list[Tensor]] = {}
    for company in ("alone", "still", "busy"):
        policy = make(3 if company == "alone" else 5, capacity=8, backend=backend)
        policy.close([0, 1]) if company == "alone" else None
        seen, plain = [], policy.stages.runner.logits

        def recording(x: Tensor, step: object, seen: list[Tensor] = seen, plain: object = plain) -> Tensor:
            seen.append(plain(x, step))  # type: ignore[operator]
            return seen[-1]

        draw = random.Random(1)
        policy.stages.runner.logits = recording  # type: ignore[method-assign]
        for t in range(14):
            if company == "busy":
                others = [s for s in policy.cache.opened if s != 2]
                policy.act(frames(len(others), 100 + t), 1 + t % 4, sessions=others, temperature=temperature)
                policy.reset(sessions=draw.sample(others, 1))
                if t % 3 == 0:
                    policy.close(draw.sample(others, 1))
                    policy.open()
            seen.clear()
            decision = policy.act(frames(1, t), 1 + (3 * t) % 4, sessions=[2], temperature=temperature)
            logits.setdefault(company, []).extend([*seen, decision.codes, *decision.actions])
            policy.cache.verify()
    for company in ("still", "busy"):
        assert all(torch.equal(a, b) for a, b in zip(logits["alone"], logits[company], strict=True))


def test_which_sessions_act_together_does_not_matter_to_their_bits() -> None:
    """Batches of two: session 1's logits are the same whoever it acts with, wherever it stands in the batch."""
    found = []
    for mates in ([0, 1], [1, 3], [1, 0], [2, 1]):
        policy = make(4)
        for t in range(9):
            batch = torch.stack([frames(1, 10 * t + (s != 1) * s)[0] for s in mates])
            decision = policy.act(batch, 4, sessions=mates)
        found.append(
            (
                decision.codes[mates.index(1)],
                policy.cache.k[:, policy.cache.session_pages :][:, : policy.cache.session_pages].clone(),
            )
        )
    assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


def test_a_session_opened_again_starts_anew() -> None:
    policy = make(2, capacity=2)
    fresh = [policy.act(frames(2, t), 4) for t in range(6)]
    policy.close([0])
    policy.open()
    again = [policy.act(frames(2, t), 4) for t in range(6)]
    assert [d.frames.tolist() for d in again] == [[t, t + 6] for t in range(6)]
    for a, b in zip(fresh, again, strict=True):
        assert torch.equal(a.codes[0], b.codes[0])
        assert torch.equal(a.actions.discrete[0], b.actions.discrete[0])


def test_two_episodes_of_a_session_do_not_draw_the_same() -> None:
    policy = make(1)
    first = policy.act(frames(1, 0), 4, temperature=2.0).codes
    policy.reset(sessions=[0])
    second = policy.act(frames(1, 0), 4, temperature=2.0).codes
    assert not torch.equal(first, second)
    policy.reset(1)
    assert torch.equal(policy.act(frames(1, 0), 4, temperature=2.0).codes, first)
    policy.reset(1)
    assert torch.equal(policy.act(frames(1, 0), 4, temperature=2.0, top_k=1).codes, make(1).act(frames(1, 0), 4).codes)


@pytest.mark.parametrize(
    ("field", "index", "value", "sentence"),
    [
        ("t", (1,), 3, "count"),
        ("count", (0,), 7, "count"),
        ("o_frame", (0, 0), 2, "observations"),
        ("o_frame", (1, 2), -1, "observations"),
        ("z_frame", (1, 2), -1, "code blocks"),
        ("z_frame", (0, 0), 99, "code blocks"),
        ("t", (3,), 0, "closed session 3 at t=-1"),
        ("t", (2,), -2, "session 2 at t=-1 or later"),
    ],
)
def test_verify_finds_what_is_out_of_order(field: str, index: tuple[int, ...], value: int, sentence: str) -> None:
    policy = make(3, capacity=4)
    for t in range(9):
        policy.act(frames(2, t), 1, sessions=[0, 1])
    policy.cache.verify()
    state = getattr(policy.cache, field)
    assert int(state[index]) != value
    state[index] = value
    with pytest.raises(CacheError, match=rf"^cache: expected {sentence}"):
        policy.cache.verify()


def test_verify_finds_a_session_that_is_free_twice() -> None:
    cache = PagedCache(CFG, 3, CPU, torch.float32)
    cache.free.append(0)
    with pytest.raises(CacheError, match="^cache: expected each free session once"):
        cache.verify()


def test_the_books_are_right_after_thousands_of_random_decisions() -> None:
    found = soak(CFG, 4_000, 12, 0)
    assert found.decisions >= 4_000
    assert min(found.opened, found.reset) > 20
    assert found.drift < 1_000_000


def test_decisions_leave_no_memory_behind() -> None:
    policy = make(2)

    def live() -> int:
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if isinstance(t, Tensor))

    def some(count: int) -> None:
        for t in range(count):
            policy.act(frames(2, t % 8), 1 + t % 4)

    some(20)
    before = live()
    some(200)
    assert live() - before < 10_000


def test_loading_weights_reaches_the_packed_ones_and_casting_packs_anew() -> None:
    policy, other = make(1), Policy(CFG, seed=3)
    policy.act(frames(1, 0), 4)
    policy.load_state("f", {k: v.clone() for k, v in other.state().items()})
    policy.reset(1)
    for t in range(8):
        assert torch.equal(policy.act(frames(1, t), 4).codes, other.act(frames(1, t), 4).codes)
    policy.sequence.double().float()  # parts the parameters from what was packed
    with torch.no_grad():
        for p in (*policy.sequence.parameters(), *other.sequence.parameters()):
            p.add_(0.01)
    for t in range(8, 16):
        assert torch.equal(policy.act(frames(1, t), 4).codes, other.act(frames(1, t), 4).codes)


@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pages_may_be_narrower_than_the_weights(pages: torch.dtype, backend: str) -> None:
    exact, narrow = make(2), Policy(CFG, pages=pages, backend=backend)
    narrow.load_state("f", exact.state())
    narrow.reset(2)
    assert narrow.cache.k.dtype == pages
    same = [torch.equal(exact.act(frames(2, t), 4).codes, narrow.act(frames(2, t), 4).codes) for t in range(12)]
    assert sum(same) >= 8, "half-precision pages change a code here and there, not everything"


def test_the_pages_of_dmlab_are_those_of_the_design() -> None:
    cfg = FlexLAMConfig.preset("dmlab")
    cfg = dataclasses.replace(cfg, sequence=dataclasses.replace(cfg.sequence, layers=1))
    cache = PagedCache(cfg, 2, CPU, torch.bfloat16)
    assert (cache.page, cache.session_pages) == (64, 6 + 33 + 1)
    assert cache.k.shape == (1, 80, 64, 4, 64)
    odd = dataclasses.replace(
        FlexLAMConfig.preset("tiny"), frame=24, bottleneck=BottleneckConfig(slots=6), sequence=SequenceConfig(patch=8)
    )
    assert PagedCache(odd, 1, CPU, torch.float32).page == 3
