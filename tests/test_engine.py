"""The persistent kernel's phases, emulated on the host: the reference within the budget, one order of sums, no hang."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import CONFIGS, KINDS, PATIENCE, SMALL, WIDE, Emulated, Shape, emulation, needs_compiler
from torch import Tensor

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.sampling import Sampling

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from parity import compare

CPU = torch.device("cpu")
DECISIONS = {"small": 14, "tiny": 2, "wide": 1}
pytestmark = needs_compiler


def model_of(cfg: FlexLAMConfig, dtype: torch.dtype = torch.float32) -> SequenceModel:
    torch.manual_seed(1)
    model = SequenceModel(cfg).eval().requires_grad_(False)
    for p in model.parameters():  # wider than the usual start, so that codes are clear choices that vary
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model.to(dtype)


def observed(cfg: FlexLAMConfig, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, cfg.channels, cfg.frame, cfg.frame, generator=generator) * 2 - 1
    size = (batch, cfg.bottleneck.slots)
    return torch.randint(cfg.bottleneck.codebook_size, size, generator=generator), pixels


def episode(
    runner: Eager,
    cfg: FlexLAMConfig,
    batch: int,
    k: int,
    steps: int = 3,
    pages: torch.dtype | None = None,
    **how: object,
) -> list[Tensor]:
    """Codes of each decision, and the pages at the end."""
    dtype = runner.model.head.weight.dtype
    cache = PagedCache(cfg, batch, CPU, pages or dtype)
    cache.open(batch)
    found = []
    for t in range(steps):
        codes, pixels = observed(cfg, batch, t)
        sampling = None
        if how:
            streams = torch.arange(batch) * 2**40 + t * cfg.bottleneck.slots
            sampling = Sampling(how["temperature"], how.get("top_k"), torch.tensor([3, 0]), streams)  # type: ignore[arg-type]
        appended = decode.append(runner, cache, codes, pixels.to(dtype))
        found.append(decode.generate(runner, cache, appended, k, sampling))
    return [*found, cache.k, cache.v]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_within_the_budget(name: str, dtype: torch.dtype) -> None:
    found = compare(Emulated, CONFIGS[name], dtype, CPU, DECISIONS[name], 3)
    assert found.holds(), found
    assert found.codes > 20
    assert found.near_ties <= (0 if dtype == torch.float32 else 0.02 * found.codes)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_are_the_references(name: str, batch: int) -> None:
    """Greedy, drawn from all, and drawn from the few likeliest."""
    cfg, k = CONFIGS[name], 4
    model = model_of(cfg)
    for how in ({}, {"temperature": 1.5}, {"temperature": 0.7, "top_k": 3}):
        ours, theirs = (episode(way(model), cfg, batch, k, **how) for way in (Emulated, Eager))
        assert all(torch.equal(a, b) for a, b in zip(ours[:-2], theirs[:-2], strict=True))
        assert len(torch.unique(torch.stack(ours[:-2]))) > 2
        for a, b in zip(ours[-2:], theirs[-2:], strict=True):  # the codes' keys and values are left in the pages
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bits_depend_on_neither_the_grid_nor_the_order_of_threads() -> None:
    model = model_of(WIDE, torch.bfloat16)
    found = []
    for blocks, backwards in ((1, False), (2, True), (5, False), (7, True)):
        logits = torch.empty(2, 3, WIDE.bottleneck.codebook_size)
        runner = Emulated(model, blocks, backwards)
        cache = PagedCache(WIDE, 2, CPU, torch.bfloat16)
        cache.open(2)
        codes, pixels = observed(WIDE, 2, 0)
        for _ in range(2):
            appended = decode.append(runner, cache, codes, pixels.bfloat16())
        place = cache.place_codes(appended.place)
        chosen = runner.block(cache, place, appended.logits, 3, None, logits=logits)
        found.append([chosen, logits, cache.k, cache.v])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_session_has_the_same_bits_alone_and_among_eleven() -> None:
    """Eleven are two launches."""
    model, k = model_of(SMALL), 3
    sampling = Sampling(1.0, None, torch.tensor([5, 0]), torch.arange(11) * 2**40)
    codes, pixels = observed(SMALL, 11, 0)

    def logits_of(chosen: list[int]) -> Tensor:
        runner, cache = Emulated(model, 4), PagedCache(SMALL, len(chosen), CPU, torch.float32)
        cache.open(len(chosen))
        out = torch.empty(len(chosen), k, SMALL.bottleneck.codebook_size)
        for _ in range(2):
            # one at a time, or the reference's own append would have other bits
            parts = [decode.append(runner, cache, codes[s : s + 1], pixels[s : s + 1], torch.tensor([i]))
                     for i, s in enumerate(chosen)]  # fmt: skip
        columns = zip(*(p.place._replace(starts=parts[0].place.start) for p in parts), strict=True)
        place = type(parts[0].place)(*(torch.cat(column) for column in columns))._replace(starts=None)
        first = torch.cat([p.logits for p in parts])
        streams = sampling.streams[chosen]
        runner.block(cache, cache.place_codes(place), first, k, sampling._replace(streams=streams), logits=out)
        return out

    together = logits_of(list(range(11)))
    for s in (0, 7, 8, 10):
        assert torch.equal(logits_of([s])[0], together[s])


def test_pages_of_another_dtype_than_the_weights() -> None:
    model = model_of(SMALL)
    for pages in (torch.float16, torch.bfloat16):
        ours, theirs = (episode(way(model), SMALL, 2, 4, pages=pages) for way in (Emulated, Eager))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.double(), b.double(), rtol=0.05, atol=0.05)


def test_the_counter_goes_on_over_launches() -> None:
    runner = Emulated(model_of(SMALL), 3)
    k, steps = 4, 3
    found = episode(runner, SMALL, 1, k, steps)
    per_launch = 3 * (k - 1) * (5 * SMALL.sequence.layers + 1)  # blocks, passes, barriers
    assert runner.arrived == steps * per_launch
    fresh = Emulated(model_of(SMALL), 3)
    fresh.state[0] = 3 * 2**40  # as after years
    assert all(torch.equal(a, b) for a, b in zip(found, episode(fresh, SMALL, 1, k, steps), strict=True))
    assert fresh.arrived == 3 * 2**40 + runner.arrived


def test_a_block_that_never_comes_is_an_error_and_no_hang() -> None:
    runner = Emulated(model_of(SMALL), 3)
    runner.present, runner.patience = 2, 20_000
    first, *_ = episode(runner, SMALL, 2, 4, steps=1)
    assert runner.lost == 1
    assert bool(runner.state[1])
    assert not first[:, 1:].any()  # the first code needed nobody; the others are codes, if no meaningful ones
    # what comes later leaves at once, also if all are there: nobody knows who has arrived where
    runner.present, runner.patience, arrived = 3, PATIENCE, runner.arrived
    later, *_ = episode(runner, SMALL, 2, 4, steps=1)
    assert not later.any()
    assert runner.arrived == arrived


def refusal(pages: torch.dtype = torch.bfloat16, page: int = 64, entries: int = 40, **changed: int) -> str:
    sizes = {"hidden": 256, "inner": 1024, "heads": 4, "kv_heads": 4, "dim": 64, "codes": 1000, "slots": 0} | changed
    shape = Shape(*sizes.values(), 1e4, 1e-6, KINDS[torch.bfloat16])
    said: bytes = emulation().flexlam_refusal(ctypes.byref(shape), KINDS[pages], page, entries)
    return said.decode()


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    assert not any(refusal(pages) for pages in KINDS)
    assert refusal(hidden=252) == "hidden: expected a multiple of 8, got 252"
    assert refusal(inner=1020) == "inner: expected a multiple of 8, got 1020"
    assert refusal(dim=20) == "head dim: expected a multiple of 8 up to 256, got 20"
    assert refusal(torch.float32, dim=136) == "head dim: expected a multiple of 8 up to 128, got 136"
    assert refusal(heads=6, kv_heads=4) == "kv_heads: expected a divisor of the heads, got 4"
    assert refusal(codes=151_936) == "codes: expected 1 to 65536, got 151936"
    assert refusal(entries=0).startswith("pages: expected 1 to 4194304 tokens a session")
    assert "bytes of shared memory" in refusal(codes=60_000)
