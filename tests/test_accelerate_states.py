"""What is accelerated in every state that torch can be in: the original's result, by whoever has to compute it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_cases import L, assert_same, through_ops
from qwen_cases import GREEDY, note_ways, prompt_of, qwen
from state_cases import LEFT, RUN, deterministic
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from flexlam_fast.accelerate import accelerate
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ

STATES = {**RUN, **{name: state for name, (state, _) in LEFT.items()}}
FSQS: dict[str, dict[str, Any]] = {
    "plain": dict(levels=L),
    "projections": dict(levels=L, dim=6),
    "nothing forced": dict(levels=L, force_quantization_f32=False),
}
Z = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def pair(**options: Any) -> tuple[FSQ, FSQ, Any]:
    """An FSQ as it is and one that was accelerated, with its record."""
    torch.manual_seed(0)
    theirs = FSQ(**options).eval()
    ours = copy.deepcopy(theirs)
    return theirs, ours, accelerate(ours)


@pytest.mark.parametrize("case", FSQS)
@pytest.mark.parametrize("state", STATES)
def test_an_fsq_gives_the_originals_result(state: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, record = pair(**FSQS[case])
    z = Z[..., : theirs.dim].clone()
    calls = through_ops(monkeypatch)
    with STATES[state]():
        assert_same(ours(z), theirs(z))
        paused = record.paused()
    assert len(calls) == (state in RUN), "whoever should have computed it did"
    assert (paused == {}) == (state in RUN)
    if state in LEFT:
        assert LEFT[state][1] in paused[""]
        assert f"paused   the FSQ itself  FSQ: {paused['']}" not in str(record), "that is over"
        assert f"earlier  the FSQ itself  FSQ: a call went to the original: {paused['']}" in str(record)


@pytest.mark.parametrize("state", STATES)
def test_a_bottleneck_gives_the_reference_s_result(state: str) -> None:
    theirs = Bottleneck(BottleneckConfig(levels=tuple(L), slots=5), "reference")
    ours = copy.deepcopy(theirs)
    assert len(accelerate(ours).swapped) == 1
    keep, z = torch.tensor([1, 5, 0]), Z[..., :4].clone()
    with STATES[state]():
        for mine, original in zip(ours(z, keep), theirs(z, keep), strict=True):
            assert (mine.dtype, mine.is_inference()) == (original.dtype, original.is_inference())
            assert torch.equal(mine, original)


def dual(module: nn.Module, z: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(module(forward_ad.make_dual(z, z + 1))[0]))


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda m, z: torch.func.vmap(lambda t: tuple(m(t[None])))(z),
    "grad": lambda m, z: torch.func.grad(lambda t: m(t)[0].square().sum())(z),
    "jvp": lambda m, z: torch.func.jvp(lambda t: m(t)[0], (z,), (z + 1,)),
    "forward AD": dual,
    "functional_call": lambda m, z: torch.func.functional_call(m, {k: 2 * p for k, p in m.named_parameters()}, (z,))[0],
}
RECORDERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": lambda m, z: torch.jit.trace(m, z, check_trace=False),
    "trace of more": lambda m, z: torch.jit.trace(nn.Sequential(nn.Identity(), m), z, check_trace=False),
    "make_fx": lambda m, z: make_fx(m)(z),
    "export": lambda m, z: torch.export.export(m, (z,), strict=False).module(),
}


def assert_close(got: Any, expected: Any) -> None:
    got, expected = (out if isinstance(out, tuple) else (out,) for out in (got, expected))
    for mine, original in zip(got, expected, strict=True):
        assert mine.dtype == original.dtype
        assert torch.allclose(mine, original, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["FSQ", "Bottleneck"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_the_original(name: str, kind: str) -> None:
    if kind == "FSQ":
        theirs, ours, _ = pair(levels=L, dim=6)
        z = Z
    else:
        theirs = Bottleneck(BottleneckConfig(levels=tuple(L), slots=5), "reference")
        ours, z = copy.deepcopy(theirs), Z[..., :4]
        accelerate(ours)
    assert_close(TRANSFORMS[name](ours, z), TRANSFORMS[name](theirs, z))


@pytest.mark.parametrize("case", ["plain", "projections"])
@pytest.mark.parametrize("name", RECORDERS)
def test_what_records_a_call_records_the_original(name: str, case: str) -> None:
    theirs, ours, _ = pair(**FSQS[case])
    z = Z[..., : theirs.dim].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the original's own, of a shape that becomes a constant
        recorded = RECORDERS[name](ours, z)
    other = z + 0.5
    with deterministic():  # which fills memory that nobody has written to
        assert_close(tuple(recorded(other)), theirs(other))
    if name == "export":
        assert "flexlam" not in str(recorded.graph), "so that it loads where this package is not"


class Sub(torch.Tensor):
    """A tensor of somebody's own."""


@pytest.mark.parametrize(
    "make", [lambda z: z.as_subclass(Sub), lambda z: z.to(torch.complex64)], ids=["sub", "complex"]
)
def test_other_tensors_are_the_originals(make: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, record = pair(levels=L)
    calls = through_ops(monkeypatch)
    z = make(Z[..., :4])
    got, expected = ours(z), theirs(z)
    assert [type(t) for t in got] == [type(t) for t in expected]
    assert_same(got, expected)
    assert calls == []
    assert "its input is no plain tensor" in str(record)


@pytest.mark.parametrize("state", [*STATES, "autocast float16"])
def test_a_qwen3_gives_the_originals_tokens(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(2, 20)
    hf = copy.deepcopy(theirs)
    record = accelerate(hf)
    ends = theirs.generate(prompt, **GREEDY)[:, 23].tolist()
    ways = note_ways(monkeypatch)
    context = STATES.get(state, lambda: torch.autocast("cpu", torch.float16))
    with context():
        for options in ({}, dict(eos_token_id=ends)):
            got = hf.generate(prompt, **GREEDY, **options)
            expected = theirs.generate(prompt, **GREEDY, **options)
            assert torch.equal(got, expected)
            assert got.is_inference() == expected.is_inference()
        paused = record.paused()
    left = state in ("function mode", "dispatch mode", "flop counter", "autocast", "autocast float16")
    assert len(ways) == (0 if left else 2)
    assert (paused != {}) == left


def outcome(call: Callable[[Any], Any], hf: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        try:
            return call(hf)
        except RuntimeError as error:
            return str(error)[:60]


@pytest.mark.parametrize("name", ["vmap", "trace"])
def test_a_qwen3_under_a_transform_or_a_tracer_does_what_the_original_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(2, 5)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    ways = note_ways(monkeypatch)
    calls: dict[str, Callable[[Any], Any]] = {
        "vmap": lambda m: torch.func.vmap(lambda ids: m.generate(ids[None], **GREEDY))(prompt),
        "trace": lambda m: torch.jit.trace(lambda ids: m.generate(ids, **GREEDY), prompt, check_trace=False)(prompt),
    }
    got, expected = outcome(calls[name], hf), outcome(calls[name], theirs)
    assert got == expected if isinstance(expected, str) else torch.equal(got, expected)
    assert ways == []
