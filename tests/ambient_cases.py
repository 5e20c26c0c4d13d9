"""What torch may be set to around a call, and one small call of every op and of every public entry."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexlam_fast import ops

Call = tuple[Callable[..., Any], tuple[Tensor, ...]]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


#: Settings of torch under which a call gives what it gives without them.
STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype fp64": lambda: _default_dtype(torch.float64),
    "default dtype bf16": lambda: _default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic": _deterministic,
}


class _Ops:
    """The ops, asked for one backend; attention by torch or by our reference has another word for it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        op = getattr(ops, name)
        if name in ("attention", "varlen_attention"):
            return functools.partial(op, implementation=self.backend)
        return functools.partial(op, backend=self.backend)


def op_calls(dtype: torch.dtype = torch.float32, backend: str = "auto") -> dict[str, Call]:
    """One call of every op: a function of the tensors that may be traced or transformed, and those tensors."""
    call, draw = _Ops(backend), torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    def below(high: int, *shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, high, shape, generator=draw).to(kind)

    levels, keep, null = (8, 5, 5, 5), torch.tensor([0, 3]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    seed, streams = torch.tensor([5, 3]), torch.tensor([1, 9])
    frames, later = (below(256, 2, 16, 16, 3, kind=torch.uint8) for _ in range(2))
    noise, tau = torch.randn(2, 768, generator=draw), torch.tensor([0.3, 0.8])
    pages, table = [floats(4, 4, 1, 16) for _ in range(2)], torch.tensor([[0, 1, 2], [3, 1, 2]], dtype=torch.int32)
    context, start = torch.tensor([2, 1], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    rows = torch.tensor([[8], [4]])
    translator = ops.pack_translator(
        {
            f"{part}.{end}": floats(*((out, inner) if end == "weight" and inner else (out,)))
            for part, out, inner in (
                ("stem", 32, 19),
                ("blocks.0.norm", 32, 0),
                ("blocks.0.down", 16, 32),
                ("blocks.0.up", 32, 16),
                ("norm", 32, 0),
                ("head", 3, 32),
            )
            for end in ("weight", "bias")
        }
    )
    code_block, previous = below(1000, 2, 4, kind=torch.int32), torch.randn(2, 3, generator=draw)
    x, y, w, wide = floats(2, 6, 32), floats(2, 6, 32), floats(32), floats(64, 32)
    row = floats(2, 1, 32)
    head = floats(2, 6, 2, 16)
    cos, sin = torch.randn(6, 16, generator=draw), torch.randn(6, 16, generator=draw)
    logits, target = floats(12, 10), below(10, 12)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    words = torch.randn(2, 10, generator=draw)
    embedding = floats(10, 32)
    return {
        "fsq": (lambda z: call.fsq(z, levels, keep, null), (floats(2, 4, 4),)),
        "fsq_project": (
            lambda a, b, c: call.fsq_project(a, b, c, levels, keep, null),
            (x[:, :4], floats(4, 32), floats(4)),
        ),
        "fsq_sample": (lambda z: call.fsq_sample(z, levels, null, seed), (floats(2, 4, 4),)),
        "codes_to_latents": (lambda c: call.codes_to_latents(c, levels, keep, null), (code_block,)),
        "norm_linear": (lambda a, b: call.norm_linear(a, w, b, 1e-6), (row, wide)),
        "norm_linear many": (lambda a, b: call.norm_linear(a, w, b, 1e-6, fp32_out=True), (floats(2, 16, 32), wide)),
        "norm_swiglu": (lambda a, b: call.norm_swiglu(a, w, b, 1e-6), (row, wide)),
        "norm_swiglu many": (lambda a, b: call.norm_swiglu(a, w, b, 1e-6), (floats(2, 16, 32), wide)),
        "linear_add": (lambda a, b: call.linear_add(a, wide[:32], b), (row, floats(2, 1, 32))),
        "write_pages": (
            lambda a: (
                call.write_pages(
                    a, w[:16], w[16:], rows, rows, k := pages[0].clone(), v := pages[1].clone(), theta=1e4, eps=1e-6
                ),
                k,
                v,
            ),
            (floats(2, 1, 64),),
        ),
        "paged_attention": (
            lambda a: call.paged_attention(a, *pages, table, context, start),
            (floats(2, 1, 2, 16),),
        ),
        "attend_add": (
            lambda a, b: call.attend_add(a, *pages, table, context, start, wide[:, :32], b),
            (floats(2, 1, 2, 16), floats(2, 1, 64)),
        ),
        "choose_codes": (lambda a: call.choose_codes(a, 0.7, 3, seed, streams), (words,)),
        "next_token": (lambda a, b: call.next_token(a, b, w, 0.0), (words, embedding)),
        "translate": (
            lambda c, p: call.translate(c, 3, levels, null, p, translator, slots=4),
            (code_block, previous),
        ),
        "attention": (lambda q: call.attention(q, head, head, causal=True), (floats(2, 6, 2, 16),)),
        "self_attention": (lambda q: call.self_attention(q, head, head, causal=True), (floats(2, 6, 2, 16),)),
        "self_attention odd": (
            lambda q: call.self_attention(q, head[..., :5], head[..., :5]),
            (floats(2, 6, 2, 5),),
        ),
        "self_attention_packed": (lambda q: call.self_attention_packed(q), (floats(2, 6, 3, 2, 16),)),
        "varlen_attention": (
            lambda q: call.varlen_attention(q, head[0], head[1], starts, 4),
            (floats(6, 2, 16),),
        ),
        "cross_entropy": (lambda a: call.cross_entropy(a, target), (logits,)),
        "flow_loss": (
            lambda a: call.flow_loss(a, frames, later, noise, tau, predict="frame"),
            (floats(2, 4, 192),),
        ),
        "flow_patches": (lambda f, n: call.flow_patches(f, later, n, tau, 8), (frames, noise)),
        "frame_patches": (lambda f: call.frame_patches(f, 8), (frames,)),
        "tubelets": (lambda f, g: call.tubelets(f, g, 8, 4.0), (frames, later)),
        "adaln": (lambda a, s: call.adaln(a, s, s * 0.5), (x, floats(2, 32))),
        "layer_norm": (lambda a: call.layer_norm(a, w, w), (x,)),
        "rms_norm": (lambda a: call.rms_norm(a, w, 1e-6), (x,)),
        "gate_add": (lambda a, b: call.gate_add(a, b, a[:, 0]), (x, y)),
        "gelu": (lambda a: call.gelu(a), (x,)),
        "swiglu": (lambda a, b: call.swiglu(a, b), (x, y)),
        "qk_norm_rope": (lambda q: call.qk_norm_rope(q, head, w[:16], w[16:], cos, sin, 1e-6), (floats(2, 6, 2, 16),)),
        "linear_bf16": (lambda a: call.linear_bf16(a, wide.float(), None), (x,)),
        "draw_normal": (lambda s: call.draw_normal(seed, s, 5), (streams,)),
        "draw_uniform": (lambda s: call.draw_uniform(seed, s), (streams,)),
    }


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]
