"""The fast ways through the sequence model and the translator: the reference within the error budget, code for code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from native_cases import needs_extension
from small import small_config

from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import BackendError
from flexlam_fast.policy import Policy
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import Native, NativeBlock
from flexlam_fast.sequence.packed import Packed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from parity import Parity, compare

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the fused kernels; on a CPU, interpreted
CFG = small_config()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tiles than a GPU would get: the interpreter runs one program after the other."""
    pytest.importorskip("triton")
    monkeypatch.setattr("flexlam_fast.kernels.linear.PROCESSORS", 2)


WAYS = [Packed, *(pytest.param(way, marks=needs_extension) for way in (Native, NativeBlock))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_fast_on_a_cpu_is_the_reference_over_300_decisions(way: type, dtype: torch.dtype) -> None:
    found = compare(way, CFG, dtype, CPU, 300 if dtype == torch.float32 else 60, 3)
    assert found.holds(), found
    assert found.codes > 400
    assert found.near_ties <= (0 if dtype == torch.float32 else 0.02 * found.codes)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_the_reference(dtype: torch.dtype) -> None:
    found = compare(Fused, CFG, dtype, DEVICE, 9, 2)
    assert found.holds(), found
    assert found.codes >= 30
    assert found.near_ties <= (0 if dtype == torch.float32 else 2)


def test_the_comparison_can_fail() -> None:
    class Sloppy(Packed):
        def logits(self, x: torch.Tensor, step: object) -> torch.Tensor:
            return super().logits(x, step).bfloat16().float()  # type: ignore[arg-type]

    assert not compare(Sloppy, CFG, torch.float32, CPU, 6, 2).holds()
    itself = compare(Eager, CFG, torch.float32, CPU, 6, 2)
    assert itself.fast_max == itself.plain_max

    class Blind(Packed):
        """Sees one page too few."""

        def prepare(self, cache: PagedCache, place: Placement) -> object:  # type: ignore[override]
            return super().prepare(cache, place._replace(context=(place.context - 1).clamp_min(0)))

    with pytest.raises(AssertionError, match="expected other codes at near ties only"):
        compare(Blind, CFG, torch.float32, CPU, 12, 2)
    assert not Parity(2.1, 1.0, 1.0, 1.0, 1, 0).holds()
    assert not Parity(1.0, 1.0, 2.1, 1.0, 1, 0).holds()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_whole_decision_by_fused_kernels_is_that_of_the_reference(temperature: float) -> None:
    policies = [Policy(CFG, backend=backend, device=DEVICE) for backend in ("reference", "auto", "triton")]
    generator = torch.Generator().manual_seed(0)
    for name, p in policies[0].sequence.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0))
    for policy in policies:
        policy.load_state("f", policies[0].state())
        policy.reset(2)
    for t in range(7):
        frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=generator)
        if t == 4:
            for policy in policies:
                policy.reset(sessions=[1])
        plain, *fast = [policy.act(frames, 1 + t % 4, temperature=temperature, top_k=8) for policy in policies]
        for decision in fast:
            assert torch.equal(decision.codes, plain.codes)
            assert torch.equal(decision.actions.discrete, plain.actions.discrete)
            assert torch.equal(decision.frames, plain.frames)


@pytest.mark.usefixtures("few_programs")
def test_fused_weights_follow_those_of_the_modules() -> None:
    policy, other = (Policy(CFG, backend=b, device=DEVICE, seed=i) for i, b in enumerate(("triton", "reference")))
    frame = torch.full((1, 16, 16, 3), 50, dtype=torch.uint8)
    policy.act(frame, 2)
    policy.load_state("f", other.state())
    policy.reset(1)
    a, b = policy.act(frame, 2), other.act(frame, 2)
    assert torch.equal(a.codes, b.codes)
    assert policy.stages.fused is not None
    null, previous, codes = policy.lam.bottleneck.null, torch.zeros(1, 3, device=DEVICE), a.codes.to(DEVICE)
    scores = policy.stages.fused.scores(codes, 2, null, previous)
    expected = other.translator(other.lam.fill(codes, 2), previous)
    assert torch.allclose(scores.logits[0], expected.logits[0], atol=1e-6)


def test_fused_kernels_take_pages_of_the_weights_dtype() -> None:
    pytest.importorskip("triton")
    with pytest.raises(
        BackendError, match=r"^pages: expected float32, the dtype of the weights, with backend 'triton'"
    ):
        Policy(CFG, backend="triton", pages=torch.bfloat16, device=DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("way", [Eager, *WAYS])
def test_position_100_million_is_as_exact_as_position_0(way: type) -> None:
    """The same context seen from 10^8 tokens on: what comes out differs by rounding alone."""
    cfg = FlexLAMConfig.preset("tiny")
    torch.manual_seed(0)
    models = [SequenceModel(cfg).eval().requires_grad_(False).to(kind) for kind in (torch.float32, torch.float64)]
    models[1].load_state_dict(models[0].state_dict())
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(9, 1, 3, cfg.frame, cfg.frame, generator=generator) * 2 - 1
    codes = torch.randint(1000, (9, 1, cfg.bottleneck.slots), generator=generator) % cfg.bottleneck.codebook_size
    logits = {}
    for model, kind, runner in ((models[0], torch.float32, way), (models[1], torch.float64, Eager)):
        for first in (0, 10**8):
            cache = PagedCache(cfg, 1, CPU, kind)
            cache.open()
            cache.count += first
            run = runner(model)
            for t in range(9):
                found = decode.append(run, cache, codes[t], pixels[t].to(kind)).logits.double()
            logits[kind, first] = found
    near = (logits[torch.float32, 0] - logits[torch.float64, 0]).abs().max()
    far = (logits[torch.float32, 10**8] - logits[torch.float64, 0]).abs().max()
    assert float(far) <= 2 * float(near)
