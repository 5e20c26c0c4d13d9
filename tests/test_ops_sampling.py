"""The choice of codes: greedy as torch.argmax, drawn alike on every backend, and fed back in the same launch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsq_cases import RUNS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import philox, sampling
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.sampling import choose_codes, next_token

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
_gumbel = compiled("triton", "sampling")._gumbel

HERE = Path(__file__).parent
SEED = torch.tensor([2**40 + 5, 2**33 + 7])
NAN, INF = math.nan, math.inf
every_device = pytest.mark.parametrize("device", [d for name, d in RUNS if name == "triton"])
EVERY_RUN = [(name, device) for name, device in RUNS if name != "native"]
every_run = pytest.mark.parametrize(("backend", "device"), EVERY_RUN, ids=[f"{n}-{d}" for n, d in EVERY_RUN])


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, float, int | None, Tensor | None]:
    """Logits with ties, infinities and NaN, contiguous or not; any temperature, top_k and streams."""
    rows, codes = draw(st.integers(0, 4)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, 2 * codes, generator=generator)
    logits = logits[:, ::2] * 3 if draw(st.booleans()) else logits[:, :codes].contiguous()
    if draw(st.booleans()):
        logits = logits.round()
    for value in draw(st.lists(st.sampled_from([INF, -INF, NAN, -NAN, 0.0, -0.0, 3e38, -3e38]), max_size=3)):
        if rows:
            logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, codes - 1))] = value
    if rows and draw(st.booleans()):
        logits[-1] = -INF
    temperature = draw(st.sampled_from([0.0, 1e-300, 1e-6, 0.5, 1.0, 7.5, 1e300]))
    top_k = draw(st.none() | st.integers(1, codes + 3))
    streams = torch.randint(-(2**62), 2**62, (rows,), generator=generator) if draw(st.booleans()) else None
    return logits, temperature, top_k, streams


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of a tiny temperature
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_device
@settings(max_examples=60)
@given(case=calls())
def test_any_choice_is_the_references(device: str, case: tuple[Tensor, float, int | None, Tensor | None]) -> None:
    logits, temperature, top_k, streams = case
    expected = choose_codes(logits, temperature, top_k, SEED, streams, backend="reference")
    rest = (temperature, top_k, SEED.to(device), None if streams is None else streams.to(device))
    codes = choose_codes(logits.to(device), *rest, backend="triton")
    assert codes.dtype == torch.int32
    assert torch.equal(codes.cpu(), expected)
    if temperature == 0:
        assert torch.equal(expected, logits.argmax(-1).int())
    other = logits.isneginf().all(-1, keepdim=True)
    assert not (logits.isneginf() & ~other).gather(1, expected.long().unsqueeze(1)).any(), "minus infinity is not drawn"


@pytest.mark.parametrize("codes", [1000, 4375, 9000])
@every_device
def test_codebooks_of_one_block_and_of_several(device: str, codes: int) -> None:
    logits = torch.randn(3, codes, generator=torch.Generator().manual_seed(codes)).to(device)
    logits[1, -1] = logits[1, 5] = 9.0  # a tie, across blocks where there are several
    logits[2, -2] = NAN
    seed = SEED.to(device)
    for temperature, top_k in ((0.0, None), (1.0, None), (3.0, 40), (100.0, codes // 2)):
        codes_ = choose_codes(logits, temperature, top_k, seed, backend="triton")
        assert torch.equal(codes_.cpu(), choose_codes(logits.cpu(), temperature, top_k, SEED, backend="reference"))
        assert int(codes_[2]) == codes - 2
        if temperature == 0:
            assert int(codes_[1]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 40, 1030])
@every_device
def test_the_embedding_is_fed_back(device: str, width: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 30).to(device)
    embedding, place = torch.randn(30, width).to(device, dtype), torch.randn(2 * width).to(device, dtype)[::2]
    for temperature, add in ((0.0, None), (0.0, place), (1.0, place)):
        args = (logits, embedding, add, temperature, 7, SEED.to(device), torch.arange(5, device=device) * 2**40)
        (codes, x), (expected, fed) = (next_token(*args, backend=name) for name in ("triton", "reference"))
        assert torch.equal(codes, expected)
        assert torch.equal(codes, choose_codes(*args[:1], *args[3:], backend="triton"))
        assert torch.equal(x, fed)
        assert (x.dtype, x.shape) == (dtype, (5, width))
        assert torch.equal(x, embedding[codes.long()] + (0 if add is None else add))
    empty = next_token(logits[:0], embedding, place, 1.0, None, SEED.to(device), backend="triton")
    assert [t.shape for t in empty] == [(0,), (0, width)]


def test_draws_have_the_odds_of_the_softmax() -> None:
    n, logits = 40_000, torch.tensor([0.5, -INF, 2.0, 1.0, -1.0, 0.0, 1.5, -0.5])
    for temperature, top_k, kept in ((1.0, None, 7), (0.5, None, 7), (2.0, 3, 3)):
        codes = choose_codes(logits.expand(n, -1), temperature, top_k, torch.tensor([3, 0]))
        odds = logits.masked_fill(logits < logits.sort(descending=True).values[kept - 1], -INF)
        expected = (odds / temperature).softmax(-1) * n
        count = torch.bincount(codes, minlength=8)
        assert count[expected == 0].sum() == 0
        chi = ((count - expected) ** 2 / expected)[expected > 0].sum()
        assert float(chi) < {7: 22.5, 3: 13.8}[kept], "chi-squared with 6 and 2 degrees of freedom: 1 in 1000"


@triton.jit
def noise_kernel(out_ptr, seed_ptr, stream_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    code = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + code, _gumbel(code, tl.load(seed_ptr), tl.load(seed_ptr + 1), tl.load(stream_ptr)))


@every_device
def test_the_kernels_noise_is_the_references_to_the_bit(device: str) -> None:
    """The tail too, where a logarithm that is a few bits off would seldom change a code."""
    options = compiled("triton", "launch_sampling").OPTIONS
    for key, step, stream in ((5, 7, 2**40 + 9), (-(2**62), 2**33 + 2**30, -3), (2**40 + 5, -1, 0)):
        noise = torch.empty(2**16, device=device)
        seed, streams = torch.tensor([key, step]), torch.tensor([stream])
        noise_kernel[(16,)](noise, seed.to(device), streams.to(device), BLOCK=4096, **options)
        assert torch.equal(noise.cpu(), sampling.gumbel(seed, streams, 1, 2**16)[0])


def test_the_noise_is_gumbels() -> None:
    noise = sampling.gumbel(SEED, None, 2000, 500).double().flatten().sort().values
    share = torch.exp(-torch.exp(-noise))
    distance = (share - (torch.arange(10**6) + 0.5) / 10**6).abs().max()
    assert float(distance) < 1.95e-3, "Kolmogorov and Smirnov: 1 in 1000"
    assert noise[-1] > 10, "the tail that decides"


def test_logarithms_are_exact_to_fp32_and_keep_the_tail() -> None:
    x = torch.cat([torch.linspace(1e-10, 2, 200_001), torch.logspace(-9, 1.4, 10_001)])
    error = (sampling._log(x).double() - x.double().log()).abs() / x.double().log().abs().clamp(min=2.0**-24)
    assert float(error.max()) < 2.0**-22
    near = -torch.logspace(-9.6, -0.6, 10_001)
    exact = torch.log1p(near.double())
    error = (sampling._log(1 + near, near).double() - exact).abs() / exact.abs()
    assert float(error.max()) < 2.0**-22


def test_philox_has_the_published_answers() -> None:
    # Random123's known answers of philox4x32-10: all zeros, all ones, and the digits of pi
    def first(counter: tuple[int, ...], key: int) -> int:
        words = [torch.tensor(w, dtype=torch.int64) for w in counter]
        return int(philox.first_word(torch.tensor(key - 2**64 if key >= 2**63 else key), *words))

    assert first((0, 0, 0, 0), 0) == 0x6627E8D5
    assert first((0xFFFFFFFF,) * 4, 2**64 - 1) == 0x408F276D
    assert first((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822) == 0xD16CFE09
    assert int(philox.draw(torch.tensor([9, 5]), 1)) == first((5, 0, 0, 0), 9), "the lengths come from the same"


@every_run
def test_a_sessions_draws_depend_on_its_stream_alone(backend: str, device: str) -> None:
    logits = torch.zeros(6, 300, device=device)
    streams, seed = torch.tensor([5, 2**32 + 5, 7, 2**33, -1, 0], device=device), SEED.to(device)
    codes = choose_codes(logits, 1.0, None, seed, streams, backend=backend)
    assert len(set(codes.tolist())) == 6, "of 300 codes alike no two rows draw the same"
    order = torch.tensor([3, 0, 5], device=device)
    some = choose_codes(logits[order] + torch.tensor([[0.0], [1.0], [2.0]], device=device), 1.0, None, seed,
                        streams[order], backend=backend)  # fmt: skip
    assert torch.equal(some, codes[order])
    default = choose_codes(logits, 1.0, None, seed, backend=backend)
    assert torch.equal(default, choose_codes(logits, 1.0, None, seed, torch.arange(6, device=device), backend=backend))
    for later in (seed + torch.tensor([0, 1], device=device), seed + torch.tensor([2**32, 0], device=device)):
        other = choose_codes(logits, 1.0, None, later, streams, backend=backend)
        assert int((other == codes).sum()) <= 1


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_run
def test_ties_at_the_threshold_stay_and_the_tiny_temperature_is_greedy(backend: str, device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0, 2.0, 0.0]], device=device).expand(24, -1)
    seed = SEED.to(device)
    drawn = choose_codes(logits, 5.0, 2, seed, backend=backend)
    assert set(drawn.tolist()) == {1, 2, 3, 5}
    assert set(choose_codes(logits[:6], 50.0, 1, seed, backend=backend).tolist()) == {1}
    for temperature in (1e-3, 1e-300):
        assert set(choose_codes(logits[:6], temperature, None, seed, backend=backend).tolist()) == {1}
    zeros = torch.tensor([[-1.0, -0.0, 0.0, -2.0]], device=device).expand(24, -1)
    assert set(choose_codes(zeros[:2], 0.0, backend=backend).tolist()) == {1}, "zeros are alike"
    assert set(choose_codes(zeros, 9.0, 1, seed, backend=backend).tolist()) == {1, 2}
    nothing = torch.full((24, 3), -INF, device=device)
    assert set(choose_codes(nothing[:2], 0.0, backend=backend).tolist()) == {0}
    assert set(choose_codes(nothing, 1.0, None, seed, backend=backend).tolist()) == {0, 1, 2}


@every_device
def test_opcheck(device: str) -> None:
    logits, embedding, place, seed = (
        t.to(device) for t in (torch.randn(3, 9), torch.randn(9, 5).half(), torch.randn(5).half(), SEED)
    )
    streams = torch.arange(3, device=device)
    for args in (
        (logits, None, None, 0.0, 0, None, None),
        (logits, embedding, None, 1.0, 0, seed, None),
        (logits, embedding, place, 1.0, 4, seed, streams),
        (logits[:0], embedding, place, 1.0, 4, seed, streams[:0]),
    ):
        told = torch.library.opcheck(torch.ops.flexlam_fast.draw_codes.default, args)
        assert set(told.values()) == {"SUCCESS"}, told


L, E = torch.zeros(3, 8), torch.zeros(8, 4)
WRONG = [
    (lambda: choose_codes(L[0], 0.0), r"^logits: expected \[B,C\] float32 or float64, got \[8\] float32 cpu$"),
    (lambda: choose_codes(L.half(), 0.0), r"^logits: expected \[B,C\] float32 or float64, got \[3,8\] float16 cpu$"),
    (lambda: choose_codes(L[:, :0], 0.0), r"^logits: expected at least one code a row, got \[3, 0\]$"),
    (lambda: choose_codes(L, -1.0), r"^temperature: expected a finite number of at least 0, got -1\.0$"),
    (lambda: choose_codes(L, NAN), r"^temperature: expected a finite number of at least 0, got nan$"),
    (lambda: choose_codes(L, INF), r"^temperature: expected a finite number of at least 0, got inf$"),
    (lambda: choose_codes(L, "1"), r"^temperature: expected a finite number of at least 0, got '1'$"),
    (lambda: choose_codes(L, 1.0), r"^seed: expected int64 \[2\] with a temperature above 0, got None$"),
    (lambda: choose_codes(L, 1.0, None, SEED.int()), r"^seed: expected \[2\] int64 cpu, got \[2\] int32 cpu$"),
    (lambda: choose_codes(L, 1.0, 0, SEED), r"^top_k: expected None or an integer of at least 1, got 0$"),
    (lambda: choose_codes(L, 1.0, 2.0, SEED), r"^top_k: expected None or an integer of at least 1, got 2\.0$"),
    (lambda: choose_codes(L, 1.0, 2, SEED, SEED), r"^streams: expected \[3\] int64 cpu, got \[2\] int64 cpu$"),
    (lambda: next_token(L, E[:7], None, 0.0), r"^embedding: expected \[8,W\] float32 cpu, got \[7,4\] float32 cpu$"),
    (lambda: next_token(L, E.int(), None, 0.0), r"^embedding: expected \[8,W\] float32 or .*, got \[8,4\] int32 cpu$"),
    (lambda: next_token(L, E, E[0].half(), 0.0), r"^place: expected \[4\] float32 cpu, got \[4\] float16 cpu$"),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_one_sentence_says_what_is_wrong(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_backend_asked_for_by_name_works_or_says_why_not() -> None:
    with pytest.raises(BackendError, match="expected 'reference' or 'triton' .*, got 'native'"):
        choose_codes(L, 0.0, backend="native")
    for call in (lambda: choose_codes(L.double(), 0.0, backend="triton"),
                 lambda: next_token(L, E.double(), None, 0.0, backend="triton")):  # fmt: skip
        with pytest.raises(BackendError, match="expected float32, float16 or bfloat16 .* got 1 in float64"):
            call()
    assert choose_codes(L.double(), 0.0, backend=None).tolist() == [0] * 3
    assert next_token(L, E.double().requires_grad_(), None, 0.0)[1].requires_grad is False


@pytest.mark.gpu
def test_a_captured_graph_draws_afresh_when_its_streams_grow() -> None:
    logits, embedding = torch.randn(16, 1000, device="cuda"), torch.randn(1000, 256, device="cuda").bfloat16()
    seed, streams = SEED.cuda(), torch.arange(16, device="cuda") * 2**32
    args = (logits, embedding, None, 1.0, 50, seed, streams)
    next_token(*args, backend="triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, x = next_token(*args, backend="triton")
        streams += 1
    drawn = []
    for step in range(3):
        graph.replay()
        expected, fed = next_token(*args[:-1], torch.arange(16, device="cuda") * 2**32 + step, backend="reference")
        assert torch.equal(codes, expected)
        assert torch.equal(x, fed)
        drawn.append(codes.clone())
    assert not torch.equal(drawn[0], drawn[1])


COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import compile_sm90, variants_sampling
from flexlam_fast.kernels.launch_sampling import OPTIONS
facts = compile_sm90.facts("^token/bf16/")
v = variants_sampling.choice("bf16", 1000, 256, True, True)
types = {name: "*" + kind for name, kind in v.pointers.items()} | v.scalars | dict.fromkeys(v.constants, "constexpr")
source = ASTSource(v.kernel, {name: types[name] for name in v.kernel.arg_names}, v.constants)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": v.warps, **OPTIONS}).asm["ptx"]
print(json.dumps([facts, len(re.findall(r"fma", ptx)), len(re.findall(r"mul.*f32", ptx))]))
"""


def test_no_variant_spills_and_nothing_is_fused() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts: dict[str, dict[str, Any]]
    facts, fused, products = json.loads(done.stdout)
    assert len(facts) == 6
    assert {name: fact for name, fact in facts.items() if fact["spilled"]} == {}
    assert all(fact["wide_loads"] >= 2 for name, fact in facts.items() if "/c1000/" in name), "rows in 16-byte words"
    assert (fused, products >= 100) == (0, True), "a fused multiply-add would round otherwise than the reference"
