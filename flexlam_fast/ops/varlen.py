"""Attention of packed sequences behind one function: rows of any lengths one after another, and nothing is padded.

Which implementation runs is chosen as for dense attention (``ops/attention.py``), by the same names and sentences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, REFERENCE, named
from flexlam_fast.checks import check_list, check_number, check_tensor, describe
from flexlam_fast.errors import InputError
from flexlam_fast.ops.arguments import FLOATS, is_readable
from flexlam_fast.ops.attention import (
    _RUN,
    FLASH_ATTN,
    SDPA,
    TORCH_VARLEN,
    XFORMERS,
    AttentionChoice,
    _module,
    choose_among,
)

VARLEN_IMPLEMENTATIONS = (FLASH_ATTN, TORCH_VARLEN, XFORMERS, SDPA, REFERENCE)


class Sequences(NamedTuple):
    """Where sequences stand: starts int32 ``[S + 1]`` where the tokens are, the longest, lengths if the host knows."""

    starts: Tensor
    longest: int
    lengths: tuple[int, ...] | None

    def on_host(self) -> tuple[int, ...]:
        """The lengths without empty sequences; unless they were handed in, this waits for the device."""
        lengths = self.lengths
        if lengths is None:
            lengths = tuple(end - start for start, end in pairwise(self.starts.tolist()))
        return tuple(length for length in lengths if length)


@outside_autocast
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    *,
    lengths: Sequence[int] | None = None,
    causal: bool = True,
    implementation: str = AUTO,
) -> Tensor:
    """Attend within each of the sequences that stand one after another, and to nothing else.

    Args:
        q: ``[T, H, D]`` floating, the tokens of all sequences.
        k: ``[T, G, D]`` of the same dtype; ``G`` divides ``H``, and ``H / G`` neighbouring heads share a key head.
        v: as ``k``.
        starts: int32 ``[S + 1]``, where each sequence starts, and ``T``; a sequence may be empty.
        longest: the length of the longest sequence, or more.
        lengths: the sequences' lengths, for ``"sdpa"``, ``"xformers"`` and ``"reference"``, which need them on the
            host; None reads ``starts``, which on a GPU waits for the device and cannot be captured in a graph.
        causal: a token sees itself and those before it; else all of its sequence.
        implementation: a name from :func:`choose_varlen`, called once at construction; ``"auto"`` chooses here.

    Returns:
        ``[T, H, D]`` in ``q``'s dtype. All implementations have gradients; those of flash-attn have the same bits in
        every run under ``torch.use_deterministic_algorithms``.

    Raises:
        InputError: wrong shapes, dtypes or devices, or starts and lengths that do not fit the tokens.
        BackendError: an implementation asked for by name that cannot run here.
    """
    _check(q, k, v, starts, longest, lengths)
    name = _pick(named(implementation), q.device, q.dtype, q.shape[-1])
    if not q.numel():
        return torch.empty_like(q)
    return _PACKED[name](q, k, v, Sequences(starts, longest, None if lengths is None else tuple(lengths)), causal)


def choose_varlen(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, implementation: str = AUTO
) -> AttentionChoice:
    """Choose an implementation for packed sequences, once, at construction of what trains.

    ``auto`` takes for half precision on a GPU what is there of flash-attn, torch's own and xformers, in this order, and
    torch's SDPA, one call for neighbours of one length, everywhere else. Arguments and errors are those of
    :func:`flexlam_fast.ops.attention.choose_attention`.
    """
    fastest = (FLASH_ATTN, TORCH_VARLEN, XFORMERS, SDPA)
    return choose_among(VARLEN_IMPLEMENTATIONS, fastest, torch.device(device), dtype, head_dim, implementation)


def _by_length(q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool, name: str) -> Tensor:
    """Dense attention ``name``, one call for each run of neighbours of one length."""
    runs = [(length, len(list(same))) for length, same in groupby(where.on_host())]
    sizes = [length * count for length, count in runs]
    parts = [
        [part.unflatten(0, (-1, length)) for part, (length, _) in zip(t.split(sizes), runs, strict=True)]
        for t in (q, k, v)
    ]
    out = [_RUN[name](q, k, v, causal).flatten(0, 1) for q, k, v in zip(*parts, strict=True)]
    return out[0] if len(out) == 1 else torch.cat(out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool) -> Tensor:
    return _by_length(q, k, v, where, causal, SDPA)


def _reference(q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool) -> Tensor:
    return _by_length(q, k, v, where, causal, REFERENCE)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool) -> Tensor:
    """``flash_attn_varlen_func`` takes our layout and shares key heads as we do."""
    q, k, v = _side_by_side(q, k, v)
    ends = where.starts, where.starts, where.longest, where.longest
    fixed = torch.are_deterministic_algorithms_enabled()
    return _module("flash_attn").flash_attn_varlen_func(q, k, v, *ends, causal=causal, deterministic=fixed)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool) -> Tensor:
    """Torch's ``varlen_attn``; 2.10 said causal by a flag, and its first versions do not share key heads."""
    run = _module("torch.nn.attention.varlen").varlen_attn
    known, grouped = _parameters(run), q.shape[1] != k.shape[1]
    windows = {"window_size": (-1, 0 if causal else -1)}
    how: dict[str, Any] = windows if "window_size" in known else {"is_causal": causal}
    if grouped and "enable_gqa" in known:
        how["enable_gqa"] = True
    elif grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    q, k, v = _side_by_side(q, k, v)
    return run(q, k, v, where.starts, where.starts, where.longest, where.longest, **how)


def _xformers(q: Tensor, k: Tensor, v: Tensor, where: Sequences, causal: bool) -> Tensor:
    """``memory_efficient_attention`` of one row ``[1, T, ...]`` with a mask of blocks along the diagonal."""
    masks = _module("xformers.ops.fmha.attn_bias")
    mask = masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask
    bias = mask.from_seqlens(list(where.on_host()), device=q.device)
    shape, share = q.shape, q.shape[1] // k.shape[1]
    q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    if share > 1:  # shared key heads are its fifth dimension, expanded
        q = q.unflatten(2, (k.shape[2], share))
        k, v = (t.unsqueeze(3).expand(-1, -1, -1, share, -1) for t in (k, v))
    return _module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=bias).reshape(shape)


_PACKED: dict[str, Callable[[Tensor, Tensor, Tensor, Sequences, bool], Tensor]] = {
    FLASH_ATTN: _flash_attn,
    TORCH_VARLEN: _torch_varlen,
    XFORMERS: _xformers,
    SDPA: _sdpa,
    REFERENCE: _reference,
}


@lru_cache(maxsize=8)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """Channels next to each other, which the packages ask for."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _pick(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return _known_pick(implementation, device, dtype, head_dim)


# an implementation is no part of a traced graph; see arguments.pick
_pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _known_pick(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return choose_varlen(device, dtype, head_dim, implementation).name


def _check(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, lengths: Sequence[int] | None) -> None:
    check_tensor("q", q, ["T", "H", "D"], FLOATS)
    tokens, heads, dim = q.shape
    check_tensor("k", k, [tokens, "G", dim], q.dtype, q.device)
    check_tensor("v", v, list(k.shape), q.dtype, q.device)
    if not k.shape[1] or not dim or heads % k.shape[1]:
        raise InputError(f"k: expected a number of heads that divides {heads}, got {describe(k)}")
    check_tensor("starts", starts, ["S+1"], torch.int32, q.device)
    check_number("longest", longest, 0, 2**31 - 1, integer=True)
    if not starts.numel():
        raise InputError("starts: expected at least one number, got none")
    if lengths is None and not is_readable(starts):
        return
    told = starts.diff().tolist() if lengths is None else _whole("lengths", lengths, tokens)
    ends = not is_readable(starts) or (int(starts[0]), int(starts[-1])) == (0, tokens)
    if len(told) != starts.numel() - 1 or sum(told) != tokens or not ends or (told and min(told) < 0):
        what = "starts" if lengths is None else "lengths"
        raise InputError(f"{what}: expected sequences that make up {tokens} tokens, got {describe(list(told))}")
    if told and max(told) > longest:
        raise InputError(f"longest: expected at least {max(told)}, got {longest}")


def _whole(name: str, values: Sequence[int], most: int) -> list[int]:
    given = check_list(name, values, f"integers in 0..{most}")
    return [int(check_number(name, value, 0, most, integer=True)) for value in given]
