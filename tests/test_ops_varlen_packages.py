"""How packages are called for packed sequences, by stand-ins with their signatures, and which is chosen."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from varlen_cases import LENGTHS, PACKAGES, dense, gradient, starts_of, tensors, visible

from flexlam_fast.ops import varlen
from flexlam_fast.ops.attention import _module
from flexlam_fast.ops.varlen import VARLEN_IMPLEMENTATIONS, choose_varlen, varlen_attention
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

CUDA = torch.device("cuda")


def packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> Tensor:
    return dense(q, k, v, visible(tuple(starts.diff().tolist()), causal))


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                           max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                           softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
                           deterministic: bool = False) -> Tensor:  # fmt: skip
    """The package's documented signature and meaning: ``[T, H, D]``, int32 cumulative lengths."""
    assert (dropout_p, softmax_scale, deterministic) == (0.0, None, torch.are_deterministic_algorithms_enabled())
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return packed(q, k, v, cu_seqlens_q, causal)


def varlen_attn(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
                *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Torch's of 2.13, what of it is used."""
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size in ((-1, 0), (-1, -1))
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    assert cu_seq_q is cu_seq_k
    return packed(query, key, value, cu_seq_q, window_size == (-1, 0))


def first_varlen_attn(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
                      max_k: int, is_causal: bool = False) -> Tensor:  # fmt: skip
    """Torch's of 2.10: no shared key heads."""
    assert query.shape == key.shape == value.shape
    return packed(query, key, value, cu_seq_q, is_causal)


class BlockDiagonalMask:
    """The package's, by name: made of a list of lengths."""

    causal = False

    @classmethod
    def from_seqlens(cls, q_seqlen: Any, kv_seqlen: Any = None, *, device: Any = None) -> BlockDiagonalMask:
        assert isinstance(q_seqlen, list)
        assert all(type(n) is int and n > 0 for n in q_seqlen)
        mask = cls()
        mask.lengths, mask.device = tuple(q_seqlen), device
        return mask


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Its causal sister."""

    causal = True


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
    """The package's: one row ``[1, T, H, K]``, or ``[1, T, G, H, K]`` for grouped queries, all of one shape."""
    assert query.shape == key.shape == value.shape
    assert query.shape[0] == 1
    assert query.dim() == 4 or key.stride(3) == 0, "shared, not copied"
    assert attn_bias.device == query.device
    flat = [t.reshape(t.shape[1], -1, t.shape[-1]) for t in (query, key, value)]
    return dense(*flat, visible(attn_bias.lengths, attn_bias.causal)).view(query.shape)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them as if installed, on a machine with a GPU."""
    masks = {c.__name__: c for c in (BlockDiagonalMask, BlockDiagonalCausalMask)}
    parts: dict[str, dict[str, Any]] = {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "torch.nn.attention.varlen": {"varlen_attn": varlen_attn},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha.attn_bias": masks,
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    _module.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    _module.cache_clear()


def call(name: str, args: list[Tensor], lengths: tuple[int, ...], causal: bool, told: bool) -> Tensor:
    where = varlen.Sequences(starts_of(lengths), max(lengths), lengths if told else None)
    return varlen._PACKED[name](*args, where, causal)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_called_as_they_are_documented(name: str, lengths: tuple[int, ...], causal: bool) -> None:
    for groups in (2, 4):
        args = tensors(sum(lengths), 4, groups)
        expected = dense(*args, visible(lengths, causal))
        apart = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in args]
        for told in (True, False):
            out = call(name, apart, lengths, causal, told)
            assert out.shape == args[0].shape
            assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.usefixtures("packages")
def test_the_first_versions_of_torchs_and_deterministic_flash_attention() -> None:
    args = tensors(9)
    sys.modules["torch.nn.attention.varlen"].varlen_attn = first_varlen_attn  # type: ignore[attr-defined]
    for causal in (True, False):
        out = call("torch_varlen", args, (4, 5), causal, True)
        assert torch.allclose(out, dense(*args, visible((4, 5), causal)), atol=1e-6)
    torch.use_deterministic_algorithms(True)
    try:
        call("flash_attn", args, (4, 5), True, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("packages")
def test_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_varlen(CUDA, torch.bfloat16, 64) == (
        "flash_attn",
        "the fastest on cuda in bfloat16: the flash-attn package",
    )
    monkeypatch.delitem(sys.modules, "flash_attn")
    choice = choose_varlen(CUDA, torch.bfloat16, 64)
    assert choice.name == "torch_varlen"
    assert (
        "torch's own attention of packed sequences (without flash_attn: flash_attn is not installed)" in choice.reason
    )
    monkeypatch.setattr(importlib.util, "find_spec", _without("torch.nn.attention.varlen"))
    choice = choose_varlen(CUDA, torch.bfloat16, 64)
    assert choice.name == "xformers"
    assert "torch_varlen: this torch has no torch.nn.attention.varlen" in choice.reason
    full = choose_varlen(CUDA, torch.float32, 64)
    assert full.name == "sdpa"
    assert "xformers is for float16 and bfloat16 here, not for float32" in full.reason
    assert {choose_varlen(CUDA, torch.float16, 64, n).name for n in ("sdpa", "reference")} == {"sdpa", "reference"}
    assert VARLEN_IMPLEMENTATIONS[:3] == ("flash_attn", "torch_varlen", "xformers")


def _without(missing: str) -> Any:
    find = importlib.util.find_spec
    return lambda name, package=None: None if name in (missing, "flash_attn") else find(name, package)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_within_the_error_budget(name: str) -> None:
    if name != "torch_varlen":
        pytest.importorskip(name)
    lengths = (200, 64, 64, 1, 130)
    for dtype in (torch.bfloat16, torch.float16):
        args = [t.to(dtype).requires_grad_() for t in tensors(sum(lengths), 4, 2, 64)]
        out = varlen_attention(*args, starts_of(lengths), 200, lengths=lengths, implementation=name)
        seen = visible(lengths, True)
        assert_within_budget(out, dense, *args, seen, working_dtype=dtype)
        for i, grad in enumerate(torch.autograd.grad(out.square().sum(), args)):
            assert_within_budget(grad, gradient, i, *args, seen, working_dtype=dtype, factor=GRADIENT_FACTOR)
