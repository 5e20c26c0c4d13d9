"""Dense attention: every implementation against fp64, how one is chosen, and how the packages are called."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

op = importlib.import_module("flexlam_fast.ops.attention")  # the package has a function of that name

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(2, 3, 7, 6, 2, 16), (1, 4, 4, 3, 3, 8), (1, 1, 5, 2, 1, 16)]
HERE_NOW = ["reference", "sdpa", "triton"]
pytest.importorskip("triton")


def tensors(batch: int, queries: int, keys: int, heads: int, groups: int, dim: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return [2 * q, k, v]


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The two matrix products and the softmax as one writes them in PyTorch, in the dtype of the tensors."""
    share, later = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1] + 1
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)))
    scores = torch.matmul(q, k.mT) / q.shape[3] ** 0.5
    if causal:
        scores += torch.full_like(scores, -torch.inf).triu(later)
    return torch.matmul(scores.softmax(-1), v).transpose(1, 2)


def query_by_query(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The definition, in a loop: no mask, but only the keys that a query may see."""
    out, (_, queries, heads, dim), (_, keys, groups, _) = torch.empty_like(q), q.shape, k.shape
    for i in range(queries):
        end = keys - queries + i + 1 if causal else keys
        for h in range(heads):
            g = h // (heads // groups)
            scores = torch.einsum("bd,bmd->bm", q[:, i, h], k[:, :end, g]) * dim**-0.5
            out[:, i, h] = torch.einsum("bm,bmd->bd", scores.softmax(-1), v[:, :end, g])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_the_measure_is_the_definition(sizes: tuple[int, ...], causal: bool) -> None:
    exact = [t.double() for t in tensors(*sizes)]
    expected = query_by_query(*exact, causal)
    assert torch.allclose(plain(*exact, causal), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(op._reference(*exact, causal), expected, rtol=1e-12, atol=1e-12)


def check(name: str, dtype: torch.dtype, causal: bool, args: list[Tensor]) -> None:
    rounded = [t.to(dtype) for t in args]
    out = op.attention(*rounded, causal=causal, implementation=name)
    assert out.dtype == dtype
    assert_within_budget(out, plain, *rounded, causal, working_dtype=dtype, name=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 16), (2, 3, 70, 4, 2, 32), (1, 20, 20, 2, 2, 64), (1, 70, 131, 3, 1, 16), (1, 33, 64, 2, 1, 128)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HERE_NOW)
def test_within_the_error_budget(name: str, dtype: torch.dtype, sizes: tuple[int, ...], causal: bool) -> None:
    check(name, dtype, causal, tensors(*sizes))


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(2, 128, 200, 4, 2, 64), (1, 1, 70, 3, 3, 64), (1, 64, 64, 3, 3, 128)], ids=str)
@pytest.mark.gpu
def test_packages_within_the_error_budget(name: str, sizes: tuple[int, ...], causal: bool) -> None:
    pytest.importorskip(name)
    for dtype in DTYPES[1:]:
        check(name, dtype, causal, tensors(*sizes))


@settings(max_examples=25)
@given(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 60), st.integers(1, 2), st.integers(1, 3)),
    st.booleans(),
    st.lists(st.sampled_from(["plain", "fused", "transposed", "every other"]), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
)
def test_any_sizes_and_layouts(sizes: tuple[int, ...], causal: bool, layouts: list[str], dtype: torch.dtype) -> None:
    batch, queries, more, groups, share = sizes
    q, k, v = tensors(batch, queries, queries + max(more, 1), groups * share, groups, 16, seed=more)
    q, k, v = (laid_out(t.to(dtype), layout) for t, layout in zip((q, k, v), layouts, strict=True))
    expected = op.attention(q.double(), k.double(), v.double(), causal=causal, implementation="reference")
    for name in HERE_NOW:
        out = op.attention(q, k, v, causal=causal, implementation=name)
        assert out.shape == q.shape
        # here only the plumbing; a wrong mask or stride is off by tenths
        assert torch.allclose(out.double(), expected, rtol=0, atol=0.04), name


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "fused":  # a part of one projection's output
        return torch.cat([t, t + 1, t + 2], dim=2)[:, :, : t.shape[2]]
    if layout == "transposed":  # heads outside
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.repeat_interleave(2, dim=-1)[..., ::2] if layout == "every other" else t


@pytest.mark.parametrize("name", HERE_NOW)
def test_later_keys_change_nothing_by_a_bit(name: str) -> None:
    q, k, v = tensors(1, 40, 50, 2, 2, 16)
    out = op.attention(q, k, v, causal=True, implementation=name)
    k[:, 31:], v[:, 31:] = 50.0, -50.0
    changed = op.attention(q, k, v, causal=True, implementation=name)
    assert torch.equal(changed[:, :21], out[:, :21])
    assert not torch.isclose(changed[:, 21:], out[:, 21:]).all(-1).any()


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_gradients(name: str) -> None:
    args = [t.requires_grad_() for t in tensors(1, 5, 9, 4, 2, 16)]
    grads = torch.autograd.grad(op.attention(*args, causal=True, implementation=name).square().sum(), args)

    def gradient(i: int, *args: Any) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in args]
        return torch.autograd.grad(plain(*leaves, True).square().sum(), leaves)[i]

    for i, grad in enumerate(grads):
        assert_within_budget(grad, gradient, i, *args, working_dtype=torch.float32, factor=GRADIENT_FACTOR)
    q, k, v = args  # and the kernel, which has none, says so
    with pytest.raises(BackendError, match="implementation: expected one with gradients, got 'triton'"):
        op.attention(q, k, v, implementation="triton")


def test_opcheck_and_one_graph_under_torch_compile() -> None:
    told = torch.library.opcheck(torch.ops.flexlam_fast.attend_dense.default, (*tensors(1, 5, 9, 4, 2, 16), True))
    assert set(told.values()) == {"SUCCESS"}, told
    for name in ("triton", "sdpa"):
        torch._dynamo.reset()
        compiled = torch.compile(op.attention, fullgraph=True, backend="aot_eager")
        args = tensors(1, 5, 9, 4, 2, 16)
        calls = [run(*args, causal=True, implementation=name) for run in (compiled, op.attention)]
        assert torch.allclose(*calls, atol=1e-6)


@pytest.mark.parametrize(
    ("q", "k", "v", "sentence"),
    [
        ((5, 4, 16), (1, 9, 4, 16), (1, 9, 4, 16), r"q: expected \[B,N,H,D\] float32 or .*, got \[5,4,16\]"),
        ((1, 5, 4, 16), (2, 9, 4, 16), (2, 9, 4, 16), r"k: expected \[1,M,G,16\] float32 .*, got \[2,9,4,16\]"),
        ((1, 5, 4, 16), (1, 9, 4, 16), (1, 8, 4, 16), r"v: expected \[1,9,4,16\] float32 .*, got \[1,8,4,16\]"),
        ((1, 5, 4, 16), (1, 9, 3, 16), (1, 9, 3, 16), r"k: .* a number of heads that divides 4, got \[1,9,3,16\]"),
        ((1, 5, 4, 16), (1, 0, 4, 16), (1, 0, 4, 16), r"k: expected at least one key .*, got \[1,0,4,16\]"),
        ((1, 5, 4, 16), (1, 4, 4, 16), (1, 4, 4, 16), r"k: expected at least the 5 queries.*, got \[1,4,4,16\]"),
    ],
)
def test_bad_input_gets_one_sentence(q: Any, k: Any, v: Any, sentence: str) -> None:
    args = [torch.zeros(shape, device=DEVICE) for shape in (q, k, v)]
    for name in (*HERE_NOW, "auto"):
        with pytest.raises(InputError, match=f"^{sentence}"):
            op.attention(*args, causal=True, implementation=name)
    half = torch.zeros(1, 5, 4, 16, dtype=torch.float16, device=DEVICE)
    with pytest.raises(InputError, match=r"^k: expected \[1,M,G,16\] float16 \w+, got \[1,5,4,16\] float32"):
        op.attention(half, half.float(), half)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                    causal: bool = False, window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
    """The package's documented signature and meaning: ``[B, S, H, D]``, mask aligned to the last key."""
    assert (dropout_p, softmax_scale) == (0.0, None)
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    return plain(q, k, v, causal)


class LowerTriangularFromBottomRightMask:
    """The package's mask by name."""


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
) -> Tensor:
    """The package's: ``[B, M, H, K]``, or ``[B, M, G, H, K]`` for grouped queries, all of one shape but for ``M``."""
    assert (p, scale) == (0.0, None)
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    assert attn_bias is None or type(attn_bias) is LowerTriangularFromBottomRightMask
    assert query.dim() == 4 or key.stride(3) == 0, "shared, not copied"
    flat = [t.reshape(*t.shape[:2], -1, t.shape[-1]) for t in (query, key, value)]
    return plain(*flat, attn_bias is not None).view(query.shape)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages as if installed, on a machine with a GPU."""
    mask = {"LowerTriangularFromBottomRightMask": LowerTriangularFromBottomRightMask}
    ops = {"memory_efficient_attention": memory_efficient_attention}
    parts = {"xformers": {}, "xformers.ops": ops, "xformers.ops.fmha.attn_bias": mask}
    for name, content in ({"flash_attn": {"flash_attn_func": flash_attn_func}} | parts).items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    load = op._module
    load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    load.cache_clear()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_packages_are_called_as_they_are_documented(name: str, sizes: tuple[int, ...], causal: bool) -> None:
    q, k, v = tensors(*sizes)
    strided = laid_out(q, "every other")
    assert torch.equal(op._RUN[name](strided, k, v, causal), plain(q, k, v, causal))


@pytest.mark.usefixtures("packages")
def test_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert op.choose_attention(CUDA, torch.bfloat16, 64) == (
        "flash_attn",
        "the fastest on cuda in bfloat16: the flash-attn package",
    )
    wide, full = op.choose_attention(CUDA, torch.bfloat16, 512), op.choose_attention(CUDA, torch.float32, 64)
    assert (wide.name, full.name) == ("sdpa", "sdpa")
    assert "without flash_attn: flash_attn takes head sizes up to 256, not 512" in wide.reason
    assert "flash_attn is for float16 and bfloat16 here, not for float32" in full.reason
    assert op.choose_attention(CUDA, torch.float16, 64, "xformers").name == "xformers"
    with pytest.raises(BackendError, match="'xformers': xformers takes head sizes up to 256, multiples of 8, not 20"):
        op.choose_attention(CUDA, torch.float16, 20, "xformers")
    told = op.available_attention(CUDA, torch.bfloat16, 64)
    assert [(s.name, s.available, bool(s.reason)) for s in told] == [(name, True, True) for name in op.IMPLEMENTATIONS]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "flash_attn needs sm_80 or later" in op.choose_attention(CUDA, torch.float16, 64).reason


@pytest.mark.usefixtures("packages")
def test_a_package_that_does_not_load_is_left_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError(f"{name}.so: undefined symbol:\n  _ZN3c10")

    monkeypatch.setattr(op, "_module", broken)
    sentence = "it is installed but does not load: flash_attn.so: undefined symbol: _ZN3c10"
    choice = op.choose_attention(CUDA, torch.bfloat16, 64)
    assert (choice.name, sentence in choice.reason) == ("sdpa", True)
    with pytest.raises(BackendError, match=f"expected one that runs here, got 'flash_attn': {sentence}"):
        op.choose_attention(CUDA, torch.bfloat16, 64, "flash_attn")


def test_the_choice_on_the_cpu_and_what_is_refused() -> None:
    assert {op.choose_attention("cpu", dtype, 64).name for dtype in (*DTYPES, torch.float64)} == {"sdpa"}
    for name in ("flash_attn", "xformers"):
        sentence = f"implementation: expected one that runs here, got '{name}': {name} (is not installed|needs a CUDA)"
        with pytest.raises(BackendError, match=sentence):
            op.choose_attention("cpu", torch.bfloat16, 64, name)
    with pytest.raises(BackendError, match="implementation: expected one of auto, flash_attn, .*, got 'fastest'"):
        op.choose_attention("cpu", torch.bfloat16, 64, "fastest")
    with pytest.raises(BackendError, match="'triton': it has code for head sizes 16, 32, 64, 128, not 48"):
        op.choose_attention(DEVICE, torch.bfloat16, 48, "triton")
    with pytest.raises(BackendError, match="'triton': it has code for float32, float16 and bfloat16, not for float64"):
        op.choose_attention(DEVICE, torch.float64, 64, "triton")


def test_compiled_code_keeps_to_registers_and_multiplies_on_tensor_cores() -> None:
    """For sm_90, in a process that does not interpret; fp16 has bf16's code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), "^attention/(?!.*fp16)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert len(compiled) == 12
    for name, facts in compiled.items():
        assert (facts["spilled"], facts["tanh"]) == (0, False), name
        assert facts["shared"] <= 227 * 1024, name
        assert (facts["wide_loads"], facts["wide_stores"]) == (facts["loads"], facts["stores"]), name
        assert "fp32" in name or facts["tensor_cores"] >= 8, name
