"""Attention of packed sequences against a dense mask built from the lengths, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from varlen_cases import DEVICE, LENGTHS, PACKAGES, dense, gradient, starts_of, tensors, visible

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import varlen
from flexlam_fast.ops.varlen import choose_varlen, varlen_attention
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [*LENGTHS, (40, 40, 33, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_within_the_error_budget(name: str, dtype: torch.dtype, lengths: tuple[int, ...], causal: bool) -> None:
    args = [t.to(dtype).requires_grad_() for t in tensors(sum(lengths), 6, 3, 32)]
    starts, seen = starts_of(lengths), visible(lengths, causal)
    out = varlen_attention(*args, starts, max(lengths), causal=causal, implementation=name)
    assert (out.dtype, out.shape) == (dtype, args[0].shape)
    assert_within_budget(out, dense, *args, seen, working_dtype=dtype, name=name)
    told = varlen_attention(*args, starts, 99, lengths=lengths, causal=causal, implementation=name)
    assert torch.equal(told, out)
    for i, grad in enumerate(torch.autograd.grad(out.square().sum(), args)):
        if sum(lengths) > 100:  # of fewer numbers the largest error says little
            assert_within_budget(grad, gradient, i, *args, seen, working_dtype=dtype, factor=GRADIENT_FACTOR)
        elif dtype == torch.float32:
            exact = gradient(i, *(t.detach().double() for t in args), seen)
            assert torch.allclose(grad.double(), exact, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.booleans(), st.booleans(), st.sampled_from(DTYPES))
def test_any_lengths_and_strides(lengths: list[int], causal: bool, strided: bool, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in tensors(sum(lengths), seed=len(lengths)))
    if strided:  # heads of one product side by side, and channels apart
        q, k, v = torch.cat([q, k, v], dim=1).repeat_interleave(2, dim=-1)[..., ::2].split([4, 2, 2], dim=1)
    seen = visible(tuple(lengths), causal).reshape(sum(lengths), sum(lengths))
    expected = dense(q.double(), k.double(), v.double(), seen)
    for name in ("sdpa", "reference", "auto"):
        out = varlen_attention(q, k, v, starts_of(tuple(lengths)), 6, causal=causal, implementation=name)
        assert torch.allclose(out.double(), expected, rtol=0, atol=0.04), name


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_other_sequences_and_later_tokens_change_nothing_by_a_bit(name: str) -> None:
    q, k, v = tensors(30)
    starts = starts_of((10, 12, 8))
    out = varlen_attention(q, k, v, starts, 12, implementation=name)
    k[18:], v[18:] = 50.0, -50.0  # the second sequence's last four, and the third
    changed = varlen_attention(q, k, v, starts, 12, implementation=name)
    assert torch.equal(changed[:18], out[:18])
    assert not torch.isclose(changed[18:], out[18:]).all(-1).any()


def test_equal_lengths_are_one_call_and_neighbours_share_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    run = varlen._RUN["sdpa"]
    monkeypatch.setitem(varlen._RUN, "sdpa", lambda *args: calls.append(tuple(args[0].shape[:2])) or run(*args))
    for lengths, expected in (((5, 5, 5), [(3, 5)]), ((5, 5, 0, 5, 3, 3, 4), [(3, 5), (2, 3), (1, 4)])):
        calls.clear()
        varlen_attention(*tensors(sum(lengths)), starts_of(lengths), 5, implementation="sdpa")
        assert calls == expected


def test_empty_and_what_is_refused() -> None:
    q, k, v = tensors(0)
    for name in ("sdpa", "reference", "auto"):
        for lengths in ((), (0, 0)):
            assert varlen_attention(q, k, v, starts_of(lengths), 0, implementation=name).shape == (0, 4, 16)
    q, k, v = tensors(6)
    starts = starts_of((2, 4))
    calls: list[tuple[dict[str, Any], str]] = [
        (dict(q=q[None]), r"q: expected \[T,H,D\] float32 or .*, got \[1,6,4,16\] float32 \w+"),
        (dict(k=k[:5]), r"k: expected \[6,G,16\] float32 \w+, got \[5,2,16\] float32 \w+"),
        (dict(v=v.double()), r"v: expected \[6,2,16\] float32 \w+, got \[6,2,16\] float64 \w+"),
        (
            dict(k=k[:, [0, 1, 1]], v=v[:, [0, 1, 1]]),
            r"k: expected a number of heads that divides 4, got \[6,3,16\] .*",
        ),
        (dict(starts=starts.long()), r"starts: expected \[S\+1\] int32 \w+, got \[3\] int64 \w+"),
        (dict(starts=starts[:0]), r"starts: expected at least one number, got none"),
        (dict(starts=starts[:2], lengths=(2,)), r"lengths: expected sequences that make up 6 tokens, got list \[2\]"),
        (dict(lengths=(2, 3)), r"lengths: expected sequences that make up 6 tokens, got list \[2, 3\]"),
        (dict(lengths=(2, 5, -1)), r"lengths: expected an integer in 0..6, got -1"),
        (dict(lengths=(2, 4), longest=3), r"longest: expected at least 4, got 3"),
    ]
    if DEVICE == "cpu":  # where reading starts costs nothing
        calls += [
            (dict(starts=starts + 1), r"starts: expected sequences that make up 6 tokens, got list \[2, 4\]"),
            (dict(starts=starts_of((7, -1))), r"starts: expected sequences that make up 6 tokens, got list \[7, -1\]"),
            (dict(longest=3), r"longest: expected at least 4, got 3"),
        ]
    for changed, sentence in calls:
        for name in ("sdpa", "reference", "auto"):
            with pytest.raises(InputError, match=f"^{sentence}$"):
                varlen_attention(**{**dict(q=q, k=k, v=v, starts=starts, longest=4, implementation=name), **changed})


def test_the_choice_on_the_cpu() -> None:
    assert {choose_varlen("cpu", dtype, 64).name for dtype in (*DTYPES, torch.float64)} == {"sdpa"}
    for name in PACKAGES:
        sentence = f"implementation: expected one that runs here, got '{name}': {name} (is not installed|needs a CUDA)"
        with pytest.raises(BackendError, match=sentence):
            choose_varlen("cpu", torch.bfloat16, 64, name)
    names = "auto, flash_attn, torch_varlen, xformers, sdpa, reference"
    for name in ("triton", "fastest"):
        with pytest.raises(BackendError, match=f"^implementation: expected one of {names}, got '{name}'$"):
            choose_varlen("cpu", torch.bfloat16, 64, name)
