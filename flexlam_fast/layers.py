"""Modules and tensor rearrangements that several stages share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON, choose, probe
from flexlam_fast.checks import check_finite, check_tensor
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import linear_train
from flexlam_fast.ops.activation import gelu
from flexlam_fast.ops.attention import attention
from flexlam_fast.ops.patches import patches_of, pixels_of
from flexlam_fast.ops.self_attention import self_attention, self_attention_packed

M = TypeVar("M", bound=nn.Module)


def normalise(frames: Tensor) -> Tensor:
    """uint8 frames ``[..., H, W, C]`` to fp32 pixels ``[..., C, H, W]`` in ``[-1, 1]`` (``uint8 / 127.5 - 1``)."""
    return pixels_of(frames)


def to_uint8(pixels: Tensor) -> Tensor:
    """fp32 pixels ``[..., C, H, W]`` to uint8 frames ``[..., H, W, C]``; the inverse of :func:`normalise`."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def as_pixels(name: str, frames: Tensor, size: int, channels: int) -> Tensor:
    """Accept frames as uint8 ``[B, H, W, C]`` or as fp32 pixels ``[B, C, H, W]``; return the latter.

    Raises:
        InputError: another shape or dtype, or pixels that are not finite.
    """
    if isinstance(frames, Tensor) and frames.is_floating_point():
        check_tensor(name, frames, ["B", channels, size, size], (torch.float32, torch.bfloat16, torch.float16))
        check_finite(name, frames)
        return frames
    try:
        check_tensor(name, frames, ["B", size, size, channels], torch.uint8)
    except InputError as error:
        hint = f" (or [B,{channels},{size},{size}] float pixels in [-1,1])"
        raise InputError(str(error).replace(" uint8,", f" uint8{hint},")) from None
    return normalise(frames)


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """``[B, C, H, W]`` to patches ``[B, H/p * W/p, C * p * p]``, row by row."""
    return patches_of(pixels, patch)


def unpatchify(patches: Tensor, patch: int, channels: int, size: int) -> Tensor:
    """``[B, N, C * p * p]`` to ``[B, C, size, size]``; the inverse of :func:`patchify`."""
    side = size // patch
    x = patches.reshape(patches.shape[0], side, side, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], channels, size, size)


def sincos_grid(side: int, width: int) -> Tensor:
    """Sine-cosine embedding ``[side * side, width]`` of a square grid, half the channels for each axis."""
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    grid = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)
    return F.pad(grid, (0, width - grid.shape[1])).float()


def grid_angles(side: int, others: int, dim: int) -> Tensor:
    """Angles fp32 ``[side * side + others, dim / 2]`` of rotary position embeddings (RoPE) on a square grid.

    Half of the pairs of a head are rotated by the row, half by the column: the fastest by pi/2 from one patch to the
    next, the slowest by pi/4 over the grid. Tokens that are no patch, ``others`` at the end, are not rotated.
    """
    pairs = dim // 4
    span = torch.arange(pairs, dtype=torch.float64) / max(1, pairs - 1)
    frequency = math.pi / 2 * (1 / (2 * side)) ** span
    line = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    grid = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)
    return F.pad(grid, (0, dim // 2 - grid.shape[1], 0, others)).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (channel ``i``, channel ``i + D/2``) of ``x [B, N, H, D]`` by ``angles [N, D/2]``, in fp32."""
    cos, sin = (t.unsqueeze(1) for t in (angles.cos(), angles.sin()))
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over ``[B, heads, N, D]``, scaled by ``1 / sqrt(D)``.

    On a CPU in bf16 the backward of torch's fused attention is slow on short rows (80 tokens: 38 ms fused, 6 ms as two
    matrix products, on two cores), so training takes the products there.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] <= 256:
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Linear(nn.Linear):
    """A linear layer; in training by C++ under bf16 autocast, with gradients of weight and bias in fp32.

    That path is differentiable once.
    """

    backend = REFERENCE

    def __getstate__(self) -> dict[str, Any]:
        """Of a weight that is a part of a larger matrix, as ``sequence.layers.pack`` leaves it, a copy has no rest."""
        state, weight = {**super().__getstate__()}, self.weight
        if weight.untyped_storage().nbytes() > weight.numel() * weight.element_size():
            own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            state["_parameters"] = {**self._parameters, "weight": own}
        return state

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        if self.backend == NATIVE and self._trains_in_bf16() and linear_train.takes(x.device, *self.weight.shape):
            return linear_train.linear_bf16(x, self.weight, self.bias, backend=NATIVE)
        return super().forward(x)

    def _trains_in_bf16(self) -> bool:
        weight = self.weight
        wants = torch.is_grad_enabled() and weight.requires_grad and product_dtype(weight) == torch.bfloat16
        return wants and {p.dtype for p in self.parameters(recurse=False)} == {torch.float32}


class Attention(nn.Module):
    """Full multi-head self-attention with one fused query-key-value projection.

    ``implementation`` is None while training, where ``backend`` says how, else a name that ``ops.attention`` knows.
    ``angles`` fp32 ``[N, head_dim / 2]``, where given, rotate queries and keys by position (:func:`grid_angles`).
    """

    backend = REFERENCE
    angles: Tensor | None

    def __init__(self, width: int, heads: int, head_dim: int, angles: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self._angles = angles  # in fp32 on the host, whatever becomes of the weights
        self.register_buffer("angles", angles, persistent=False)
        self.implementation: str | None = None
        self.qkv = Linear(width, 3 * heads * head_dim)
        self.out = Linear(heads * head_dim, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module, but angles follow the device alone: half precision is a pixel wrong across a frame."""
        super()._apply(fn, recurse)
        if self.angles is not None and self._angles is not None:
            self.angles = self._angles.to(self.angles.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, W]`` to ``[B, N, W]``."""
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, -1)
        q, k, v = qkv.unbind(2)
        if self.angles is not None:
            q, k = rotate(q, self.angles), rotate(k, self.angles)
        if self.implementation is not None:
            y = attention(q, k, v, implementation=self.implementation)
        elif self.backend == REFERENCE:
            y = attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        else:
            y = self_attention_packed(qkv) if self.angles is None else self_attention(q, k, v)
        out: Tensor = self.out(y.reshape(b, n, -1))
        return out


class MLP(nn.Module):
    """Two linears with a GELU between them."""

    backend = REFERENCE

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., W]`` to ``[..., W]``."""
        out: Tensor = self.down(gelu(self.up(x), backend=self.backend))
        return out


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer makes of ``x``: the dtype of autocast where that is on, else ``x``'s own."""
    kind = x.device.type
    narrowed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if narrowed else x.dtype


def time_features(time: Tensor, width: int) -> Tensor:
    """Sinusoidal features ``[B, width]`` of flow times ``[B]`` in ``[0, 1]``."""
    half = width // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angle = 1000.0 * time.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def training_backend(name: str, device: torch.device) -> str:
    """The backend of the ops of training that ``name`` means: C++ has them for a CPU, Triton for a GPU.

    Raises:
        BackendError: there is no such backend, or it was asked for by name and cannot run there.
    """
    if device.type != "cuda" or name not in (AUTO, NATIVE):
        return choose(name, device).name
    if name == NATIVE:
        raise BackendError(f"backend: expected 'auto', 'triton' or 'reference' for layers on cuda, got {name!r}")
    return TRITON if any(s.name == TRITON and s.available for s in probe(device)) else REFERENCE


def set_backend(model: M, name: str, device: torch.device) -> M:
    """Have the ops of ``model``'s layers run by what :func:`training_backend` says of ``name``, and return the model.

    Args:
        model: whose modules with an attribute ``backend`` are told.
        name: of a backend, or ``"auto"``.
        device: where the model is.

    Raises:
        BackendError: a backend that cannot run there.
    """
    chosen = training_backend(name, device)
    for module in model.modules():
        if hasattr(module, "backend"):
            setattr(module, "backend", chosen)  # noqa: B010  # to a type checker it is a tensor or a module
    return model


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer, as ViT and DiT do."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
