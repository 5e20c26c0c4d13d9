"""The cached decision against the dense mask that states the window rule, session by session and code by code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flexlam_fast.config import BottleneckConfig, FlexLAMConfig, SequenceConfig
from flexlam_fast.errors import BudgetError, CacheError
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.eager import Eager, Pages
from flexlam_fast.sequence.layout import CODES, OBSERVATION, history_layout
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.packed import Packed

CPU = torch.device("cpu")
RUNNERS = {"eager": Eager, "packed": Packed}


def shaped(slots: int, side: int, window: int, stride: int, **more: Any) -> FlexLAMConfig:
    """A small configuration with ``side * side`` tokens per frame and ``slots`` codes per block."""
    sequence: dict[str, Any] = dict(hidden=32, intermediate=48, layers=3, heads=4, kv_heads=2, head_dim=8, patch=8)
    return dataclasses.replace(
        FlexLAMConfig.preset("tiny"),
        frame=8 * side,
        bottleneck=BottleneckConfig(slots=slots),
        sequence=SequenceConfig(**{**sequence, "window": window, "stride": stride, **more}),
    )


SHAPES = {
    "as tiny": shaped(4, 2, 8, 4, places=True),
    "blocks and frames share no factor": shaped(5, 3, 8, 4),
    "window no multiple of stride": shaped(6, 2, 7, 3),
    "every observation kept": shaped(3, 2, 5, 1, places=True),
    "stride beyond the window": shaped(4, 2, 3, 5),
    "two frames": shaped(3, 2, 2, 2),
    "one code": shaped(1, 2, 6, 4, kv_heads=4),
    "one token per frame": shaped(8, 1, 9, 2, kv_heads=1),
}


class Run(NamedTuple):
    """What a batch saw and did: ``pixels [T, B, C, H, W]``, complete blocks ``codes [T, B, K]``, one budget a step,
    and of every step the logits ``[B, k, C]`` and the generated codes ``[B, k]``."""

    pixels: Tensor
    codes: Tensor
    budgets: list[int]
    logits: list[Tensor]
    generated: list[Tensor]


def sharpened(cfg: FlexLAMConfig) -> SequenceModel:
    """A random fp64 model whose logits tell codes clearly apart."""
    torch.manual_seed(0)
    model = SequenceModel(cfg).double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def observed(cfg: FlexLAMConfig, steps: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (steps, batch, cfg.channels, cfg.frame, cfg.frame)
    pixels = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return pixels, torch.randint(0, 1000, (steps, batch, cfg.bottleneck.slots), generator=generator)


def pool(cfg: FlexLAMConfig, batch: int, dtype: torch.dtype = torch.float64) -> PagedCache:
    cache = PagedCache(cfg, batch, CPU, dtype)
    cache.open(batch)
    return cache


def act(
    model: SequenceModel,
    pixels: Tensor,
    codes: Tensor,
    budget: Callable[[int], int],
    resets: dict[int, list[int]],
    runner: Callable[[SequenceModel], Runner] = Eager,
) -> Run:
    """Run a batch through the cache; ``codes[t]`` becomes known at ``t + 1``; ``resets[t]`` start anew at ``t``."""
    steps, batch = pixels.shape[:2]
    cache, way = pool(model.cfg, batch, pixels.dtype), runner(model)
    record: list[Tensor] = []
    plain = way.logits

    def recording(x: Tensor, step: Any) -> Tensor:
        record.append(plain(x, step))
        return record[-1]

    way.logits = recording  # type: ignore[method-assign]
    run = Run(pixels, codes, [budget(t) for t in range(steps)], [], [])
    for t in range(steps):
        if t in resets:
            cache.reset(resets[t])
        record.clear()
        first = decode.append(way, cache, codes[t - 1], pixels[t])
        run.generated.append(decode.generate(way, cache, first, run.budgets[t]))
        run.logits.append(torch.stack(record, dim=1))
        cache.verify()
    return run


def dense(model: SequenceModel, run: Run, session: int, start: int, stop: int) -> Tensor:
    """Logits ``[frames, K, C]`` of one episode by the mask over its whole history, fed the codes the run generated."""
    cfg, frames, slots = model.cfg, stop - start, model.cfg.bottleneck.slots
    layout = history_layout(cfg, frames, 0, "all")
    parts = []
    for s in layout.segments:
        t = start + s.frame
        if s.kind == OBSERVATION:
            parts.append(model.embed_frames(run.pixels[t, session].unsqueeze(0)))
            continue
        block = run.codes[t, session].clone()
        if s.scratch:
            block[: run.budgets[t]] = run.generated[t][session]
        parts.append(model.embed_codes(block[: s.length].unsqueeze(0), torch.arange(s.length)))
    hidden = model(torch.cat(parts, dim=1), layout.positions, layout.mask)
    out = torch.empty(frames, slots, cfg.bottleneck.codebook_size, dtype=hidden.dtype)
    out[layout.frame, layout.slot] = model.logits(hidden[0, layout.source])
    return out


def episodes(steps: int, batch: int, resets: dict[int, list[int]]) -> list[tuple[int, int, int]]:
    """``(session, start, stop)`` of every episode of a run."""
    found = []
    for b in range(batch):
        starts = [0, *sorted(t for t, which in resets.items() if b in which and t)]
        found += [(b, *ends) for ends in zip(starts, [*starts[1:], steps], strict=True)]
    return found


def assert_equals_dense(model: SequenceModel, run: Run, resets: dict[int, list[int]]) -> None:
    steps, batch = run.pixels.shape[:2]
    for session, start, stop in episodes(steps, batch, resets):
        expected = dense(model, run, session, start, stop)
        for t in range(start, stop):
            k = run.budgets[t]
            want, got = expected[t - start, :k], run.logits[t][session]
            assert got.shape == want.shape
            assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max()), (session, start, t)
            assert torch.equal(run.generated[t][session], want.argmax(-1).to(torch.int32))


@torch.no_grad()
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sessions_that_start_at_different_times_equal_the_dense_mask(shape: str, runner: str) -> None:
    cfg = SHAPES[shape]
    model, slots, window = sharpened(cfg), cfg.bottleneck.slots, cfg.sequence.window
    steps = 4 * window + 6
    pixels, codes = observed(cfg, steps, 3)
    resets = {3: [1], window + 2: [2], window + 3: [1, 2], 3 * window: [0]}
    run = act(model, pixels, codes, lambda t: 1 + (7 * t) % slots, resets, RUNNERS[runner])
    assert len(set(run.budgets)) == slots
    assert_equals_dense(model, run, resets)
    assert len(torch.cat([g.flatten() for g in run.generated]).unique()) > steps // 2, "codes should vary"


@torch.no_grad()
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_window_of_dmlab_equals_the_dense_mask(runner: str) -> None:
    """64 tokens a frame, 64 codes a block, window 34, stride 8: one narrow layer, checked past a full window."""
    cfg = dataclasses.replace(
        FlexLAMConfig.preset("dmlab"),
        sequence=SequenceConfig(hidden=16, intermediate=16, layers=2, heads=1, kv_heads=1, head_dim=16),
    )
    model, steps = sharpened(cfg), 44
    pixels, codes = observed(cfg, steps, 1)
    run = act(model, pixels, codes, lambda t: 64 if t == steps - 1 else 1, {}, RUNNERS[runner])
    layout = history_layout(cfg, steps, 0, "last")
    parts = []
    for s in layout.segments:
        block = run.generated[-1][:, : s.length] if s.scratch else codes[s.frame]
        slots = torch.arange(s.length)
        parts.append(model.embed_frames(pixels[s.frame]) if s.kind == OBSERVATION else model.embed_codes(block, slots))
    hidden = model(torch.cat(parts, dim=1), layout.positions, layout.mask)
    want = model.logits(hidden[0, layout.source[-64:]])
    assert layout.frame[-64:].unique().tolist() == [steps - 1]
    assert float((run.logits[-1][0] - want).abs().max()) < 1e-10 * float(want.abs().max())
    assert torch.equal(run.generated[-1][0], want.argmax(-1).to(torch.int32))


@torch.no_grad()
def test_the_budget_of_one_decision_leaves_no_trace_in_the_next() -> None:
    cfg = SHAPES["as tiny"]
    model = sharpened(cfg)
    pixels, codes = observed(cfg, 20, 2)
    runs = [act(model, pixels, codes, budget, {}) for budget in (lambda t: 1, lambda t: 4, lambda t: 1 + t % 4)]
    for t in range(20):
        for run in runs[:-1]:
            k = min(run.budgets[t], runs[-1].budgets[t])
            assert torch.equal(run.logits[t][:, :k], runs[-1].logits[t][:, :k])


@torch.no_grad()
def test_a_reset_session_equals_a_new_one_and_the_others_go_on() -> None:
    cfg = SHAPES["window no multiple of stride"]
    model = sharpened(cfg)
    pixels, codes = observed(cfg, 24, 3)
    mixed = act(model, pixels, codes, lambda t: 6, {10: [1]})
    undisturbed = act(model, pixels, codes, lambda t: 6, {})
    fresh = act(model, pixels[10:], codes[[*range(10, 24)]], lambda t: 6, {})
    for t in range(24):
        assert torch.equal(mixed.logits[t][[0, 2]], undisturbed.logits[t][[0, 2]])
        if t >= 10:
            assert torch.equal(mixed.generated[t][1], fresh.generated[t - 10][1])
            assert not torch.equal(mixed.logits[t][1], undisturbed.logits[t][1])


@torch.no_grad()
def test_codes_of_a_session_that_has_none_yet_do_not_matter() -> None:
    cfg = SHAPES["as tiny"]
    model = sharpened(cfg)
    pixels, codes = observed(cfg, 12, 2)
    other = codes.clone()
    other[-1] = 7  # what the first step hands in
    other[4, 0] = 9  # what session 0 hands in when it starts anew
    a, b = (act(model, pixels, c, lambda t: 4, {5: [0]}) for c in (codes, other))
    for t in range(11):
        assert torch.equal(a.logits[t], b.logits[t])


@torch.no_grad()
def test_reset_of_all_sessions_starts_everything_anew() -> None:
    cfg = SHAPES["every observation kept"]
    model = sharpened(cfg)
    pixels, codes = observed(cfg, 9, 2)
    cache, way = pool(cfg, 2), Eager(model)

    def run() -> list[Tensor]:
        return [decode.append(way, cache, codes[t - 1], pixels[t]).logits for t in range(9)]

    first = run()
    assert cache.t.tolist() == [8, 8]
    cache.reset()
    assert cache.t.tolist() == [-1, -1]
    assert cache.count.tolist() == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@torch.no_grad()
def test_decision_100_000_is_as_exact_as_the_first_ones() -> None:
    """Positions shifted by ten million, as after that many tokens: the same context gives the same logits."""
    cfg = SHAPES["as tiny"]
    model = sharpened(cfg)
    pixels, codes = observed(cfg, 20, 1)
    near, far = pool(cfg, 1), pool(cfg, 1)
    far.count += 10_000_000
    for t in range(20):
        a, b = (decode.append(Eager(model), cache, codes[t - 1], pixels[t]).logits for cache in (near, far))
        assert float((a - b).abs().max()) < 1e-7 * float(a.abs().max())
    assert int(far.count - near.count) == 10_000_000


def test_the_cache_complains_in_one_sentence() -> None:
    cfg = SHAPES["as tiny"]
    model = SequenceModel(cfg)
    cache = pool(cfg, 1, torch.float32)
    appended = decode.append(Eager(model), cache, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3, 16, 16))
    for wrong in (0, 5, -1):
        with pytest.raises(BudgetError, match=rf"^k: expected an integer in 1\.\.4, got {wrong}$"):
            decode.generate(Eager(model), cache, appended, wrong)
    with pytest.raises(CacheError, match="^update: expected keys of 8 tokens, got 1$"):
        Pages(cache, appended.place).update(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_places_tokens_where_the_layout_does(shape: str) -> None:
    cfg, frames = SHAPES[shape], 20
    slots, patches = cfg.bottleneck.slots, cfg.tokens_per_frame
    layout = history_layout(cfg, frames, 0, "all")
    first = {(s.frame, s.kind, s.scratch): s.position for s in layout.segments}
    cache = pool(cfg, 1)
    for t in range(frames):
        place = cache.place_append(torch.tensor([0]))
        positions = place.positions[0].tolist()
        if t:
            start = first[t - 1, CODES, False]
            assert positions[:slots] == list(range(start, start + slots))
        start = first[t, OBSERVATION, False]
        assert positions[slots:] == list(range(start, start + patches))
        scratch = cache.place_codes(place).positions[0].tolist()
        assert scratch == list(range(start + patches, start + patches + slots))
    kept = sum(s.length for s in layout.segments if not s.scratch and (s.kind == CODES or s.frame % cache.stride == 0))
    assert cache.count.tolist() == [kept]
