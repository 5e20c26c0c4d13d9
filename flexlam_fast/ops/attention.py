"""Dense attention behind one function: which implementation runs is chosen once and said aloud (design section 5).

Torch's own, the flash-attn and xformers packages where they are installed, a Triton kernel, and plain PyTorch take the
same arguments and mean the same: softmax of ``q k^T / sqrt(D)`` over the keys, in fp32, times ``v``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, REFERENCE, TRITON, BackendStatus, named, probe
from flexlam_fast.checks import check_choice, check_tensor, describe
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import arguments as check
from flexlam_fast.ops import contracts, gradients

SDPA, FLASH_ATTN, XFORMERS, TORCH_VARLEN = "sdpa", "flash_attn", "xformers", "torch_varlen"
IMPLEMENTATIONS = (FLASH_ATTN, XFORMERS, SDPA, TRITON, REFERENCE)
_HALVES = (torch.float16, torch.bfloat16)


class AttentionChoice(NamedTuple):
    """The implementation that was taken and the sentence that says why."""

    name: str
    reason: str


@outside_autocast
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, implementation: str = AUTO) -> Tensor:
    """Attend from every query to every key, or with ``causal`` only to those that are not later.

    Args:
        q: ``[B, N, H, D]`` floating, any strides.
        k: ``[B, M, G, D]`` of the same dtype; ``G`` divides ``H``, and ``H / G`` neighbouring heads share a key head.
        v: as ``k``.
        causal: aligned to the last key: query ``i`` sees keys ``0..M-N+i``, which needs ``M >= N``.
        implementation: a name from :func:`choose_attention`, called once at construction; ``"auto"`` chooses here.

    Returns:
        ``[B, N, H, D]`` in ``q``'s dtype. All implementations but ``"triton"`` have gradients.

    Raises:
        InputError: wrong shapes, dtypes or devices, no keys, or ``causal`` with more queries than keys.
        BackendError: an implementation asked for by name that cannot run here.
    """
    _check(q, k, v, causal)
    name = _pick(named(implementation), q.device, q.dtype, q.shape[-1])
    if name == TRITON and gradients.wants_gradient(q, k, v):
        raise BackendError("implementation: expected one with gradients, got 'triton'")
    return _RUN[name](q, k, v, causal) if q.numel() else torch.empty_like(q)


def choose_attention(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, implementation: str = AUTO
) -> AttentionChoice:
    """Choose an implementation, once, at construction of a model.

    ``auto`` takes flash-attn for half precision on a GPU where it is installed, and torch's SDPA, which has
    FlashAttention-2 inside, everywhere else.

    Args:
        device: where the tensors will live.
        dtype: of queries, keys and values.
        head_dim: ``D``.
        implementation: ``"auto"``, or one of ``IMPLEMENTATIONS``, which is then taken or refused.

    Raises:
        BackendError: there is no such implementation, or it was asked for by name and cannot run here.
    """
    return choose_among(IMPLEMENTATIONS, (FLASH_ATTN, SDPA), torch.device(device), dtype, head_dim, implementation)


def choose_among(
    names: tuple[str, ...],
    fastest: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    implementation: str,
) -> AttentionChoice:
    """Choose one of ``names``, or for ``auto`` the first of ``fastest`` that can run; dense or packed, by one rule.

    Raises:
        BackendError: there is no such implementation, or it was asked for by name and cannot run here.
    """
    check_choice("implementation", implementation, (AUTO, *names), BackendError)
    if implementation == AUTO:
        problems = [(name, _problem(name, device, dtype, head_dim, load=True)) for name in fastest]
        name = next(name for name, problem in problems if not problem)
        left = "; ".join(f"{other}: {problem}" for other, problem in problems[: fastest.index(name)])
        kind, without = str(dtype).removeprefix("torch."), f" (without {left})" if left else ""
        return AttentionChoice(name, f"the fastest on {device} in {kind}: {_WHAT[name]}{without}")
    problem = _problem(implementation, device, dtype, head_dim, load=True)
    if problem:
        raise BackendError(f"implementation: expected one that runs here, got {implementation!r}: {problem}")
    return AttentionChoice(implementation, f"asked for by name: {_WHAT[implementation]}")


def available_attention(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple[BackendStatus, ...]:
    """Say of every implementation whether it can run for such tensors, and in one sentence why or why not.

    Nothing is imported for it: a package that is installed but does not load shows only once it is chosen.
    """
    problems = {name: _problem(name, torch.device(device), dtype, head_dim) for name in IMPLEMENTATIONS}
    return tuple(BackendStatus(name, not problem, problem or _WHAT[name]) for name, problem in problems.items())


def attend_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Run the Triton kernel on checked arguments; ``torch.ops.flexlam_fast.attend_dense``."""
    return contracts.compiled(TRITON, "launch_attention").attention(q, k, v, causal)


def _fake(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return q.new_empty(q.shape)


contracts.define("(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor", attend_dense, _fake)


def _reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Products in the dtype of the tensors, softmax in at least fp32."""
    queries, keys, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.repeat_interleave(share, dim=2).transpose(1, 2) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~_visible(queries, keys, q.device), -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Torch's; its own ``is_causal`` is aligned to the first key, so only a square takes it, and one query none."""
    queries, keys = q.shape[1], k.shape[1]
    mask: Any = None
    if causal and 1 < queries < keys:
        # the mask as an object keeps FlashAttention on a GPU; on the CPU torch would write it out with a warning
        if q.device.type == "cuda":
            bias = importlib.import_module("torch.nn.attention.bias")  # here, because it imports Triton
            mask = bias.causal_lower_right(queries, keys)
        else:
            mask = _visible(queries, keys, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # sizes are tensors in torch.jit.trace
    square, grouped = bool(causal and 1 < queries == keys), bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=grouped).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``flash_attn_func`` takes our layout, shares key heads as we do, and is aligned to the last key since 2.1."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _module("flash_attn").flash_attn_func(q, k, v, causal=causal)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``memory_efficient_attention``; shared key heads are its fifth dimension ``[B, M, G, H / G, D]``, expanded."""
    shape, share = q.shape, q.shape[2] // k.shape[2]
    if share > 1:
        q = q.unflatten(2, (k.shape[2], share))
        k, v = (t.unsqueeze(3).expand(-1, -1, -1, share, -1) for t in (k, v))
    bias = _module("xformers.ops.fmha.attn_bias").LowerTriangularFromBottomRightMask() if causal else None
    return _module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=bias).reshape(shape)


def _triton(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    run = attend_dense if gradients.is_plain(q, k, v) else gradients.OPS.attend_dense.default
    return run(q, k, v, causal)


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    FLASH_ATTN: _flash_attn,
    XFORMERS: _xformers,
    SDPA: _sdpa,
    TRITON: _triton,
    REFERENCE: _reference,
}
_WHAT = {
    FLASH_ATTN: "the flash-attn package",
    XFORMERS: "the xformers package",
    TORCH_VARLEN: "torch's own attention of packed sequences",
    SDPA: "torch's scaled_dot_product_attention",
    TRITON: "our Triton kernel, forward only",
    REFERENCE: "plain PyTorch with an explicit softmax",
}
#: Where each lives, the module that must load, and the step of head sizes it takes.
_PACKAGES = {
    FLASH_ATTN: ("flash_attn", "flash_attn", 1),
    XFORMERS: ("xformers", "xformers.ops", 8),
    TORCH_VARLEN: ("torch.nn.attention.varlen", "torch.nn.attention.varlen", 8),
}
_module = lru_cache(maxsize=8)(importlib.import_module)


def _visible(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _pick(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return _known_pick(implementation, device, dtype, head_dim)


# an implementation is no part of a traced graph; see arguments.pick
_pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _known_pick(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return choose_attention(device, dtype, head_dim, implementation).name


def _problem(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, load: bool = False) -> str:
    """Say why ``name`` cannot run; empty if it can. With ``load`` its package is imported to make sure."""
    if name in (SDPA, REFERENCE):
        return ""
    kind = str(dtype).removeprefix("torch.")
    if name == TRITON:
        status = next(s for s in probe(device) if s.name == TRITON)
        if not status.available:
            return status.reason
        if dtype not in check.FLOATS[:3]:
            return f"it has code for float32, float16 and bfloat16, not for {kind}"
        return "" if head_dim in (16, 32, 64, 128) else f"it has code for head sizes 16, 32, 64, 128, not {head_dim}"
    return _package_problem(name, device, kind, dtype, head_dim) or (_load_problem(name) if load else "")


def _package_problem(name: str, device: torch.device, kind: str, dtype: torch.dtype, head_dim: int) -> str:
    package, _, step = _PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        return f"{name} is not installed" if package == name else f"this torch has no {package}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"{name} needs a CUDA device" + ("" if device.type == "cuda" else f", not {device.type}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} needs sm_80 or later"
    if dtype not in _HALVES:
        return f"{name} is for float16 and bfloat16 here, not for {kind}"
    if head_dim > 256 or head_dim % step:
        multiples = f", multiples of {step}" if step > 1 else ""
        return f"{name} takes head sizes up to 256{multiples}, not {head_dim}"
    return ""


def _load_problem(name: str) -> str:
    """Packages built against another torch are found but do not load."""
    try:
        _module(_PACKAGES[name][1])
    except (ImportError, OSError) as error:
        return f"it is installed but does not load: {' '.join(str(error).split())}"
    return ""


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    check_tensor("q", q, ["B", "N", "H", "D"], check.FLOATS)
    batch, queries, heads, dim = q.shape
    check_tensor("k", k, [batch, "M", "G", dim], q.dtype, q.device)
    check_tensor("v", v, list(k.shape), q.dtype, q.device)
    keys, groups = k.shape[1:3]
    if not groups or not keys or not dim or heads % groups:
        raise InputError(f"k: expected at least one key and a number of heads that divides {heads}, got {describe(k)}")
    if causal and keys < queries:
        raise InputError(f"k: expected at least the {queries} queries' number of keys with causal, got {describe(k)}")
