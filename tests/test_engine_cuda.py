"""The way of backend ``native`` on a GPU: its wiring on any machine, and what only a GPU can show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from native_cases import needs_extension
from small import small_config
from torch import Tensor

from flexlam_fast.backend import probe
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.loop import Stages
from flexlam_fast.ops.block import BlockEngine, ModelTensors
from flexlam_fast.ops.block_cuda import CudaBlockEngine, refusal
from flexlam_fast.policy import Policy
from flexlam_fast.sequence import decode, native_cuda
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.layers import pack, tensors_of
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native_cuda import CudaBlock, cuda_runner
from flexlam_fast.sequence.sampling import Sampling

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from blocks import captured, case_of, soak
from parity import compare

CFG, CUDA = small_config(), torch.device("cuda")
DMLAB = FlexLAMConfig.preset("dmlab")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def built_with_cuda() -> bool:
    extension = pytest.importorskip("flexlam_fast._C", exc_type=ImportError)
    return bool(extension.build_info()["cuda"])


class OnHost(BlockEngine):
    """The CPU's engine in the place of the GPU's."""

    made = 0

    def __init__(
        self, weights: ModelTensors, theta: float, eps: float, pages: torch.dtype, page: int, entries: int
    ) -> None:
        super().__init__(weights, theta, eps)
        self.pages, self.page, self.entries = pages, page, entries
        type(self).made += 1

    def check(self) -> None:
        raise BackendError("sequence engine: expected all blocks at a barrier, got fewer")


@needs_extension
def test_codes_come_from_one_call_and_the_engine_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "CudaBlockEngine", OnHost)
    monkeypatch.setattr(OnHost, "made", 0)
    torch.manual_seed(1)
    model = SequenceModel(CFG).eval().requires_grad_(False)
    runner = CudaBlock(model, Eager(model))
    assert not runner.capturable
    assert CudaBlock(model, Fused(model)).capturable
    runner.check()  # of no engine yet
    found: list[list[Tensor]] = []
    for way in (runner, Eager(model)):
        cache, generator = PagedCache(CFG, 2, torch.device("cpu"), torch.float32), torch.Generator().manual_seed(0)
        cache.open(2)
        found.append([])
        for t in range(3):
            codes = torch.randint(CFG.bottleneck.codebook_size, (2, CFG.bottleneck.slots), generator=generator)
            pixels = torch.rand(2, CFG.channels, CFG.frame, CFG.frame, generator=generator) * 2 - 1
            streams = torch.arange(2) * 100 + t * 4
            sampling = Sampling(0.8, 3, torch.tensor([7, 0]), streams) if t else None
            found[-1].append(decode.generate(way, cache, decode.append(way, cache, codes, pixels), 4, sampling))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert OnHost.made == 1
    runner.engine(PagedCache(CFG, 1, torch.device("cpu"), torch.bfloat16), 7)
    assert OnHost.made == 2
    with pytest.raises(BackendError, match="at a barrier"):
        Stages(None, runner, None).check()  # type: ignore[arg-type]


def test_native_on_a_gpu_takes_the_engine_where_it_takes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SequenceModel(CFG)
    asked = []

    def told(cfg: FlexLAMConfig, dtype: torch.dtype, pages: torch.dtype, entries: int, device: torch.device) -> str:
        asked.append((cfg, dtype, pages, entries, device))
        return "hidden: expected a multiple of 8, got 30" if pages == torch.float16 else ""

    monkeypatch.setattr(native_cuda, "refusal", told)
    assert isinstance(cuda_runner(model, CUDA, torch.float16), Eager)
    taken = cuda_runner(model, CUDA, torch.bfloat16)
    assert isinstance(taken, CudaBlock)
    assert isinstance(taken.together, Eager)  # the fused kernels want pages of the weights' dtype
    entries = PagedCache(CFG, 3, torch.device("cpu"), torch.float32).session_pages
    assert asked == [(CFG, torch.float32, pages, entries, CUDA) for pages in (torch.float16, torch.bfloat16)]


def test_weights_on_a_cpu_are_refused() -> None:
    model = SequenceModel(CFG)
    weights = tensors_of(model, pack(model, []))
    with pytest.raises(InputError, match="weights: expected contiguous ones of one dtype on one CUDA device"):
        CudaBlockEngine(weights, 1e4, 1e-6, torch.float32, 4, 7)


@needs_extension
def test_the_extension_says_what_it_does_not_take() -> None:
    if not built_with_cuda():
        pytest.skip("the extension was built without nvcc")
    from flexlam_fast import _C

    assert (
        _C.cuda_engine_refusal(250, 1024, 4, 4, 64, 1000, 2, 2, 64, 40) == "hidden: expected a multiple of 8, got 250"
    )
    said = _C.cuda_engine_refusal(256, 1024, 4, 4, 64, 1000, 2, 2, 64, 40)
    assert (said == "") == torch.cuda.is_available()
    with pytest.raises(ValueError, match="qkv: expected an address on a border of 16 bytes, got 8 beyond one"):
        _C.CudaSequenceEngine([[8] * 8], 16, 0, 16, 16, 256, 1024, 4, 4, 64, 1000, 0, 1e4, 1e-6, 2, 2, 64, 40)


# --- on a GPU


@pytest.fixture
def native_gpu() -> None:
    reasons = [status.reason for status in probe("cuda") if status.name == "native" and not status.available]
    if reasons:
        pytest.skip(reasons[0])


@pytest.mark.gpu
@pytest.mark.usefixtures("native_gpu")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_a_small_model_is_the_reference(dtype: torch.dtype, batch: int) -> None:
    check_parity(CFG, dtype, batch)


@pytest.mark.gpu
@pytest.mark.usefixtures("native_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_it_is_the_reference(dtype: torch.dtype) -> None:
    check_parity(DMLAB, dtype, 3)


def check_parity(cfg: FlexLAMConfig, dtype: torch.dtype, batch: int) -> None:
    assert not refusal(cfg, dtype, dtype, PagedCache(cfg, 0, CUDA, dtype).session_pages, CUDA)
    found = compare(lambda model: CudaBlock(model, Eager(model)), cfg, dtype, CUDA, 12, batch)
    assert found.holds(), found
    assert found.near_ties <= (0 if dtype == torch.float32 else 0.02 * found.codes)


@pytest.mark.gpu
@pytest.mark.usefixtures("native_gpu")
@pytest.mark.parametrize("batch", [1, 3, 11])
def test_replays_of_a_captured_block_are_that_block(batch: int) -> None:
    case = case_of(DMLAB, CUDA, torch.bfloat16, batch)
    plain, replay = case.by_engine(16), captured(case.by_engine(16))
    expected = plain().clone()
    for _ in range(20):
        assert torch.equal(replay(), expected)
        assert torch.equal(plain(), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("native_gpu")
def test_a_thousand_blocks_are_alike_and_none_hangs() -> None:
    assert "all alike" in soak(DMLAB, torch.bfloat16, 2, 64, 1000)


@pytest.mark.gpu
@pytest.mark.usefixtures("native_gpu")
def test_a_policy_replays_what_it_runs() -> None:
    policies = [Policy(DMLAB, device=CUDA, dtype=torch.bfloat16, backend="native", graphs=g) for g in (True, False)]
    generator = torch.Generator().manual_seed(0)
    for policy in policies:
        assert isinstance(policy.stages.runner, CudaBlock)
        policy.reset(2)
    assert (policies[0].graphed is not None) == policies[0].stages.capturable
    for t in range(40):
        frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
        one, other = (policy.act(frames, 1 + t % 9, temperature=float(t % 2)) for policy in policies)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.actions.discrete, other.actions.discrete)
