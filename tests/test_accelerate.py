"""``ff.accelerate``: an FSQ that exists answers as before, through this package's op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_cases import BACKENDS, CASES, L, assert_same, pair, through_ops
from torch import Tensor, nn

from flexlam_fast import ops
from flexlam_fast.accelerate import accelerate

vector_quantize = pytest.importorskip("vector_quantize_pytorch")
FSQ = vector_quantize.FSQ

NEWER = set(inspect.signature(FSQ.__init__).parameters)  # the oldest supported release has fewer options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_original(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, shape = CASES[case]
    ours, theirs = pair(backend, **options)
    calls = through_ops(monkeypatch)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        z = torch.randn(shape) * 2
        mine, original = z.clone().requires_grad_(), z.clone().requires_grad_()
        got, expected = ours(mine), theirs(original)
        assert_same(got, expected)
        weight = torch.randn(expected[0].shape)
        (got[0] * weight).sum().backward()
        (expected[0] * weight).sum().backward()
        grads = [(mine, original), *zip(ours.parameters(), theirs.parameters(), strict=True)]
        for one, other in grads:
            assert one.grad is not None
            # both sum in fp32, in orders that may differ
            assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    # vectors with channel_first are the original's business; all else runs through the op
    assert calls == ([] if len(shape) == 2 else [backend, backend])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["plain", "projections", "image", "no indices", "nothing forced", "no dtype allowed"])
def test_other_dtypes_come_back_as_the_original_returns_them(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, shape = CASES[case]
    ours, theirs = pair(**options)
    calls = through_ops(monkeypatch)
    z = (torch.randn(shape) * 2).to(dtype)
    got = ours.to(dtype)(z)
    assert_same(got, theirs.to(dtype)(z))
    assert got[0].dtype == dtype
    assert calls == ([] if dtype == torch.float64 else ["reference"]), "no op rounds in float64"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_allowed_dtype_comes_back_as_the_original_returns_it(dtype: torch.dtype) -> None:
    ours, theirs = pair(levels=L, allowed_dtypes=(dtype,))
    z = (torch.randn(3, 50, 4) * 2).to(dtype)
    assert_same(ours(z), theirs(z))


@pytest.mark.parametrize("case", ["plain", "projections", "image, projections, two codebooks", "nothing forced"])
def test_autocast_is_obeyed(case: str) -> None:
    options, shape = CASES[case]
    ours, theirs = pair(**options)
    z = torch.randn(shape) * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(ours(z), theirs(z))
        assert ours(z)[0].dtype == (torch.bfloat16 if ours.has_projections else torch.float32)


def test_float64_rounds_in_float64_as_it_did() -> None:
    ours, theirs = pair(levels=[5])
    # where the code changes, as seen in float64; fp32 sees the border somewhere else
    border = torch.tensor(0.5 / (2 * 1.001), dtype=torch.float64).atanh()
    z = (border + torch.linspace(-1e-7, 1e-7, 101, dtype=torch.float64)).view(1, -1, 1)
    assert_same(ours(z), theirs(z))
    assert not torch.equal(ours(z)[1], ours(z.float())[1])


def test_another_default_dtype_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(levels=L)
    calls = through_ops(monkeypatch)
    z = torch.randn(3, 50, 4)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(ours(z), theirs(z))
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls == [], "the original forms its constants in the default dtype, so it has to answer"


@pytest.mark.parametrize("layout", ["transposed", "channels last", "every other", "expanded"])
def test_strided_inputs_give_the_same_result_in_the_same_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = {
        "transposed": torch.randn(3, 4, 7).transpose(1, 2),
        "channels last": torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
        "every other": torch.randn(3, 14, 4)[:, ::2],
        "expanded": torch.randn(3, 1, 4).expand(3, 7, 4),
    }[layout]
    ours, theirs = pair(levels=L)
    assert ours(z)[0].stride() == theirs(z)[0].stride()
    assert_same(ours(z), theirs(z))
    real = ops.fsq

    def packed(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        latents, codes = real(*args, **kwargs)
        return latents.contiguous(), codes

    monkeypatch.setattr(ops, "fsq", packed)  # as a kernel returns them
    mine, original = z.clone().requires_grad_(), z.clone().requires_grad_()
    got, expected = ours(mine), theirs(original)
    assert got[0].stride() == expected[0].stride()
    assert_same(got, expected)
    got[0].square().sum().backward()
    expected[0].square().sum().backward()
    assert mine.grad is not None
    assert torch.allclose(mine.grad, original.grad, rtol=1e-5, atol=1e-6)


def test_transposed_features_can_still_be_viewed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(levels=L)
    real = ops.fsq
    monkeypatch.setattr(ops, "fsq", lambda *a, **k: tuple(t.contiguous() for t in real(*a, **k)))
    features = torch.randn(2, 4, 15)
    expected = theirs(features.transpose(1, 2))[0].transpose(1, 2).view(2, 60)
    assert torch.equal(ours(features.transpose(1, 2))[0].transpose(1, 2).view(2, 60), expected)


@pytest.mark.parametrize("z", [torch.zeros(3, 7, 5), torch.zeros(7, 4), torch.zeros(2, 3, 4, 4), torch.zeros(3, 7)])
def test_wrong_shapes_fail_as_they_did(z: Tensor) -> None:
    ours, theirs = pair(levels=L)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(z)
    with pytest.raises(expected.type) as got:
        ours(z)
    assert str(got.value) == str(expected.value)


def test_no_images_give_no_codes() -> None:
    ours, _ = pair(levels=L)  # the original fails here, because einops packs nothing out of nothing
    latents, codes = ours(torch.zeros(0, 4, 3, 5))
    assert latents.shape == (0, 4, 3, 5)
    assert codes.shape == (0, 3, 5)


def test_integers_are_answered_by_the_original() -> None:
    ours, theirs = pair(levels=L)
    z = torch.randint(-3, 4, (3, 7, 4))
    assert_same(ours(z), theirs(z))


MUTATIONS: dict[str, Callable[[FSQ], object]] = {
    "preserve_symmetry": lambda m: setattr(m, "preserve_symmetry", True),
    "noise_dropout": lambda m: setattr(m, "noise_dropout", 0.5),
    "bound_hard_clamp": lambda m: setattr(m, "bound_hard_clamp", True),
    "return_indices": lambda m: setattr(m, "return_indices", False),
    "keep_num_codebooks_dim": lambda m: setattr(m, "keep_num_codebooks_dim", True),
    "channel_first": lambda m: setattr(m, "channel_first", True),
    "project_in": lambda m: setattr(m, "project_in", nn.Linear(4, 4)),
    "quantize": lambda m: setattr(m, "quantize", lambda z: z * 0),
    "dim": lambda m: (setattr(m, "dim", 7), setattr(m, "project_in", nn.Linear(7, 4))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_option_that_is_changed_later_is_obeyed(name: str) -> None:
    if name not in NEWER and name == "bound_hard_clamp":
        pytest.skip("this release has no such option")
    ours, theirs = pair(levels=L)
    z = torch.randn(3, 4, 4)
    if name == "dim":
        z = torch.randn(3, 4, 7)
    before = None if name == "dim" else ours(z)
    torch.manual_seed(1)
    MUTATIONS[name](ours)
    torch.manual_seed(1)
    MUTATIONS[name](theirs)
    torch.manual_seed(2)
    got = ours(z)
    torch.manual_seed(2)
    expected = theirs(z)
    assert_same(got, expected)
    if before is not None:  # or else the change was none, and this has tested nothing
        same = [
            b is not None and a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, expected, strict=True)
        ]
        assert not all(same)


def test_more_codes_than_fp32_counts_are_the_originals_when_they_are_asked_for_later() -> None:
    ours, theirs = pair(levels=[17] * 6, return_indices=False)
    ours.return_indices = theirs.return_indices = True
    z = torch.randn(3, 50, 6)
    assert_same(ours(z), theirs(z))


def test_further_arguments_go_to_the_original() -> None:
    ours, _ = pair(levels=L)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        ours(torch.zeros(3, 7, 4), mask=None)


def test_hooks_fire_as_before() -> None:
    fsq, seen = FSQ(L, dim=6), []
    fsq.register_forward_pre_hook(lambda m, args: seen.append("before"))
    fsq.register_forward_hook(lambda m, args, out: seen.append(f"after {len(out)}"))
    fsq.project_in.register_forward_hook(lambda m, args, out: seen.append("in"))
    fsq.project_out.register_forward_hook(lambda m, args, out: seen.append("out"))
    fsq.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    accelerate(fsq)
    assert seen == []
    fsq(torch.randn(2, 7, 6, requires_grad=True))[0].sum().backward()
    assert seen == ["before", "in", "out", "after 2", "backward"]


def test_the_originals_other_methods_still_work() -> None:
    ours, theirs = pair(levels=L, dim=6)
    latents, codes = ours(torch.randn(2, 7, 6))
    assert torch.allclose(ours.indices_to_codes(codes), latents, atol=1e-6)
    assert torch.equal(ours.indices_to_codes(codes), theirs.indices_to_codes(codes))
    assert ours.codebook_size == 1000


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_works_after_inference_mode(backend: str) -> None:
    fsq = FSQ([9, 7, 5])
    accelerate(fsq, backend)
    with torch.inference_mode():
        fsq(torch.randn(2, 7, 3))
    z = torch.randn(2, 7, 3, requires_grad=True)
    fsq(z)[0].sum().backward()
    assert z.grad is not None
