"""What each op of the compiled backends takes and returns: schemas, fakes, and lazy launchers.

The only file that names ``flexlam_fast.kernels`` or ``flexlam_fast._C``, and it imports them at the first launch.
The bottleneck's contracts are here; the decision's ops state theirs beside their checks, by :func:`define`.
Gradients, and which calls come here through ``torch.ops``, are in ``gradients.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.backend import NATIVE, TRITON
from flexlam_fast.ops import native

LIBRARY = torch.library.Library("flexlam_fast", "DEF")
_PREFIX = "Tensor? keep, Tensor? null, str backend"
_PROJECTION = "Tensor x, Tensor weight, Tensor? bias, int[] levels"
SCHEMAS = {
    "fsq": f"(Tensor z, int[] levels, {_PREFIX}) -> (Tensor, Tensor)",
    "fsq_backward": "(Tensor grad, Tensor z, int[] levels, Tensor? keep, bool with_null, str backend)"
    " -> (Tensor, Tensor)",
    "fsq_sample": "(Tensor z, int[] levels, Tensor null, Tensor seed, Tensor edges, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "fsq_project": f"({_PROJECTION}, {_PREFIX}) -> (Tensor, Tensor)",
    "fsq_project_backward": f"(Tensor grad, {_PROJECTION}, Tensor? keep, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "codes_to_latents": f"(Tensor codes, int[] levels, {_PREFIX}) -> Tensor",
}


@lru_cache(maxsize=16)
def compiled(backend: str, part: str = "launch") -> ModuleType:
    """Return the compiled code of ``backend``; ``flexlam_fast.backend`` has said that it is there.

    ``part`` is the file of Triton launchers that is wanted; the extension is one module.
    """
    home = {NATIVE: "flexlam_fast._C", TRITON: f"flexlam_fast.kernels.{part}"}[backend]
    return importlib.import_module(home)


def define(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``launcher`` as ``torch.ops.flexlam_fast.<its name>``, with what ``fake`` says about its results.

    Args:
        schema: arguments and results in torch's notation, without the name; ``Tensor(a!)`` marks what is written.
        launcher: takes checked arguments; its name is the op's.
        fake: same arguments; returns empty tensors of the right shapes and dtypes.
    """
    LIBRARY.define(launcher.__name__ + schema)
    LIBRARY.impl(launcher.__name__, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flexlam_fast::{launcher.__name__}", fake, lib=LIBRARY)


def fsq(
    z: Tensor, levels: Sequence[int], keep: Tensor | None, null: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Forward: latents and codes, without gradients."""
    if backend == NATIVE:
        return native.fsq(compiled(NATIVE), z, tuple(levels), keep, null)
    return compiled(TRITON).fsq(z, tuple(levels), keep, null)


def fsq_backward(
    grad: Tensor, z: Tensor, levels: Sequence[int], keep: Tensor | None, with_null: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Backward: gradient of ``z`` in its dtype and of the null in fp32 (zeros where ``with_null`` is false)."""
    if backend == NATIVE:
        return native.fsq_backward(compiled(NATIVE), grad, z, tuple(levels), keep, with_null)
    return compiled(TRITON).fsq_backward(grad, z, tuple(levels), keep, with_null)


def fsq_sample(
    z: Tensor, levels: Sequence[int], null: Tensor, seed: Tensor, edges: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward with lengths drawn on the device: latents, codes and the lengths."""
    if backend == NATIVE:
        keep = native.sample_prefix(compiled(NATIVE), seed, edges, z.shape[:-2].numel()).view(z.shape[:-2])
        return *native.fsq(compiled(NATIVE), z, tuple(levels), keep, null), keep
    return compiled(TRITON).fsq_sample(z, tuple(levels), null, seed, edges)


def fsq_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Sequence[int],
    keep: Tensor | None,
    null: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Forward from the encoder's width; Triton only, the other backends project with PyTorch."""
    return compiled(TRITON).fsq_project(x, weight, bias, tuple(levels), keep, null)


def fsq_project_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Sequence[int],
    keep: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward to x in its dtype, and to weight, bias and null in fp32."""
    return compiled(TRITON).fsq_project_backward(grad, x, weight, bias, tuple(levels), keep)


def codes_to_latents(
    codes: Tensor, levels: Sequence[int], keep: Tensor | None, null: Tensor | None, backend: str
) -> Tensor:
    """Codes to null-filled fp32 latents."""
    if backend == NATIVE:
        return native.codes_to_latents(compiled(NATIVE), codes, tuple(levels), keep, null)
    return compiled(TRITON).codes_to_latents(codes, tuple(levels), keep, null)


for _launcher in (fsq, fsq_backward, fsq_sample, fsq_project, fsq_project_backward, codes_to_latents):
    LIBRARY.define(_launcher.__name__ + SCHEMAS[_launcher.__name__])
    LIBRARY.impl(_launcher.__name__, _launcher, "CompositeExplicitAutograd")


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"flexlam_fast::{name}", lib=LIBRARY)


@_fake("fsq")
def _(z: Tensor, levels: Any, keep: Any, null: Any, backend: str) -> Any:
    return z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)


@_fake("fsq_backward")
def _(grad: Tensor, z: Tensor, levels: Any, keep: Any, with_null: bool, backend: str) -> Any:
    return z.new_empty(z.shape), z.new_empty(z.shape[-1:], dtype=torch.float32)


@_fake("fsq_sample")
def _(z: Tensor, levels: Any, null: Tensor, seed: Tensor, edges: Tensor, backend: str) -> Any:
    codes = z.new_empty(z.shape[:-1], dtype=torch.int32)
    return z.new_empty(z.shape), codes, z.new_empty(z.shape[:-2], dtype=torch.int32)


@_fake("fsq_project")
def _(x: Tensor, weight: Tensor, bias: Any, levels: Any, keep: Any, null: Any, backend: str) -> Any:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(x.shape[:-1], dtype=torch.int32)


@_fake("fsq_project_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Any, levels: Any, keep: Any, backend: str) -> Any:
    small = x.new_empty(weight.shape[:1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32), small, torch.empty_like(small)


@_fake("codes_to_latents")
def _(codes: Tensor, levels: Sequence[int], keep: Any, null: Any, backend: str) -> Any:
    return codes.new_empty((*codes.shape, len(levels)), dtype=torch.float32)
