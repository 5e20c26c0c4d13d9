"""The decision's attention: new keys and values go into pages, and queries attend over a session's page table.

Pages ``[pages, P, G, D]`` hold ``P`` tokens of ``G`` key heads each; query head ``h`` of ``H`` belongs to key head
``h // (H / G)``. A page table says, in time order, which pages a session sees (design section 3). The values of tables,
counts and rows are read where they are, on the device, and so are not checked: a page beyond the pool reads the nearest
one, a row beyond it is not stored. Nothing here has a gradient, whatever the backend.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON, named
from flexlam_fast.checks import check_number, check_tensor
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import linear, native_decode
from flexlam_fast.ops import paged_reference as reference
from flexlam_fast.ops.arguments import FLOATS, MAX_FP32, check_eps
from flexlam_fast.ops.contracts import compiled, define
from flexlam_fast.ops.gradients import OPS, is_plain, is_transformed

LEAST_DIM, MOST_DIM = 16, 256  # of a head: a matrix instruction's depth, and what a tile's registers hold


@outside_autocast
@torch.no_grad()
def write_pages(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    positions: Tensor,
    rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    theta: float,
    eps: float,
    backend: str | None = AUTO,
) -> Tensor:
    """Norm queries and keys per head, rotate them (RoPE), and store keys and values in their pages.

    The norm and the rotation are the sequence model's: fp32 inside, rounded to the dtype where its modules round.
    Angles are formed and reduced in fp64, and are as exact at position 10^12 as at 0.

    Args:
        qkv: ``[B, N, (H + 2 G) D]`` floating: the projections of queries, keys and values, side by side.
        q_norm: ``[D]`` in ``qkv``'s dtype, the weight of the queries' RMS norm.
        k_norm: ``[D]`` likewise, of the keys'.
        positions: int64 ``[B, N]``, RoPE positions; any strides.
        rows: int64 ``[B, N]``, where to store each token: ``page * P + offset``, each row once; any strides. A negative
            row stores nothing.
        k_pages: ``[pages, P, G, D]`` contiguous, in ``qkv``'s dtype; written.
        v_pages: likewise; written.
        theta: base of the RoPE frequencies ``theta**(-2i/D)``.
        eps: added to the mean square.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA where
            its kernels fit, and C++ on a CPU.

    Returns:
        Queries ``[B, N, H, D]``, normed and rotated.

    Raises:
        InputError: wrong shape, dtype, layout or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    if is_transformed():
        raise InputError("write_pages: expected a call outside torch.func, which cannot see its writes, got one inside")
    _check_pages(k_pages, v_pages)
    kv_heads, dim = k_pages.shape[2:]
    heads = qkv.shape[2] // dim - 2 * kv_heads if isinstance(qkv, Tensor) and qkv.dim() == 3 else 0
    if heads < 1 or qkv.shape[2] % dim or heads % kv_heads or not _alike(qkv, k_pages):
        check_tensor("qkv", qkv, ["B", "N", f"(H+{2 * kv_heads})*{dim}"], k_pages.dtype, k_pages.device)
        raise InputError(f"qkv: expected (H+{2 * kv_heads})*{dim} columns, H of {kv_heads}s, got {qkv.shape[2]}")
    if dim % 2:
        raise InputError(f"k_pages: expected an even head dimension to rotate, got {dim}")
    _expect("q_norm", q_norm, (dim,), qkv.dtype, qkv)
    _expect("k_norm", k_norm, (dim,), qkv.dtype, qkv)
    _expect("positions", positions, tuple(qkv.shape[:2]), torch.int64, qkv)
    _expect("rows", rows, tuple(qkv.shape[:2]), torch.int64, qkv)
    args = qkv, q_norm, k_norm, positions, rows, k_pages, v_pages, _theta(theta), check_eps(eps)
    name = pick(backend, qkv.device, qkv.dtype, dim)
    if name == REFERENCE:
        return reference.write_pages(*args)
    return page_write(*args, name) if is_plain(*args[:7]) else OPS.page_write.default(*args, name)


@outside_autocast
@torch.no_grad()
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    context: Tensor,
    start: Tensor,
    *,
    backend: str | None = AUTO,
) -> Tensor:
    """Softmax attention, scaled by ``1/sqrt(D)``, of new tokens over the pages of their session.

    A session sees in full the ``context`` pages that come first in its row of ``table``. Its own tokens stand, in
    order, in the table's next pages; query ``n`` is number ``start + n`` of them and sees those up to itself. A
    negative number sees the context only, and a query that sees nothing gives zeros. A session's result does not depend
    on the other sessions, nor on which pages hold its tokens, by a single bit; with Triton and C++ not on ``B`` either.

    Args:
        q: ``[B, N, H, D]`` floating.
        k_pages: ``[pages, P, G, D]`` contiguous, in ``q``'s dtype.
        v_pages: likewise.
        table: int32 ``[B, T]``; entries that nothing needs may hold anything.
        context: int32 ``[B]``, ``0..T``; any stride.
        start: int32 ``[B]``; any stride.
        backend: as in :func:`write_pages`.

    Returns:
        ``[B, N, H, D]`` in ``q``'s dtype.

    Raises:
        InputError: wrong shape, dtype, layout or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check_attention(q, k_pages, v_pages, table, context, start)
    args = q, k_pages, v_pages, table, context, start
    name = pick(backend, q.device, q.dtype, q.shape[3])
    if name == REFERENCE:
        return reference.paged_attention(*args)
    return page_attend(*args, name) if is_plain(*args) else OPS.page_attend.default(*args, name)


@outside_autocast
@torch.no_grad()
def attend_add(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    context: Tensor,
    start: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    backend: str | None = AUTO,
) -> Tensor:
    """Return ``residual + attended @ weight.T``: :func:`paged_attention`, then the output projection.

    The attended values are rounded to the dtype, as between two modules; the sum with the residual is rounded once. The
    number of tokens ``B N`` chooses the projection's tile, and with it the order of its sums.

    Args:
        q: ``[B, N, H, D]`` floating.
        k_pages: as in :func:`paged_attention`.
        v_pages: as in :func:`paged_attention`.
        table: as in :func:`paged_attention`.
        context: as in :func:`paged_attention`.
        start: as in :func:`paged_attention`.
        weight: ``[W, H D]`` in ``q``'s dtype.
        residual: ``[B, N, W]`` in ``q``'s dtype; it is not written to.
        backend: as in :func:`write_pages`.

    Returns:
        ``[B, N, W]`` in ``q``'s dtype.

    Raises:
        InputError: wrong shape, dtype, layout or device.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check_attention(q, k_pages, v_pages, table, context, start)
    batch, tokens, heads, dim = q.shape
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == heads * dim and _alike(weight, q)):
        check_tensor("weight", weight, ["W", heads * dim], q.dtype, q.device)
    _expect("residual", residual, (batch, tokens, weight.shape[0]), q.dtype, q)
    args = q, k_pages, v_pages, table, context, start, weight, residual
    name = pick(backend, q.device, q.dtype, dim)
    if name == REFERENCE:
        return reference.attend_add(*args)
    return page_attend_add(*args, name) if is_plain(*args) else OPS.page_attend_add.default(*args, name)


def pick(backend: str | None, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Return the backend for heads of ``dim`` elements; by name, that one or an error.

    Raises:
        BackendError: a backend asked for by name that is not here, or whose kernels do not take such arguments.
    """
    return _pick(named(backend), device, dtype, dim)


# torch.compiler.assume_constant_result makes this mark too, but imports the compiler, which takes a second
pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _pick(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    name = linear.pick(backend, device, dtype, dim, native=True)
    if name != TRITON or (LEAST_DIM <= dim <= MOST_DIM and dim & (dim - 1) == 0):
        return name
    if backend == AUTO:
        return REFERENCE
    raise BackendError(
        f"backend: expected a head dimension that is a power of two in {LEAST_DIM}..{MOST_DIM} for {name!r}, got {dim}"
    )


def _theta(theta: object) -> float:
    return float(check_number("theta", theta, 0, MAX_FP32, open_low=True))


def _check_pages(k_pages: Tensor, v_pages: Tensor) -> None:
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not isinstance(pages, Tensor) or pages.dim() != 4 or pages.dtype not in FLOATS:
            check_tensor(name, pages, ["pages", "P", "G", "D"], FLOATS)
        if not pages.numel() or not pages.is_contiguous():
            how = "contiguous" if pages.numel() else "at least one"
            raise InputError(f"{name}: expected {how} pages, got {list(pages.shape)} of strides {pages.stride()}")
    _expect("v_pages", v_pages, tuple(k_pages.shape), k_pages.dtype, k_pages)


def _check_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, context: Tensor, start: Tensor
) -> None:
    _check_pages(k_pages, v_pages)
    kv_heads, dim = k_pages.shape[2:]
    if not (isinstance(q, Tensor) and q.dim() == 4 and q.shape[3] == dim and _alike(q, k_pages)):
        check_tensor("q", q, ["B", "N", "H", dim], k_pages.dtype, k_pages.device)
    if q.shape[2] < 1 or q.shape[2] % kv_heads:
        raise InputError(f"q: expected a multiple of {kv_heads} heads, got {q.shape[2]}")
    if not isinstance(table, Tensor) or table.dim() != 2:
        check_tensor("table", table, [q.shape[0], "T"], torch.int32, q.device)
    _expect("table", table, (q.shape[0], table.shape[1]), torch.int32, q)
    if not 0 < table.shape[1] * k_pages.shape[1] < 2**31:
        raise InputError(f"table: expected 1..{(2**31 - 1) // k_pages.shape[1]} entries, got {table.shape[1]}")
    _expect("context", context, (q.shape[0],), torch.int32, q)
    _expect("start", start, (q.shape[0],), torch.int32, q)


def _alike(tensor: Tensor, like: Tensor) -> bool:
    return tensor.dtype == like.dtype and tensor.device == like.device


def _expect(name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    good = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype == dtype
    if not good or tensor.device != like.device:
        check_tensor(name, tensor, list(shape), dtype, like.device)


def page_write(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    positions: Tensor,
    rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    theta: float,
    eps: float,
    backend: str,
) -> Tensor:
    """Launch the kernel of :func:`write_pages`; its arguments are checked."""
    args = qkv, q_norm, k_norm, positions, rows, k_pages, v_pages, theta, eps
    if backend == NATIVE:
        return native_decode.page_write(compiled(NATIVE), *args)
    return compiled(TRITON, "launch_paged").page_write(*args)


def page_attend(*args: Any) -> Tensor:
    """Launch the kernels of :func:`paged_attention`; its arguments, and the backend behind them, are checked."""
    *tensors, backend = args
    if backend == NATIVE:
        return native_decode.page_attend(compiled(NATIVE), *tensors)
    return compiled(TRITON, "launch_paged").page_attend(*tensors)


def page_attend_add(*args: Any) -> Tensor:
    """Launch the kernels of :func:`attend_add`; its arguments, and the backend behind them, are checked."""
    *tensors, backend = args
    if backend == NATIVE:
        return native_decode.page_attend_add(compiled(NATIVE), *tensors)
    return compiled(TRITON, "launch_paged").page_attend_add(*tensors)


def _fake_write(
    qkv: Tensor, q_norm: Any, k_norm: Any, positions: Any, rows: Any, k_pages: Tensor, *rest: Any
) -> Tensor:
    kv_heads, dim = k_pages.shape[2:]
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // dim - 2 * kv_heads, dim))


_SEEN = "Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor context, Tensor start"
define(
    "(Tensor qkv, Tensor q_norm, Tensor k_norm, Tensor positions, Tensor rows, Tensor(a!) k_pages, "
    "Tensor(b!) v_pages, float theta, float eps, str backend) -> Tensor",
    page_write,
    _fake_write,
)
define(f"({_SEEN}, str backend) -> Tensor", page_attend, lambda q, *rest: q.new_empty(q.shape))
define(
    f"({_SEEN}, Tensor weight, Tensor residual, str backend) -> Tensor",
    page_attend_add,
    lambda *a: a[7].new_empty(a[7].shape),
)
