"""What the bottleneck's ops refuse, each in one sentence, before anything is launched.

A good call passes a few comparisons; ``check_tensor`` is asked for the sentence only once something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flexlam_fast import backend as backends
from flexlam_fast.checks import check_list, check_number, check_tensor, describe
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops.thresholds import MAX_LEVELS

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_FP32 = torch.finfo(torch.float32).max
MAX_INNER = 2048  # a program of the fused projection holds whole rows
_KERNEL_FLOATS = FLOATS[:3]
_MAX_DIM, _MAX_LEVELS_NATIVE_CUDA = 8, 64


_good: dict[tuple[int, ...], tuple[int, ...]] = {}


def levels_of(levels: object) -> tuple[int, ...]:
    """Return ``levels`` as a tuple of integers of at least 2 whose codes fit in int32.

    Raises:
        InputError: it is something else.
    """
    given = levels if isinstance(levels, tuple) else tuple(check_list("levels", levels, "integers of at least 2"))
    check_levels(given)
    return given


def check_levels(levels: tuple[int, ...]) -> None:
    """Check that ``levels`` holds integers of at least 2, and that their codes fit in int32."""
    try:
        # the same object as last time, as a configuration's levels are; an equal one may hold 8.0 for 8
        if _good.get(levels) is levels:
            return
    except TypeError:
        pass  # holds something that is no number
    if not levels or not all(isinstance(n, int) and n >= 2 for n in levels):
        raise InputError(f"levels: expected integers of at least 2, got {list(levels)!r}")
    if math.prod(levels) >= 2**31:
        raise InputError(f"levels: expected a codebook below 2^31, got {list(levels)!r}")
    if len(_good) < 256:
        _good[levels] = levels


def check_eps(eps: object) -> float:
    """Return what a norm adds to its mean square, if it is a finite number of at least 0.

    Raises:
        InputError: it is something else.
    """
    if type(eps) is float and 0.0 <= eps <= MAX_FP32:
        return eps
    return float(check_number("eps", eps, 0, MAX_FP32))


def check_latents(name: str, z: Tensor, dim: int) -> None:
    """Check a floating ``[..., K, dim]``."""
    if not isinstance(z, Tensor) or z.dim() < 2 or z.shape[-1] != dim or z.dtype not in FLOATS:
        check_tensor(name, z, ["...", "K", dim], FLOATS)


def check_prefix(
    keep: Tensor | None, null: Tensor | None, blocks: torch.Size, slots: int, dim: int, device: torch.device
) -> None:
    """Check ``keep`` and ``null`` against the blocks they belong to."""
    if keep is None:
        return
    if not isinstance(keep, Tensor) or keep.shape != blocks or keep.dtype not in INTEGERS or keep.device != device:
        check_tensor("keep", keep, list(blocks), INTEGERS, device)
    if null is None:
        raise InputError("null: expected a null latent with keep, got None")
    check_null(null, dim, device)
    if not is_readable(keep):
        return
    low, high = map(int, torch.aminmax(keep))
    if low < 0 or high > slots:
        raise InputError(f"keep: expected 0..{slots}, got {low}..{high}")


def check_null(null: Tensor, dim: int, device: torch.device) -> None:
    """Check the shared null latent."""
    if not isinstance(null, Tensor) or null.shape != (dim,) or null.dtype not in FLOATS or null.device != device:
        check_tensor("null", null, [dim], FLOATS, device)


def is_readable(tensor: Tensor) -> bool:
    """Whether reading values is possible and free: a traced tensor has none, one on a GPU would stall its stream."""
    traced = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
    batched = torch._C._functorch.peek_interpreter_stack() is not None
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not traced and not batched


def check_codes(codes: Tensor, levels: Sequence[int], keep: Tensor | None) -> None:
    """Check that retained codes lie in the codebook (on the CPU, where reading them costs little)."""
    if not is_readable(codes):
        return
    size = math.prod(levels)
    low, high = map(int, torch.aminmax(codes))
    if low >= 0 and high < size:
        return
    wrong = (codes < 0) | (codes >= size)
    if keep is not None:
        wrong &= torch.arange(codes.shape[-1], device=codes.device) < keep.unsqueeze(-1)
    if bool(wrong.any()):
        raise InputError(f"codes: expected 0..{size - 1}, got {describe(int(codes[wrong][0]))}")


def pick(backend: str, device: torch.device, dtype: torch.dtype, levels: tuple[int, ...]) -> str:
    """Return the backend that runs ``levels`` in ``dtype`` on ``device``; by name, that one or an error.

    Raises:
        BackendError: a backend asked for by name that is not here, or whose kernels do not take such arguments.
    """
    return _pick(backend, device, dtype, levels)


# torch.compiler.assume_constant_result makes this mark too, but imports the compiler, which takes a second
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _pick(backend: str, device: torch.device, dtype: torch.dtype, levels: tuple[int, ...]) -> str:
    name = backends.choose(backend, device).name
    limit = _limit(name, device, dtype, levels)
    if not limit:
        return name
    if backend == backends.AUTO:
        return backends.REFERENCE
    raise BackendError(f"backend: expected {limit} for {name!r}, got {list(levels)} in {str(dtype).split('.')[1]}")


def _limit(name: str, device: torch.device, dtype: torch.dtype, levels: tuple[int, ...]) -> str:
    """Say what the kernels of ``name`` would need that these arguments are not; empty if they take them."""
    if name == backends.REFERENCE:
        return ""
    if dtype not in _KERNEL_FLOATS:
        return "float32, float16 or bfloat16"
    if len(levels) > _MAX_DIM:
        return f"at most {_MAX_DIM} channels"
    most = _MAX_LEVELS_NATIVE_CUDA if (name, device.type) == (backends.NATIVE, "cuda") else MAX_LEVELS
    return f"at most {most} levels a channel" if max(levels) > most else ""


def choose_native(backend: str, device: torch.device, takes: bool, wanted: str, got: str) -> str:
    """The backend of an op that has C++ for a CPU and no other kernel of ours.

    Args:
        backend: a name, or ``"auto"``, which is C++ where there is some that takes the arguments.
        device: where the arguments are.
        takes: whether C++, if there is some, takes the arguments.
        wanted: what it does take, for the sentence that refuses.
        got: what it was given.

    Raises:
        BackendError: a backend asked for by name that is not here, or does not take the arguments.
    """
    ours = (backends.REFERENCE, backends.NATIVE) if device.type == "cpu" else (backends.REFERENCE,)
    if backend == backends.AUTO:
        there = {status.name for status in backends.probe(device) if status.available}
        fits = takes and backends.NATIVE in ours and backends.NATIVE in there
        return backends.NATIVE if fits else backends.REFERENCE
    if backend in backends.NAMES and backend not in ours:
        names = " or ".join(repr(name) for name in (backends.AUTO, *ours))
        raise BackendError(f"backend: expected {names} for this op on {device.type}, got {backend!r}")
    name = backends.choose(backend, device).name
    if name == backends.NATIVE and not takes:
        raise BackendError(f"backend: expected {wanted} for 'native', got {got}")
    return name
