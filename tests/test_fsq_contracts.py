"""Contracts of the bottleneck's ops on every backend: drawn lengths, the projection, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fsq_cases import every_run, sample
from fsq_rule import SEED, L, projected, straight_through, suffix_sum
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import philox, reference
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

CPU = torch.device("cpu")


@every_run
def test_seeds_may_be_strided_and_blocks_empty(backend: str, device: str) -> None:
    z, _, null = (t.to(device) for t in sample(L, 5, 8))
    wide = torch.tensor([2**40 + 5, 99, 2**33 + 7, 99], device=device)[::2]
    assert torch.equal(
        ops.fsq_sample(z, L, null, wide, backend=backend)[2].cpu(),
        ops.fsq_sample(z, L, null, wide.contiguous(), backend="reference")[2].cpu(),
    )
    empty = ops.fsq_sample(z[:, :0], L, null, wide, backend=backend)
    assert empty[2].tolist() == [0] * 5
    assert empty[0].shape == (5, 0, 4)


def test_philox_has_the_published_answers() -> None:
    # Random123's known answer of philox4x32-10 for a counter and a key of zeros; Triton's own generator has the rest
    assert int(philox.draw(torch.tensor([0, 0]), 1)) == 0x6627E8D5
    high, low = philox._multiply(0xD2511F53, torch.tensor(0xFFFFFFFF))
    assert (int(high) << 32 | int(low)) == 0xD2511F53 * 0xFFFFFFFF


@pytest.mark.parametrize("slots", [1, 5, 16, 64])
@every_run
def test_drawn_lengths_are_the_same_everywhere(backend: str, device: str, slots: int) -> None:
    z, _, null = (t.to(device) for t in sample(L, 7, slots))
    for weights in (None, [0.0] * slots + [1.0], [1.0 + i % 3 for i in range(slots + 1)]):
        expected = ops.fsq_sample(z.cpu(), L, null.cpu(), SEED, weights, backend="reference")
        ours = ops.fsq_sample(z, L, null, SEED.to(device), weights, backend=backend)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a.cpu(), b)
        assert ours[2].dtype == torch.int32


def test_drawn_lengths_follow_their_odds_and_their_counter() -> None:
    seed, n, odds = torch.tensor([3, 0]), 40_000, [1.0, 0.0, 2.0, 1.0]
    lengths = philox.sample_prefix(seed, philox.prefix_edges(3, tuple(odds), CPU), n)
    share = torch.bincount(lengths, minlength=4) / n
    assert share[1] == 0
    assert torch.allclose(share, torch.tensor(odds) / 4, atol=0.01), "three standard deviations are 0.0075"
    uniform = philox.sample_prefix(seed, philox.prefix_edges(16, None, CPU), n)
    expected = n / 17
    chi = float(((torch.bincount(uniform, minlength=17) - expected) ** 2 / expected).sum())
    assert chi < 39.3, "chi-squared with 16 degrees of freedom: 1 in 1000"
    later = philox.sample_prefix(torch.tensor([3, 100]), philox.prefix_edges(16, None, CPU), 50)
    assert torch.equal(later, uniform[100:150]), "a batch continues where the one before ended"


@every_run
def test_drawn_lengths_carry_gradients(backend: str, device: str) -> None:
    z, _, null = sample(L, 8, 6)
    z, null = z.to(device).requires_grad_(), null.to(device).requires_grad_()
    weight = torch.randn(z.shape, device=device)
    latents, _, keep = ops.fsq_sample(z, L, null, SEED.to(device), backend=backend)
    ours = torch.autograd.grad(latents, [z, null], weight)
    theirs = torch.autograd.grad(ops.fsq(z, L, keep, null, backend=backend)[0], [z, null], weight)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_captured_graph_draws_afresh_when_its_seed_grows(backend: str) -> None:
    z, _, null = (t.cuda() for t in sample(L, 64, 64))
    seed = torch.tensor([1, 0], device="cuda")
    ops.fsq_sample(z, L, null, seed, backend=backend)  # compiles, and makes the constants
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents, codes, keep = ops.fsq_sample(z, L, null, seed, backend=backend)
        seed[1] += 64
    drawn = []
    for step in range(3):
        graph.replay()
        expected = ops.fsq_sample(z, L, null, torch.tensor([1, 64 * step], device="cuda"), backend="reference")
        assert torch.equal(keep, expected[2])
        assert torch.equal(latents, expected[0])
        assert torch.equal(codes, expected[1])
        drawn.append(keep.clone())
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("slots", [8, 9])  # 48 tokens are whole groups, 54 are not
@pytest.mark.parametrize("levels", [L, (7, 5, 5, 5, 5)], ids=str)
@pytest.mark.parametrize("prefix", [False, True])
@every_run
def test_the_projection_is_within_the_budget(
    backend: str, device: str, levels: tuple[int, ...], prefix: bool, slots: int
) -> None:
    x, weight, bias, keep, null = (t.to(device).detach() for t in projected(levels, 40, slots=slots))
    given = (keep, null) if prefix else (None, None)
    inputs = [t.requires_grad_() for t in (x, weight, bias)] + ([null.requires_grad_()] if prefix else [])
    latents, codes = ops.fsq_project(x, weight, bias, levels, *given, backend=backend)
    z = reference.project(x, weight, bias).detach()
    expected, expected_codes = ops.fsq(z, levels, *(t if t is None else t.detach() for t in given), backend="reference")
    same = codes == expected_codes
    assert int((~same).sum()) == 0, "none of these z lies within rounding of a threshold"
    assert torch.equal(latents, expected)
    up = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad(latents, inputs, up)
    kept = keep if prefix else torch.full_like(keep, x.shape[-2])
    budget = dict(working_dtype=torch.float32, factor=GRADIENT_FACTOR)

    def grad_z(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        return straight_through(x @ weight.mT + bias, up, levels, kept)

    def grad_x(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        return grad_z(x, weight, bias, up) @ weight

    def grad_weight(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        return grad_z(x, weight, bias, up).flatten(0, 1).mT @ x.flatten(0, 1)

    def grad_bias(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        return grad_z(x, weight, bias, up).flatten(0, 1).sum(0)

    for grad, rule in zip(grads, (grad_x, grad_weight, grad_bias), strict=False):
        assert_within_budget(grad, rule, x, weight, bias, up, name=rule.__name__, **budget)  # type: ignore[arg-type]
    if prefix:
        assert_within_budget(grads[3], suffix_sum, up, keep, name="dnull", **budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [8, 9])
@pytest.mark.parametrize("levels", [(9,), (5, 4), (3, 4, 6), (3,) * 8], ids=str)
@every_run
def test_the_projection_of_any_number_of_channels(
    backend: str, device: str, levels: tuple[int, ...], slots: int
) -> None:
    x, weight, bias, keep, null = (t.to(device) for t in projected(levels, 40, slots=slots))
    ours = ops.fsq_project(x, weight, bias, levels, keep, null, backend=backend)
    theirs = ops.fsq(reference.project(x, weight, bias), levels, keep, null, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_run
def test_the_projection_takes_bf16_no_bias_and_autocast(backend: str, device: str) -> None:
    x, weight, *_ = (t.to(device) for t in projected(L, width=200))
    expected = ops.fsq_project(x, weight, None, L, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        cast = ops.fsq_project(x, weight, None, L, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True)), "arithmetic stays fp32"
    for slots in (8, 9):
        x = projected(L, width=200, slots=slots)[0].to(device).bfloat16()
        half = ops.fsq_project(x, weight, None, L, backend=backend)
        latents, codes = ops.fsq(reference.project(x, weight, None), L)
        assert half[0].dtype == torch.bfloat16
        assert torch.equal(half[1], codes)
        assert torch.equal(half[0], latents.bfloat16())


WRONG = [
    (lambda z, n: ops.fsq_project(z, n, None, L), r"^weight: expected \[4,4\] float32 or .*, got \[4\] float32 cpu$"),
    (lambda z, n: ops.fsq_project(z, z[0, :4], n[:3], L), r"^bias: expected \[4\] .*, got \[3\] float32 cpu$"),
    (lambda z, n: ops.fsq_project(n, n, None, L), r"^x: expected \[\.\.\.,K,4\] .*, got \[4\] float32 cpu$"),
    (lambda z, n: ops.fsq_sample(z, L, n, SEED.int()), r"^seed: expected \[2\] int64 cpu, got \[2\] int32 cpu$"),
    (lambda z, n: ops.fsq_sample(z, L, n[:2], SEED), r"^null: expected \[4\] .*, got \[2\] float32 cpu$"),
    (lambda z, n: ops.fsq_sample(z, L, n, SEED, [1.0]), r"^weights: expected 7 odds for the lengths 0\.\.6, got \["),
    (lambda z, n: ops.fsq_sample(z, L, n, SEED, [-1.0] * 7), r"^weights: expected a number in 0\.\."),
    (lambda z, n: ops.fsq(z, [[8], 5, 5, 5]), r"^levels: expected integers of at least 2"),
    (lambda z, n: ops.fsq(z, (8.0, 5, 5, 5)), r"^levels: expected integers of at least 2"),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_one_sentence_says_what_is_wrong(call: Callable[[Tensor, Tensor], object], sentence: str) -> None:
    ops.fsq(torch.zeros(1, 1, 4), L)
    with pytest.raises(InputError, match=sentence) as caught:
        call(torch.zeros(5, 6, 4), torch.zeros(4))
    assert "\n" not in str(caught.value)


@every_run
def test_what_kernels_do_not_take_is_refused_by_name_and_left_to_the_reference_by_auto(
    backend: str, device: str
) -> None:
    cases = [
        (torch.zeros(2, 3, 4, dtype=torch.float64, device=device), L, "float32, float16 or bfloat16"),
        (torch.zeros(2, 3, 9, device=device), (3,) * 9, "at most 8 channels"),
        (torch.zeros(2, 3, 1, device=device), (1000,), "levels a channel"),
    ]
    for z, levels, sentence in cases:
        with pytest.raises(BackendError, match=sentence) as caught:
            ops.fsq(z, levels, backend=backend)
        assert "\n" not in str(caught.value)
        assert torch.equal(ops.fsq(z, levels)[1], ops.fsq(z, levels, backend="reference")[1])


def test_the_bottleneck_hands_its_backend_on() -> None:
    for name in ("reference", "native"):
        torch.manual_seed(0)
        bottleneck = Bottleneck(BottleneckConfig(levels=L, slots=6), name)
        assert bottleneck.backend == name
        out = bottleneck(torch.randn(3, 6, 4), torch.tensor([0, 3, 6]))
        out.latents.sum().backward()
        assert bottleneck.null.grad is not None
        assert bottleneck.null.grad.tolist() == [9.0] * 4
