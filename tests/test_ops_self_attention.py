"""Training's attention: every instruction set against the reference, torch's own as oracle, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from native_cases import needs_extension
from self_attention_cases import BF16, CASES, DTYPES, MODULE, Case, check, draw, every_way, force, has_tiles, run
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.errors import BackendError, InputError

TINY, SEQUENCE = CASES[0], CASES[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
@every_way
def test_result_and_gradients_are_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype, case: Case
) -> None:
    force(monkeypatch, variant)
    drawn = draw(case, dtype)
    check(case, drawn, run(case, drawn))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_torchs_own_in_fp64(case: Case) -> None:
    drawn = draw(case, torch.float64)
    seen = MODULE._seen(case.queries, case.keys, drawn.mask, case.causal, torch.device("cpu"))
    leaves = [t.clone().requires_grad_() for t in drawn[:3]]
    q, k, v = (t.transpose(1, 2) for t in leaves)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=case.scale, enable_gqa=True).transpose(1, 2)
    theirs = out, *torch.autograd.grad(out, leaves, drawn.grad)
    for backend in ("reference", "auto"):  # which is the reference too, for fp64
        for mine, other in zip(run(case, drawn, backend), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    fused = MODULE._fused(*drawn[:3], drawn.mask, case.causal, case.scale or case.dim**-0.5)
    torch.testing.assert_close(fused, theirs[0])


def test_gradcheck_of_the_reference() -> None:
    case = Case(2, 5, 6, 4, 2, 3, causal=True, hidden=0.4, scale=0.7)
    drawn = draw(case, torch.float64)
    drawn.mask[2] = False  # sees nothing
    leaves = [t.requires_grad_() for t in drawn[:3]]
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        assert torch.autograd.gradcheck(lambda *qkv: MODULE.reference(*qkv, drawn.mask, True, 0.7), leaves)


@every_way
def test_what_sees_nothing_gives_zeros_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype
) -> None:
    """A query alone, a whole block of queries, a key that nobody sees, and whole blocks of keys."""
    force(monkeypatch, variant)
    case = Case(1, 70, 90, 2, 1, 32, hidden=0.5)
    drawn = draw(case, dtype)
    drawn.mask[3] = False
    drawn.mask[16:50] = False
    drawn.mask[:, 7] = False
    drawn.mask[:, 32:64] = False
    results = run(case, drawn)
    for result in results[:2]:
        assert not result[:, 3].any()
        assert not result[:, 16:50].any()
        assert bool(result[:, :3].any())
    for result in results[2:]:
        assert not result[:, 7].any()
        assert not result[:, 32:64].any()
        assert bool(result[:, :7].any())
    check(case, drawn, results)


@every_way
def test_scores_of_any_size_and_one_key_far_ahead(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype
) -> None:
    force(monkeypatch, variant)
    for scale in (1e-3, 4.0, 50.0):
        case = TINY._replace(batch=1, scale=scale, hidden=0.2)
        drawn = draw(case, dtype)
        check(case, drawn, run(case, drawn))


@every_way
def test_a_single_key_has_all_the_weight(monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype) -> None:
    """The gradients of queries and keys are 0 then; what is left is rounding, in fp32 whatever the dtype."""
    force(monkeypatch, variant)
    drawn = draw(case := Case(2, 3, 1, 4, 2, 80), dtype)
    out, dq, dk, dv = run(case, drawn)
    assert torch.equal(out, drawn.v.repeat_interleave(2, 2).expand_as(out))
    assert float(dq.abs().max()) < 1e-5
    assert float(dk.abs().max()) < 1e-5
    exact = drawn.grad.double().unflatten(2, (2, 2)).sum((1, 3)).unsqueeze(1)
    torch.testing.assert_close(dv, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@every_way
def test_a_key_of_nan_reaches_only_those_that_see_it(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype
) -> None:
    force(monkeypatch, variant)
    drawn = draw(Case(1, 40, 40, 2, 2, 16), dtype)
    drawn.k[0, 20, 0] = math.nan
    out = MODULE.self_attention(*drawn[:3], causal=True, backend="native")
    assert not out[0, :20].isnan().any()
    assert bool(out[0, 20:, 0].isnan().all())
    assert not out[0, :, 1].isnan().any()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [TINY, Case(1, 21, 21, 2, 2, 16, causal=True, hidden=0.3)], ids=str)
def test_packed_and_separate_have_the_same_bits_and_strides_do_not_matter(case: Case, dtype: torch.dtype) -> None:
    drawn = draw(case, dtype)
    expected = run(case, drawn)
    qkv = torch.stack(drawn[:3], 2).requires_grad_()
    out = ops.self_attention_packed(qkv, mask=drawn.mask, causal=case.causal, backend="native")
    (grad,) = torch.autograd.grad(out, qkv, drawn.grad)
    assert grad.is_contiguous()
    for one, other in zip((out, *grad.unbind(2)), expected, strict=True):
        assert torch.equal(one, other)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in drawn[:2]]  # [B, H, N, D] in memory
    views.append(drawn.v.transpose(1, 3).contiguous().transpose(1, 3))  # D is no neighbour: a copy
    wide = torch.stack([drawn.grad, drawn.grad], -1)[..., 0]
    other = run(case, drawn._replace(q=views[0], k=views[1], v=views[2], grad=wide))
    assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.usefixtures("threads")
@every_way
def test_the_number_of_threads_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype
) -> None:
    force(monkeypatch, variant)
    case = SEQUENCE._replace(batch=5, heads=4, groups=2)
    drawn, results = draw(case, dtype), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, drawn))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = run(case, draw(case, dtype)._replace(**{n: getattr(drawn, n)[3:4] for n in ("q", "k", "v", "grad")}))
    assert all(torch.equal(a[0], b[3]) for a, b in zip(alone, results[0], strict=True))


@needs_extension
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 0, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    q, k = torch.zeros(batch, queries, 2, 16).requires_grad_(), torch.ones(batch, keys, 2, 16).requires_grad_()
    if not keys:
        with pytest.raises(InputError, match=r"^k: expected at least one key"):
            ops.self_attention(q, k, k)
        return
    out = ops.self_attention(q, k, k, backend="native")
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), [q, k])
    assert [g.shape for g in grads] == [q.shape, k.shape]
    assert not grads[1].any()


@needs_extension
def test_functorch_sees_the_reference() -> None:
    q, k, v = (t.detach() for t in draw(Case(1, 9, 9, 2, 2, 16))[:3])

    def total(q: Tensor, backend: str = "auto") -> Tensor:
        return MODULE.self_attention(q, k, v, backend=backend).square().sum()

    (theirs,) = torch.autograd.grad(total(leaf := q.clone().requires_grad_(), "reference"), leaf)
    assert torch.equal(torch.func.grad(total)(q), theirs)


@needs_extension
def test_opcheck_and_the_compiler() -> None:
    drawn = draw(Case(1, 9, 9, 2, 2, 16, hidden=0.3), BF16)
    q, k, v = (t.requires_grad_() for t in drawn[:3])
    library = torch.ops.flexlam_fast
    torch.library.opcheck(library.attend_self.default, (q, k, v, drawn.mask, False, 0.25))
    qkv = torch.stack([t.detach() for t in (q, k, v)], 2).requires_grad_()
    torch.library.opcheck(library.attend_packed.default, (qkv, None, True, 0.25))
    out, lse = library.attend_self(q, k, v, drawn.mask, False, 0.25)
    rest = drawn.mask, out.detach(), lse, False, 0.25
    plain = [t.detach() for t in (drawn.grad, q, k, v)]
    torch.library.opcheck(library.attend_self_backward.default, (*plain, *rest))
    torch.library.opcheck(library.attend_packed_backward.default, (plain[0], qkv.detach(), *rest))
    exact = (torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 0.25).masked_fill(~drawn.mask, -math.inf)
    torch.testing.assert_close(lse.double(), exact.logsumexp(-1), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(lambda x: ops.self_attention_packed(x, causal=True), backend="eager", fullgraph=True)
    results = [(f(qkv), *torch.autograd.grad(f(qkv), qkv, drawn.grad)) for f in (compiled, compiled.__wrapped__)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_extension
def test_autocast_changes_no_dtype() -> None:
    drawn = draw(TINY)
    plain = MODULE.self_attention(*drawn[:3], backend="native")
    with torch.autocast("cpu", BF16):
        assert torch.equal(MODULE.self_attention(*drawn[:3], backend="native"), plain)
        rounded = MODULE.self_attention(*drawn[:3], backend="reference")
    torch.testing.assert_close(rounded, plain, rtol=5e-2, atol=5e-2)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


X = ones(2, 5, 4, 16)
WRONG = [
    (lambda: ops.self_attention(X[0], X, X), InputError, r"^q: expected \[B,N,H,D\] .*, got \[5,4,16\] float32 cpu$"),
    (
        lambda: ops.self_attention(X, X.half(), X),
        InputError,
        r"^k: expected \[2,M,G,16\] float32 cpu, got \[2,5,4,16\] f",
    ),
    (
        lambda: ops.self_attention(X, X, X[:, :3]),
        InputError,
        r"^v: expected \[2,5,4,16\] float32 cpu, got \[2,3,4,16\]",
    ),
    (lambda: ops.self_attention(X, X[:, :, :3], X[:, :, :3]), InputError, r"^k: .* heads that divides 4, got \[2,5,3"),
    (
        lambda: ops.self_attention(X, X, X, mask=ones(5, 5)),
        InputError,
        r"^mask: expected \[5,5\] bool cpu, got \[5,5\] f",
    ),
    (
        lambda: ops.self_attention(X, X, X, mask=X[0, 0] > 0),
        InputError,
        r"^mask: expected \[5,5\] bool cpu, got \[4,16\]",
    ),
    (
        lambda: ops.self_attention(X, X[:, :4], X[:, :4], causal=True),
        InputError,
        r"^k: expected at least the 5 .*got 4$",
    ),
    (
        lambda: ops.self_attention(X, X, X, scale=0.0),
        InputError,
        r"^scale: expected a number above 0, at most 3\.40282e\+38, got 0\.0$",
    ),
    (
        lambda: ops.self_attention(X, X, X, scale=math.nan),
        InputError,
        r"^scale: expected a number above 0, at most 3\.40282e\+38, got",
    ),
    (
        lambda: ops.self_attention_packed(X),
        InputError,
        r"^qkv: expected \[B,N,3,H,D\] .*, got \[2,5,4,16\] float32 cpu$",
    ),
    (lambda: ops.self_attention_packed(ones(2, 0, 3, 1, 16)), InputError, r"^qkv: expected at least one token"),
    (
        lambda: ops.self_attention(X, X, X, backend="triton"),
        BackendError,
        r"^backend: expected 'auto' or 'reference' or 'native' for this op",
    ),
    (lambda: ops.self_attention(X, X, X, backend="fast"), BackendError, r"^backend: expected one of auto, reference"),
]


@pytest.mark.parametrize(("call", "kind", "sentence"), WRONG, ids=[s for *_, s in WRONG])
def test_one_sentence_says_what_is_wrong(call: Callable[[], object], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@needs_extension
def test_what_the_kernels_do_not_take_is_refused_by_name_and_left_to_the_reference_by_auto() -> None:
    for x in (ones(1, 3, 2, 20), ones(1, 3, 2, 144), ones(1, 3, 2, 16, dtype=torch.float64)):
        sentence = (
            r"^backend: expected float32, float16 or bfloat16 and a head of whole 16s up to 128 for 'native', got"
        )
        with pytest.raises(BackendError, match=sentence):
            ops.self_attention(x, x, x, backend="native")
        assert torch.equal(ops.self_attention(x, x, x), ops.self_attention(x, x, x, backend="reference"))
    from flexlam_fast import _C

    for dim, kind, variant, sentence in ((20, 0, "", "dim"), (16, 0, "tiles", "variant"), (16, 0, "none", "variant")):
        with pytest.raises(ValueError, match=f"^{sentence}: expected"):
            _C.self_attention([(0, 0, 0, 0)] * 4, 0, 0, (0, 0, 1, 0, 1, dim), kind, False, 1.0, 1, variant)


@pytest.mark.skipif(not has_tiles(), reason="no matrix tiles for bf16, or no extension")
def test_auto_takes_the_tiles_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(TINY, BF16)
    auto = run(TINY, drawn, "auto")
    force(monkeypatch, "tiles")
    assert all(torch.equal(a, b) for a, b in zip(auto, run(TINY, drawn), strict=True))
    force(monkeypatch, "portable")
    assert not torch.equal(auto[0], run(TINY, drawn)[0])
