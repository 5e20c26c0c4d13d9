"""Ops of training: a launcher, what is kept for its gradient, and the gradient, said once for every way of calling.

A plain call with gradients is a ``torch.autograd.Function``; under ``torch.compile``, fake tensors, functorch or a
dispatch mode it goes through ``torch.ops.flexlam_fast``. Both take the same three functions. The ops are differentiable
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexlam_fast.ops.contracts import LIBRARY, define
from flexlam_fast.ops.gradients import OPS, is_plain, wants_gradient


def define_plain(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op without a gradient, such as the backward of another; return what calls it.

    Args:
        schema: as :func:`flexlam_fast.ops.contracts.define`.
        launcher: takes checked arguments.
        fake: same arguments; returns empty tensors of the right shapes and dtypes.
    """
    define(schema, launcher, fake)
    op = getattr(OPS, launcher.__name__).default

    def call(*args: Any) -> Any:
        return launcher(*args) if is_plain(*_tensors(args)) else op(*args)

    return call


def define_differentiable(
    schema: str,
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register an op with its gradient; return what calls it.

    Args:
        schema: as :func:`flexlam_fast.ops.contracts.define`.
        launcher: takes checked arguments, and returns what the caller wants and what the gradient needs.
        fake: same arguments; returns empty tensors of the right shapes and dtypes.
        setup: ``(ctx, inputs, output)``: saves tensors for backward and marks outputs that have no gradient.
        backward: ``(ctx, *grads)``: a gradient or None for each argument, by ops of :func:`define_plain`.
    """
    define(schema, launcher, fake)
    name = launcher.__name__
    torch.library.register_autograd(f"flexlam_fast::{name}", backward, setup_context=setup, lib=LIBRARY)
    op = getattr(OPS, name).default

    def forward(ctx: Any, *args: Any) -> Any:
        # one function instead of forward and setup_context: with two, torch inspects signatures in every call (0.1 ms)
        output = launcher(*args)
        setup(ctx, args, output)
        return output

    members = dict(forward=staticmethod(forward), backward=staticmethod(once_differentiable(backward)))
    function = type(f"_{name}", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        tensors = _tensors(args)
        if not is_plain(*tensors):
            return op(*args)
        return function.apply(*args) if wants_gradient(*tensors) else launcher(*args)  # type: ignore[attr-defined]

    return call


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]
