"""Where the ops over rows run on this machine, plain PyTorch beside them, and arguments; shared by their tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import KERNELS
from native_cases import Forced, variants
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.ops import activation, contracts, modulate, row_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


class Way(NamedTuple):
    """A backend on a device, and which of its instruction sets ("": the one it picks)."""

    backend: str
    device: str
    variant: str = ""


WAYS = [Way(*run) for run in KERNELS if run[0] != "native"]
WAYS += [Way(*run, variant) for run in KERNELS if run[0] == "native" for variant in variants()]
NATIVE = [way for way in WAYS if way.backend == "native"]


def named(way: Way) -> str:
    return "-".join(filter(None, way))


every_way = pytest.mark.parametrize("way", WAYS, ids=named, indirect=True)
every_backend = pytest.mark.parametrize("way", [Way(*run) for run in KERNELS], ids=named, indirect=True)
every_native = pytest.mark.parametrize("way", NATIVE, ids=named, indirect=True)


def force(monkeypatch: pytest.MonkeyPatch, way: Way) -> Way:
    """Make the native backend's calls use the way's instruction set."""
    if way.variant:
        for module in (row_norm, modulate, activation):
            monkeypatch.setattr(module, "compiled", lambda *_: Forced(way.variant))
        assert contracts.compiled is not row_norm.compiled
    return way


class Op(NamedTuple):
    """An op as the tests call it: ours, plain PyTorch, and which arguments have a gradient."""

    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    make: Callable[..., tuple[Tensor, ...]]


def numbers(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def of_examples(b: int, n: int, w: int) -> tuple[Tensor, ...]:
    """``x``, then two rows of parameters for every example, as halves of one tensor."""
    return 2 * numbers(b, n, w) + 0.5, *numbers(b, 2 * w, seed=1, spread=0.3).chunk(2, dim=-1)


def of_all(b: int, n: int, w: int) -> tuple[Tensor, ...]:
    """``x``, then one weight and one bias."""
    return 2 * numbers(b, n, w) + 0.5, 1 + numbers(w, seed=1, spread=0.3), numbers(w, seed=2)


def two(b: int, n: int, w: int) -> tuple[Tensor, ...]:
    return 2 * numbers(b, n, w), numbers(b, n, w, seed=1)


OPS = {
    "adaln": Op(
        lambda *t, **k: ops.adaln(*t, eps=EPS, **k),
        lambda x, shift, scale: row_norm.reference(x, scale, shift, EPS, True, True, x.dtype),
        of_examples,
    ),
    "adaln_shared": Op(
        lambda *t, **k: ops.adaln(*t, eps=EPS, **k),
        lambda x, shift, scale: row_norm.reference(x, scale, shift, EPS, True, True, x.dtype),
        of_all,
    ),
    "layer_norm": Op(
        lambda *t, **k: ops.layer_norm(*t, **k),
        lambda x, weight, bias: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias),
        of_all,
    ),
    "no_bias": Op(
        lambda x, weight, **k: ops.layer_norm(x, weight, None, **k),
        lambda x, weight: torch.nn.functional.layer_norm(x, x.shape[-1:], weight),
        lambda *size: of_all(*size)[:2],
    ),
    "rms_norm": Op(
        lambda *t, **k: ops.rms_norm(*t, EPS, **k),
        lambda x, weight: row_norm.reference(x, weight, None, EPS, False, False, x.dtype),
        lambda *size: of_all(*size)[:2],
    ),
    "gate_add": Op(
        lambda *t, **k: ops.gate_add(*t, **k),
        modulate.reference_gate_add,
        lambda b, n, w: (*two(b, n, w), numbers(b, w, seed=2)),
    ),
    "gate_add_shared": Op(
        lambda *t, **k: ops.gate_add(*t, **k),
        modulate.reference_gate_add,
        lambda b, n, w: (*two(b, n, w), numbers(w, seed=2)),
    ),
    "gelu": Op(
        lambda x, **k: ops.gelu(x, **k),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda *size: two(*size)[:1],
    ),
    "swiglu": Op(lambda *t, **k: ops.swiglu(*t, **k), activation.reference_swiglu, two),
}
every_op = pytest.mark.parametrize("name", OPS)


def leaves(args: tuple[Tensor, ...], device: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The arguments on the device as leaves of their own."""
    return [t.detach().clone().to(device, dtype or t.dtype).requires_grad_() for t in args]


def gradients(out: Tensor, args: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, args, grad.to(out.device, out.dtype))


def gradient_of(name: str, which: int) -> Callable[..., Tensor]:
    """Plain PyTorch's gradient of one argument, of the arguments and the gradient that comes in."""

    def run(*args: Any) -> Tensor:
        *tensors, grad = args
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(OPS[name].plain(*inputs), inputs, grad)[which]

    return run


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8)
