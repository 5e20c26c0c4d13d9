"""Cases of training's attention, calls of one instruction set, and the plain computation that sets the measure."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from native_cases import BUILT, Forced, variants
from torch import Tensor

from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

#: The module, which the package's function of the same name hides.
MODULE = importlib.import_module("flexlam_fast.ops.self_attention")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = torch.bfloat16


def has_tiles() -> bool:
    """Whether matrix tiles for bf16 run here."""
    if not BUILT:
        return False
    from flexlam_fast import _C

    return _C.takes_tiles(64, 64, 2)


#: Every way that the extension has here, with the dtypes that it takes.
WAYS = [(v, dtype) for v in variants() for dtype in DTYPES] + [("tiles", BF16)] * has_tiles()
every_way = pytest.mark.parametrize(
    ("variant", "dtype"), WAYS, ids=[f"{v}-{str(d).removeprefix('torch.')}" for v, d in WAYS]
)


class Case(NamedTuple):
    """Sizes; ``hidden`` is the part of the keys that a drawn mask hides, None for no mask."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    causal: bool = False
    hidden: float | None = None
    scale: float | None = None


#: The tiny encoder, its sequence model, shared key heads, more keys than one chunk holds, and odd sizes.
CASES = [
    Case(2, 80, 80, 4, 4, 32),
    Case(2, 101, 101, 4, 4, 48, causal=True, hidden=0.3),
    Case(1, 37, 53, 6, 2, 64, causal=True),
    Case(1, 24, 570, 2, 1, 16, hidden=0.5),
    Case(1, 7, 17, 3, 3, 128, hidden=0.3, scale=0.25),
    Case(3, 1, 2, 2, 2, 80),
    Case(1, 16, 32, 1, 1, 112),
    Case(1, 33, 15, 2, 2, 96),
]


class Drawn(NamedTuple):
    """Tensors of a case; ``grad`` is that of the result."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: Tensor | None


def draw(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Drawn:
    """Normal numbers; every query sees at least the first key."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda n, heads: torch.randn(case.batch, n, heads, case.dim, generator=generator).to(dtype)  # noqa: E731
    q, k, v = make(case.queries, case.heads), make(case.keys, case.groups), make(case.keys, case.groups)
    mask = None
    if case.hidden is not None:
        mask = torch.rand(case.queries, case.keys, generator=generator) >= case.hidden
        mask[:, 0] = True
    return Drawn(q, k, v, make(case.queries, case.heads), mask)


def run(case: Case, drawn: Drawn, backend: str = "native") -> tuple[Tensor, ...]:
    """The result and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in drawn[:3]]
    out = MODULE.self_attention(*leaves, mask=drawn.mask, causal=case.causal, scale=case.scale, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, drawn.grad)


def plain(case: Case, mask: Tensor | None, index: int) -> Any:
    """The reference's result (0) or one of its gradients (1, 2, 3), as a function of q, k, v and the upstream one."""
    scale = case.dim**-0.5 if case.scale is None else case.scale

    def call(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = MODULE.reference(*leaves, mask, case.causal, scale)
        return out if index == 0 else torch.autograd.grad(out, leaves, grad)[index - 1]

    return call


def check(case: Case, drawn: Drawn, results: tuple[Tensor, ...]) -> None:
    """Result and gradients are within the budget of the reference in the same dtype."""
    for index, (actual, name) in enumerate(zip(results, ("out", "dq", "dk", "dv"), strict=True)):
        assert actual.dtype == drawn.q.dtype
        factor = dict(factor=GRADIENT_FACTOR) if index else {}
        fn = plain(case, drawn.mask, index)
        assert_within_budget(actual, fn, *drawn[:4], working_dtype=drawn.q.dtype, name=name, **factor)


def force(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Every call of the extension takes one instruction set."""
    monkeypatch.setattr(MODULE, "compiled", lambda backend: Forced(variant))
