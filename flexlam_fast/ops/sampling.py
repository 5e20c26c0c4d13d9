"""The choice of the next code from logits, greedy or drawn, and its embedding fed back on the device.

Drawing is Gumbel-max: the largest of ``logit / temperature - log(-log(u))`` has the odds of the softmax. The uniforms
are Philox4x32-10 at counter ``(code, 2^31 + step mod 2^31, stream mod 2^32, stream // 2^32)``: they depend on nothing
but the code, the row's stream and the step, and never meet those of ``fsq_sample``, whose second word is below 2^31.
Both logarithms are written out here in sums and products that are rounded one by one, so that every backend draws the
same codes, without exception.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, REFERENCE, TRITON
from flexlam_fast.checks import check_tensor
from flexlam_fast.errors import InputError
from flexlam_fast.ops import philox
from flexlam_fast.ops.arguments import FLOATS
from flexlam_fast.ops.contracts import compiled, define
from flexlam_fast.ops.gradients import OPS, is_plain
from flexlam_fast.ops.linear import pick

_LOGITS = (torch.float32, torch.float64)
_ROOT_HALF = 0x3F3504F3  # the bits of the root of a half in fp32
#: (log(1 + f) - f + f^2 / 2) / f^3 from f^7 down, a fit of our own with an error of 6e-9 of log(1 + f), |f| < 0.42.
_SERIES = (
    -0.07634586095809937,
    0.12761598825454712,
    -0.13160155713558197,
    0.14201752841472626,
    -0.1662335991859436,
    0.20001226663589478,
    -0.2500081956386566,
    0.3333333134651184,
)


@outside_autocast
def choose_codes(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    seed: Tensor | None = None,
    streams: Tensor | None = None,
    *,
    backend: str | None = AUTO,
) -> Tensor:
    """Choose one code a row: the most likely one at temperature 0, else a draw from ``softmax(logits / temperature)``.

    A row with a NaN gives the first NaN's code at any temperature, as ``torch.argmax`` does. A logit of minus infinity
    is never drawn unless the whole row is.

    Args:
        logits: ``[B, C]`` fp32 (fp64 on the reference).
        temperature: 0 or more; at 0 ties go to the lowest code, as in ``torch.argmax``.
        top_k: draw from the ``top_k`` largest logits, and from all that equal the last of them; None draws from all.
        seed: int64 ``[2]`` on ``logits``' device, needed above 0: a key, and the step, which is to grow with every
            draw of the same streams. Both are read on the device, so a captured graph draws afresh when they change.
        streams: int64 ``[B]`` on ``logits``' device, the rows' own counters (a session's number, say): a row's draw
            depends on its stream and not on its place. None: ``0..B-1``.
        backend: ``"reference"`` or ``"triton"``; None or ``"auto"`` takes Triton on CUDA.

    Returns:
        int32 ``[B]`` in ``[0, C)``; the same on every backend.

    Raises:
        InputError: wrong shape, dtype, device, temperature or top_k, or no seed above 0.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check(logits, temperature, top_k, seed, streams)
    name = pick(backend, logits.device, logits.dtype, 1)
    return _run(logits, None, None, temperature, top_k, seed, streams, name)[0]


@outside_autocast
def next_token(
    logits: Tensor,
    embedding: Tensor,
    place: Tensor | None,
    temperature: float,
    top_k: int | None = None,
    seed: Tensor | None = None,
    streams: Tensor | None = None,
    *,
    backend: str | None = AUTO,
) -> tuple[Tensor, Tensor]:
    """:func:`choose_codes`, and what the chosen codes feed to the next pass, in the same launch.

    Args:
        logits: as in :func:`choose_codes`.
        embedding: ``[C, W]`` floating, one row a code.
        place: ``[W]`` in ``embedding``'s dtype, added to every row; or None.
        temperature: as in :func:`choose_codes`.
        top_k: as in :func:`choose_codes`.
        seed: as in :func:`choose_codes`.
        streams: as in :func:`choose_codes`.
        backend: as in :func:`choose_codes`.

    Returns:
        codes int32 ``[B]``, and ``embedding[codes] + place`` ``[B, W]`` in ``embedding``'s dtype, without gradient.

    Raises:
        InputError: wrong shape, dtype, device, temperature or top_k, or no seed above 0.
        BackendError: a backend asked for by name that cannot run here or does not take such arguments.
    """
    _check(logits, temperature, top_k, seed, streams)
    dtype = embedding.dtype if isinstance(embedding, Tensor) and embedding.dtype in FLOATS else FLOATS
    check_tensor("embedding", embedding, [logits.shape[1], "W"], dtype, logits.device)
    if place is not None:
        check_tensor("place", place, [embedding.shape[1]], dtype, logits.device)
    # of two floating arguments the one that kernels do not take, if any
    name = pick(backend, logits.device, torch.promote_types(logits.dtype, embedding.dtype), 1)
    return _run(logits, embedding, place, temperature, top_k, seed, streams, name)


@torch.no_grad()
def reference(
    logits: Tensor,
    embedding: Tensor | None,
    place: Tensor | None,
    inverse: float,
    top_k: int,
    seed: Tensor | None,
    streams: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both ops in plain PyTorch; arguments are those of the op ``draw_codes``."""
    codes = logits.argmax(-1)
    if inverse > 0 and seed is not None and logits.numel():
        codes = draw(logits, inverse, top_k, gumbel(seed, streams, *logits.shape))
    if embedding is None:
        return codes.to(torch.int32), logits.new_empty(logits.shape[0], 0)
    x = embedding[codes]
    return codes.to(torch.int32), x if place is None else x + place


def draw(logits: Tensor, inverse: float, top_k: int, noise: Tensor) -> Tensor:
    """Draw one code a row, int64 ``[B]``, in plain PyTorch.

    Args:
        logits: ``[B, C]``, not empty.
        inverse: :func:`reciprocal` of the temperature.
        top_k: as in :func:`choose_codes`; 0: all.
        noise: fp32 ``[B, C]`` from :func:`gumbel`.
    """
    logits = logits.float()
    codes = logits.argmax(-1)
    top = logits.gather(1, codes.unsqueeze(1))
    scaled = torch.where(logits == top, torch.zeros_like(logits), (logits - top) * inverse)
    noisy = scaled + noise
    if 0 < top_k < logits.shape[1]:
        floor = logits.topk(top_k).values[:, -1:]
        noisy = noisy.masked_fill(logits < floor, -math.inf)
    return torch.where(top.isnan().squeeze(1), codes, noisy.argmax(-1))


def reciprocal(temperature: float) -> float:
    """Return ``1 / temperature`` within the normal numbers of fp32; 0 for 0, which is greedy."""
    if temperature <= 0:
        return 0.0
    return min(max(1.0 / temperature, 2.0**-126), 2.0**127) if temperature >= 2.0**-126 else 2.0**127


def gumbel(seed: Tensor, streams: Tensor | None, rows: int, codes: int) -> Tensor:
    """Return the noise fp32 ``[rows, codes]`` that every backend adds to ``logits / temperature``.

    Args:
        seed: int64 ``[2]``: key and step.
        streams: int64 ``[rows]``; None: ``0..rows-1``.
        rows: how many rows.
        codes: how many codes.
    """
    arange = torch.arange(max(rows, codes), dtype=torch.int64, device=seed.device)
    stream = (arange[:rows] if streams is None else streams).unsqueeze(1).expand(rows, codes)
    step = ((seed[1] & 0x7FFFFFFF) + 0x80000000).expand(rows, codes)
    word = philox.first_word(
        seed[0], arange[:codes].expand(rows, codes), step, stream & philox.MASK, (stream >> 32) & philox.MASK
    )
    below, above = ((w.float() + 0.5) * 2.0**-32 for w in (word, philox.MASK - word))
    waited = 0.0 - _log(above, 0.0 - below)
    return 0.0 - _log(waited)


def _log(x: Tensor, near: Tensor | None = None) -> Tensor:
    """Logarithm of normal positive fp32 ``x`` to 2e-7 of it; ``near`` is ``x - 1`` in more digits, where ``x <= 1``."""
    if torch._C._is_tracing():  # which knows no view of another dtype
        raise InputError("torch.jit.trace: expected no numbers to be drawn in plain PyTorch within it, got a draw")
    bits = x.view(torch.int32)
    exponent = (bits - _ROOT_HALF) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    if near is not None:
        f = torch.where(exponent == 0, near, f)
    square, y = f * f, torch.full_like(f, _SERIES[0])
    for c in _SERIES[1:]:
        y = y * f + c
    y = f + (y * f * square - 0.5 * square)
    return y + exponent.float() * 0.6931471824645996


def _check(logits: Tensor, temperature: float, top_k: int | None, seed: Tensor | None, streams: Tensor | None) -> None:
    check_tensor("logits", logits, ["B", "C"], _LOGITS)
    if not 0 < logits.shape[1] < 2**31:
        raise InputError(f"logits: expected at least one code a row, got {list(logits.shape)}")
    real = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not real or not 0 <= temperature < math.inf:
        raise InputError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1):
        raise InputError(f"top_k: expected None or an integer of at least 1, got {top_k!r}")
    if seed is not None:
        check_tensor("seed", seed, [2], torch.int64, logits.device)
    elif temperature > 0:
        raise InputError("seed: expected int64 [2] with a temperature above 0, got None")
    if streams is not None:
        check_tensor("streams", streams, [logits.shape[0]], torch.int64, logits.device)


def _run(
    logits: Tensor,
    embedding: Tensor | None,
    place: Tensor | None,
    temperature: float,
    top_k: int | None,
    seed: Tensor | None,
    streams: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Hand the call on."""
    inverse = reciprocal(temperature)
    args = (logits, embedding, place, inverse, min(int(top_k or 0), logits.shape[1]), seed, streams)
    if name == REFERENCE:
        return reference(*args)
    if is_plain(logits, embedding, place, seed, streams):
        return draw_codes(*args)
    return OPS.draw_codes.default(*args)


def draw_codes(
    logits: Tensor,
    embedding: Tensor | None,
    place: Tensor | None,
    inverse: float,
    top_k: int,
    seed: Tensor | None,
    streams: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the Triton kernel of both ops; their arguments are checked."""
    return compiled(TRITON, "launch_sampling").draw_codes(logits, embedding, place, inverse, top_k, seed, streams)


def _fake(
    logits: Tensor, embedding: Any, place: Any, inverse: float, top_k: int, seed: Any, streams: Any
) -> tuple[Tensor, Tensor]:
    rows, like = logits.shape[0], logits if embedding is None else embedding
    codes = logits.new_empty(rows, dtype=torch.int32)
    return codes, like.new_empty(rows, 0 if embedding is None else embedding.shape[1])


define(
    "(Tensor logits, Tensor? embedding, Tensor? place, float inverse, int top_k, Tensor? seed, Tensor? streams)"
    " -> (Tensor, Tensor)",
    draw_codes,
    _fake,
)
