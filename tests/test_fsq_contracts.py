"""The bottleneck's ops as PyTorch sees them: schemas, fakes, compilers, autograd, drawn lengths, the projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from fsq_cases import every_run, sample
from test_fsq_backends import straight_through, suffix_sum
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlam_fast import ops
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import gradients, philox, reference
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

L = (8, 5, 5, 5)
CPU = torch.device("cpu")
SEED = torch.tensor([2**40 + 5, 2**33 + 7])


def projected(levels: tuple[int, ...], width: int = 24, blocks: int = 6, slots: int = 9) -> tuple[Tensor, ...]:
    """``x``, ``weight``, ``bias``, ``keep``, ``null``."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(blocks, slots, width, generator=generator)
    weight = torch.randn(len(levels), width, generator=generator) * width**-0.5
    bias = torch.randn(len(levels), generator=generator) * 0.1
    return x, weight, bias, torch.arange(blocks) % (slots + 1), torch.randn(len(levels), generator=generator)


@every_run
def test_opcheck(backend: str, device: str) -> None:
    z, keep, null = (t.to(device) for t in sample(L, 3, 6))
    x, weight, bias, kept, fill = (t.to(device) for t in projected(L))
    z, null, x = z.requires_grad_(), null.requires_grad_(), x.requires_grad_()
    codes = torch.zeros(3, 6, dtype=torch.int32, device=device)
    edges = philox.prefix_edges(6, None, torch.device(device))
    calls: list[tuple[str, tuple[object, ...]]] = [
        ("fsq", (z, L, keep, null, backend)),
        ("fsq", (z, L, None, None, backend)),
        ("fsq_backward", (z.detach(), z.detach(), L, keep, True, backend)),
        ("fsq_sample", (z, L, null, SEED.to(device), edges, backend)),
        ("codes_to_latents", (codes, L, keep, null, backend)),
    ]
    if backend == "triton":
        calls += [("fsq_project", (x, weight, bias, L, kept, fill, backend))]
        grad = torch.randn(*x.shape[:-1], 4, device=device)
        calls += [("fsq_project_backward", (grad, x.detach(), weight, bias, L, kept, backend))]
    for name, args in calls:
        told = torch.library.opcheck(getattr(torch.ops.flexlam_fast, name).default, args)
        assert set(told.values()) == {"SUCCESS"}, (name, told)


@every_run
def test_gradcheck_of_the_null(backend: str, device: str) -> None:
    """The latents are linear in the null, so that differences of a quarter are exact but for fp32."""
    z, keep, null = (t.to(device) for t in sample(L, 3, 4))
    codes = ops.fsq(z, L)[1]
    loose = dict(eps=0.25, atol=1e-3, rtol=1e-3, nondet_tol=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input #0 requires gradient and is not a double precision")
        fsq = lambda n: ops.fsq(z, L, keep, n, backend=backend)[0]  # noqa: E731
        assert torch.autograd.gradcheck(fsq, null.requires_grad_(), **loose)  # type: ignore[arg-type]
        lookup = lambda n: ops.codes_to_latents(codes, L, keep, n, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(lookup, null, **loose)  # type: ignore[arg-type]


def everything(backend: str, seed: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    def run(z: Tensor, keep: Tensor, null: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        latents, codes = ops.fsq(z, L, keep, null, backend=backend)
        drawn, _, lengths = ops.fsq_sample(z, L, null, seed, backend=backend)
        wide, _ = ops.fsq_project(x, weight, None, L, None, None, backend=backend)
        return latents, drawn, wide, ops.codes_to_latents(codes, L, keep, null, backend=backend), codes, lengths

    return run


@pytest.mark.parametrize("dynamic", [False, True])
@every_run
def test_one_graph_under_torch_compile_with_the_same_results(backend: str, device: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    z, keep, null = (t.to(device) for t in sample(L, 4, 9))
    x, weight, *_ = (t.to(device) for t in projected(L))
    run = everything(backend, SEED.to(device))
    inputs = [t.requires_grad_() for t in (z, null, x, weight)]
    results = []
    # inductor checks strides too; with a GPU's compiler or the host's it is slower, so once
    compiler = "inductor" if backend == "triton" and not dynamic else "aot_eager"
    for call in (run, torch.compile(run, fullgraph=True, backend=compiler, dynamic=dynamic)):
        out = call(z, keep, null, x, weight)
        grads = torch.autograd.grad(sum(t.square().sum() for t in out[:4]), inputs)
        results.append((*out, *grads))
    for plain, compiled in zip(*results, strict=True):
        if compiler == "inductor":  # it may sum in another order
            assert torch.allclose(plain, compiled, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(plain, compiled)


def test_constants_made_in_one_mode_serve_in_every_other() -> None:
    """A level set first seen in inference mode, under fake tensors or another default dtype poisons no cache."""
    new = iter([(6, 11), (6, 12), (6, 13), (6, 14)])
    z = torch.randn(2, 3, 2)

    def works(levels: tuple[int, ...]) -> None:
        for name in ("reference", "native"):
            free = z.clone().requires_grad_()
            latents, _ = ops.fsq(free, levels, backend=name)
            latents.sum().backward()
            assert latents.dtype == torch.float32
            assert free.grad is not None

    levels = next(new)
    with torch.inference_mode():
        ops.fsq(z, levels)
        ops.fsq(z, levels, backend="reference")
    works(levels)
    levels = next(new)
    keep, null, seed = torch.tensor([1, 3]), torch.zeros(2), torch.tensor([1, 2])
    with FakeTensorMode() as mode:
        fake, kept, fill, start = (mode.from_tensor(t) for t in (z, keep, null, seed))
        for backend in (None, "reference"):
            latents, codes = ops.fsq(fake, levels, kept, fill, backend=backend)
            assert ops.codes_to_latents(codes, levels, kept, fill, backend=backend).shape == latents.shape == z.shape
            assert ops.fsq_sample(fake, levels, fill, start, backend=backend)[2].shape == (2,)
    works(levels)
    assert (
        ops.fsq_sample(z, levels, null, seed)[2].tolist()
        == ops.fsq_sample(z, levels, null, seed, backend="reference")[2].tolist()
    )
    levels = next(new)
    torch.set_default_dtype(torch.float64)
    try:
        latents, codes = ops.fsq(z, levels)
        assert torch.equal(ops.codes_to_latents(codes, levels), latents)
    finally:
        torch.set_default_dtype(torch.float32)
    works(levels)


def test_only_plain_calls_go_straight_to_the_launcher() -> None:
    z = torch.zeros(1, 1, 4)
    assert gradients.is_plain(z)
    assert gradients.is_plain(torch.nn.Parameter(z))
    with FakeTensorMode() as mode:
        assert not gradients.is_plain(mode.from_tensor(z))
        assert not gradients.is_plain(z)
    seen = []
    torch.func.vmap(lambda t: seen.append(gradients.is_plain(t)) or t)(z)
    assert seen == [False]


def test_functorch_gets_the_reference_from_auto() -> None:
    z, keep, null = sample(L, 3, 5)
    for give in (lambda n: ops.fsq(z, L, keep, n)[0].sum(), lambda n: ops.fsq_sample(z, L, n, SEED)[0].sum()):
        (plain,) = torch.autograd.grad(give(null.requires_grad_()), null)
        assert torch.equal(torch.func.grad(give)(null.detach()), plain)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        tangent = torch.autograd.forward_ad.unpack_dual(ops.fsq(dual, L)[0]).tangent
    assert tangent is not None
    assert float(tangent.abs().min()) > 0


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
    (lambda z, n: ops.fsq_sample(z, L, n, SEED, [-1.0] * 7), r"^weights: expected 7 odds"),
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


def test_the_bottleneck_hands_its_backend_on() -> None:
    for name in ("reference", "native"):
        torch.manual_seed(0)
        bottleneck = Bottleneck(BottleneckConfig(levels=L, slots=6), name)
        assert bottleneck.backend == name
        out = bottleneck(torch.randn(3, 6, 4), torch.tensor([0, 3, 6]))
        out.latents.sum().backward()
        assert bottleneck.null.grad is not None
        assert bottleneck.null.grad.tolist() == [9.0] * 4
