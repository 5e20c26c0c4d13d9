"""Random numbers of a training batch, made where they are used: standard normal noise and uniform words.

Everything is Philox4x32-10 (Salmon et al., 2011). Block ``b`` of a sample's noise is at counter ``(2^31 + b,
2^31 + step mod 2^31, stream mod 2^32, stream // 2^32)``, and its uniform word at ``b = 2^31 - 1``: a sample's numbers
depend on nothing but key, step and its stream, and never meet those of ``choose_codes`` (first word below 2^31) or of
``fsq_sample`` (second word below 2^31). All four words of a block are used, as two pairs of Box and Muller (1958):
``sqrt(-2 log u) * (cos, sin)(2 pi v)``. Logarithm, sine and cosine are short series rounded operation by operation and
the root is rounded exactly, so every backend returns the same bits.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON
from flexlam_fast.checks import check_tensor
from flexlam_fast.errors import InputError
from flexlam_fast.ops import native_frames, philox
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.differentiable import define_plain
from flexlam_fast.ops.linear import pick
from flexlam_fast.ops.sampling import _log

_HIGH = 1 << 31
_UNIFORM_BLOCK = _HIGH - 1  # the last block: no sample has that much noise
_TURN = 1.4629180792671596e-09  # 2 pi / 2^32, rounded to fp32 where it is used
#: (sin(x) / x - 1) / x^2 and (cos(x) - 1 + x^2 / 2) / x^4 from x^4 down, our own fits, 4e-9 off at most to pi / 4.
_SINE = (-0.0001951729936990887, 0.008332177996635437, -0.16666655242443085)
_COSINE = (2.4438451873720624e-05, -0.001388736767694354, 0.04166664555668831)
_MOST = 1 << 32  # numbers of a sample


@outside_autocast
def draw_normal(seed: Tensor, streams: Tensor, count: int, *, backend: str | None = AUTO) -> Tensor:
    """Return ``count`` standard normal numbers for each sample, at most 6.77 in size.

    Args:
        seed: int64 ``[2]``: a key, and a step. Both are read on the device, so a captured graph draws afresh when they
            have changed there.
        streams: int64 ``[B]`` on ``seed``'s device: which numbers each sample has, whatever batch it is in.
        count: numbers of a sample; with another ``count`` the first ones are the same.
        backend: ``"reference"``, ``"triton"`` or, on a CPU, ``"native"``; None or ``"auto"`` takes Triton on CUDA and
            C++ on a CPU.

    Returns:
        fp32 ``[B, count]``, no gradient; the same bits on every backend.

    Raises:
        InputError: wrong shape, dtype or device, or a count that is not in ``0..2^32``.
        BackendError: a backend asked for by name that cannot run here.
    """
    _check(seed, streams)
    whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not whole or not 0 <= count <= _MOST:
        raise InputError(f"count: expected an integer in 0..{_MOST}, got {count!r}")
    name = pick(backend, seed.device, torch.float32, 1, native=True)
    if name == REFERENCE:
        return normal_reference(seed, streams, int(count))
    return _normal(seed, streams, int(count), name)


@outside_autocast
def draw_uniform(seed: Tensor, streams: Tensor, *, words: bool = False, backend: str | None = AUTO) -> Tensor:
    """Return one uniform number for each sample.

    Args:
        seed: as in :func:`draw_normal`; with the same seed the number is independent of the sample's noise.
        streams: int64 ``[B]`` on ``seed``'s device.
        words: return the 32-bit words themselves, which ``philox.prefix_edges`` divides into retained lengths.
        backend: as in :func:`draw_normal`.

    Returns:
        fp32 ``[B]`` in ``[0, 1)``, multiples of 2^-24; with ``words`` int64 ``[B]`` in ``[0, 2^32)``.

    Raises:
        InputError: wrong shape, dtype or device.
        BackendError: a backend asked for by name that cannot run here.
    """
    _check(seed, streams)
    name = pick(backend, seed.device, torch.float32, 1, native=True)
    word = words_reference(seed, streams) if name == REFERENCE else _words(seed, streams, name)
    return word if words else (word >> 8).float() * 2.0**-24


@torch.no_grad()
def normal_reference(seed: Tensor, streams: Tensor, count: int) -> Tensor:
    """:func:`draw_normal` in plain PyTorch."""
    rows, blocks = streams.shape[0], -(-count // 4)
    block = torch.arange(blocks, dtype=torch.int64, device=seed.device).expand(rows, blocks)
    word = _block(seed, streams.unsqueeze(1).expand(rows, blocks), block)
    numbers = torch.stack([*_pair(word[0], word[1]), *_pair(word[2], word[3])], dim=-1)
    return numbers.flatten(1)[:, :count].contiguous()


@torch.no_grad()
def words_reference(seed: Tensor, streams: Tensor) -> Tensor:
    """Return one 32-bit word for each sample, int64 ``[B]``, in plain PyTorch."""
    return _block(seed, streams, torch.full_like(streams, _UNIFORM_BLOCK))[0]


def _block(seed: Tensor, stream: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of each block of each stream."""
    step = ((seed[1] & (_HIGH - 1)) + _HIGH).expand(block.shape)
    return philox.words(seed[0], block + _HIGH, step, stream & philox.MASK, (stream >> 32) & philox.MASK)


def _pair(word: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers from two 32-bit words: their radius is of the first, their angle of the second."""
    below, above = ((w.float() + 0.5) * 2.0**-32 for w in (word, philox.MASK - word))
    # torch's root of fp32 on a CPU is one unit off for 0.7% of numbers; that of fp64 always rounds to the right fp32
    radius = (_log(above, 0.0 - below) * -2.0).double().sqrt().float()
    quarter = (turn + (1 << 29)) >> 30
    x = (turn - (quarter << 30)).float() * _TURN
    square = x * x
    sine = (_SINE[0] * square + _SINE[1]) * square + _SINE[2]
    sine = sine * square * x + x
    cosine = (_COSINE[0] * square + _COSINE[1]) * square + _COSINE[2]
    cosine = cosine * square * square + (1.0 - 0.5 * square)
    across = (quarter & 1) == 1
    first, second = torch.where(across, sine, cosine), torch.where(across, cosine, sine)
    return radius * ((1 - ((quarter + 1) & 2)) * first), radius * ((1 - (quarter & 2)) * second)


def _check(seed: Tensor, streams: Tensor) -> None:
    check_tensor("seed", seed, [2], torch.int64)
    check_tensor("streams", streams, ["B"], torch.int64, seed.device)


def draw_noise(seed: Tensor, streams: Tensor, count: int, backend: str) -> Tensor:
    """Launch the kernel of normal numbers; its arguments are checked."""
    if backend == NATIVE:
        return native_frames.draw_noise(compiled(NATIVE), seed, streams, count)
    return compiled(TRITON, "launch_draws").draw_noise(seed, streams, count)


def draw_words(seed: Tensor, streams: Tensor, backend: str) -> Tensor:
    """Launch the kernel of uniform words; its arguments are checked."""
    if backend == NATIVE:
        return native_frames.draw_words(compiled(NATIVE), seed, streams)
    return compiled(TRITON, "launch_draws").draw_words(seed, streams)


def _fake_noise(seed: Tensor, streams: Tensor, count: int, backend: str) -> Tensor:
    return streams.new_empty((streams.shape[0], count), dtype=torch.float32)


def _fake_words(seed: Tensor, streams: Tensor, backend: str) -> Tensor:
    return streams.new_empty(streams.shape)


_normal = define_plain("(Tensor seed, Tensor streams, SymInt count, str backend) -> Tensor", draw_noise, _fake_noise)
_words = define_plain("(Tensor seed, Tensor streams, str backend) -> Tensor", draw_words, _fake_words)
