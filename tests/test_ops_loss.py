"""Cross-entropy of training: every backend and instruction set against fp64, forward and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fsq_cases import every_run, is_interpreted
from native_cases import Forced, every_variant, needs_extension
from torch import Tensor

from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import native_sequence
from flexlam_fast.ops.loss import cross_entropy, mean_cross_entropy
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = [1000, 4375, 1, 7, 1025]


def case(rows: int, codes: int, dtype: torch.dtype, device: str = "cpu", ignored: int = -100) -> tuple[Tensor, Tensor]:
    """Logits with a spread of some ten, and targets of which every third does not count."""
    generator = torch.Generator().manual_seed(rows + codes)
    logits = (3 * torch.randn(rows, codes, generator=generator)).to(dtype)
    target = torch.randint(0, codes, (rows,), generator=generator)
    target[1::3] = ignored
    return logits.to(device), target.to(device)


def per_row(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of each row that counts: more numbers than their mean, for an error to show in."""
    return F.cross_entropy(logits, target, reduction="none")[target != -100]


def gradient(logits: Tensor, target: Tensor, up: float) -> Tensor:
    x = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(up * F.cross_entropy(x, target), x)[0]


def run(logits: Tensor, target: Tensor, backend: str, up: float = 1.0, **more: Any) -> tuple[Tensor, Tensor]:
    x = logits.detach().requires_grad_()
    loss = cross_entropy(x, target, backend=backend, **more)
    return loss.detach(), torch.autograd.grad(up * loss, x)[0]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_run
def test_within_the_error_budget(backend: str, device: str, dtype: torch.dtype, codes: int) -> None:
    logits, target = case(19, codes, dtype, device)
    loss, grad = run(logits, target, backend, 3.0)
    assert (loss.dtype, grad.dtype, loss.shape) == (torch.float32, dtype, ())
    assert_within_budget(grad, gradient, logits, target, 3.0, working_dtype=dtype, factor=GRADIENT_FACTOR)
    assert not grad[1::3].any()
    exact = F.cross_entropy(logits.double(), target)
    assert float((loss - exact).abs()) <= 4 * torch.finfo(torch.float32).eps * max(float(exact), 1.0)
    # logits in half precision are summed in fp32, whatever their dtype
    each = torch.stack([cross_entropy(logits[i : i + 1], target[i : i + 1], backend=backend) for i in range(6)])
    counting = each[target[:6] != -100]
    assert_within_budget(counting, per_row, logits[:6].float(), target[:6], working_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_extension
@every_variant
def test_every_instruction_set_is_within_the_budget(variant: str, dtype: torch.dtype) -> None:
    forced: Any = Forced(variant)
    for codes in CODES:
        logits, target = case(200, codes, dtype)
        loss, kept, count = native_sequence.mean_cross_entropy(forced, logits, target, -100)
        sums = logits.float(), kept[:, 0]
        assert torch.equal(kept[:, 0], sums[0].amax(1))
        assert_within_budget(
            kept[:, 1], lambda x, top: (x - top[:, None]).exp().sum(1), *sums, working_dtype=torch.float32
        )
        assert int(count) == int((target != -100).sum())
        assert torch.isclose(loss.double(), F.cross_entropy(logits.double(), target), rtol=1e-6, atol=1e-6)
        args = torch.tensor(1.0), logits, target, kept, count, -100
        grad = native_sequence.mean_cross_entropy_backward(forced, *args)
        assert_within_budget(grad, gradient, logits, target, 1.0, working_dtype=dtype, factor=GRADIENT_FACTOR)


@every_run
def test_what_counts_and_what_does_not(backend: str, device: str) -> None:
    logits, target = case(9, 50, torch.float32, device)
    for other in (0, 7, -1, 2**40):
        chosen = target.masked_fill(target == -100, other)
        ours, theirs = (
            run(logits, chosen, backend, ignore_index=other),
            F.cross_entropy(logits, chosen, ignore_index=other),
        )
        assert torch.allclose(ours[0], theirs, rtol=1e-6)
        assert not ours[1][chosen == other].any()
        assert ours[1][chosen != other].any(1).all()
    loss, grad = run(logits, torch.full_like(target, -100), backend)
    assert math.isnan(float(loss))
    assert not grad.any()
    loss, grad = run(logits[:0], target[:0], backend)
    assert math.isnan(float(loss))
    assert grad.shape == (0, 50)


@every_run
def test_rows_may_stand_apart(backend: str, device: str) -> None:
    logits, target = case(9, 40, torch.bfloat16, device)
    expected = run(logits, target, backend)
    wide = torch.cat([logits, logits + 5], dim=1)[:, :40]
    turned = logits.T.contiguous().T
    spread = torch.stack([target, target], dim=1)[:, 0]
    for strided in ((wide, target), (turned, target), (logits, spread), (logits.repeat_interleave(2, 0)[::2], target)):
        loss, grad = run(*strided, backend)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])
        assert grad.shape == logits.shape


@every_run
def test_logits_of_any_size_are_weighed_as_torch_weighs_them(backend: str, device: str) -> None:
    """Far apart, infinite, NaN, a first block of nothing but minus infinity; the row beside them is left in peace."""
    for codes in (30, 2500):
        for value in (1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan):
            logits, target = case(2, codes, torch.float32, device)
            target = target.clamp_min(0)
            logits[0, 3], logits[0, codes - 1] = value, -value
            far = logits.clone()
            far[0, : codes // 2 + 1] = -math.inf
            for x in (logits, far):
                x.requires_grad_()
                theirs = torch.stack(
                    [cross_entropy(x[i : i + 1], target[i : i + 1], backend="reference") for i in (0, 1)]
                )
                ours = torch.stack([cross_entropy(x[i : i + 1], target[i : i + 1], backend=backend) for i in (0, 1)])
                assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True), (codes, value)
                grads = [torch.autograd.grad(t[t.isfinite()].sum(), x)[0] for t in (ours, theirs)]
                assert torch.allclose(*grads, rtol=1e-5, atol=1e-7, equal_nan=True), (codes, value)


@every_run
def test_the_mean_repeats_to_the_bit(backend: str, device: str) -> None:
    logits, target = case(60 if is_interpreted(backend, device) else 1500, 100, torch.float32, device)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(logits, target, backend))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("flexlam_fast.kernels.launch_loss")
    monkeypatch.setattr(launch.kernels, "PROGRAMS", 5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, target = case(23, 60, torch.float32, device)
    loss, kept, count = launch.mean_cross_entropy(logits, target, -100)
    assert torch.allclose(loss, F.cross_entropy(logits, target), rtol=1e-6)
    assert torch.allclose(kept[:, 0] + kept[:, 1].log(), logits.logsumexp(1), rtol=1e-6)
    assert int(count) == int((target != -100).sum())


@every_run
def test_opcheck_and_one_graph_under_torch_compile(backend: str, device: str) -> None:
    logits, target = case(6, 20, torch.float32, device)
    told = torch.library.opcheck(
        torch.ops.flexlam_fast.mean_cross_entropy.default, (logits.clone().requires_grad_(), target, -100, backend)
    )
    kept = mean_cross_entropy(logits, target, -100, backend)
    args = torch.tensor(2.0, device=device), logits, target, *kept[1:], -100, backend
    told |= torch.library.opcheck(torch.ops.flexlam_fast.mean_cross_entropy_backward.default, args)
    assert set(told.values()) == {"SUCCESS"}, told
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    x = logits.clone().requires_grad_()
    loss = compiled(x, target, backend=backend)
    expected = run(logits, target, backend)
    assert torch.equal(loss, expected[0])
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected[1])


def test_the_reference_is_torchs_and_exact_in_fp64() -> None:
    logits, target = case(5, 6, torch.float64)
    assert torch.equal(cross_entropy(logits, target), F.cross_entropy(logits, target))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target), [logits.requires_grad_()])
    half = case(5, 6, torch.bfloat16)[0]
    assert cross_entropy(half, target, backend="reference").dtype == torch.float32
    with pytest.raises(BackendError, match="expected float32, float16 or bfloat16 for 'native', got float64"):
        cross_entropy(logits, target, backend="native")


@pytest.mark.parametrize("backend", ["reference", "native", "auto"])
def test_bad_input_gets_one_sentence(backend: str) -> None:
    logits, target = case(5, 6, torch.float32)
    calls: list[tuple[Any, Any, str]] = [
        (logits[None], target, r"logits: expected \[M,C\] float32 or .*, got \[1,5,6\] float32 cpu"),
        (logits.int(), target, r"logits: expected \[M,C\] float32 or .*, got \[5,6\] int32 cpu"),
        (logits[:, :0], target, r"logits: expected at least one column, got \[5, 0\]"),
        (logits, target[:4], r"target: expected \[5\] int64 cpu, got \[4\] int64 cpu"),
        (logits, target.int(), r"target: expected \[5\] int64 cpu, got \[5\] int32 cpu"),
        (logits, target + 6, r"target: expected 0\.\.5 or -100, got -94"),
        (logits, target.clamp_min(0) + 4, r"target: expected 0\.\.5 or -100, got \d"),
    ]
    for x, t, sentence in calls:
        with pytest.raises(InputError, match=f"^{sentence}$"):
            cross_entropy(x, t, backend=backend)


@every_run
def test_a_target_that_cannot_be_checked_poisons_its_row_alone(backend: str, device: str) -> None:
    """On a GPU reading targets would wait for it; here the launcher is called past the check."""
    logits, target = case(4, 20, torch.float32, device)
    for beyond in (20, -1, 2**40):
        target[2] = beyond
        loss, kept, count = mean_cross_entropy(logits, target, -100, backend)
        assert math.isnan(float(loss))
        assert kept[:, 1].isnan().tolist() == [False, False, True, False]
        op = torch.ops.flexlam_fast.mean_cross_entropy_backward.default
        grad = op(torch.tensor(1.0, device=device), logits, target, kept, count, -100, backend)
        assert grad.isnan().any(1).tolist() == [False, False, True, False]
