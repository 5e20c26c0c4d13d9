"""The bottleneck's ops as PyTorch sees them: schemas, fakes, compilers and autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from fsq_cases import every_run, sample
from fsq_rule import SEED, L, projected
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlam_fast import ops
from flexlam_fast.ops import gradients, philox


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
