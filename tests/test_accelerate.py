"""``ff.accelerate``: an FSQ that exists answers as before, through this package's op, and can be given back."""

from __future__ import annotations

import ast
import copy
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from vector_quantize_pytorch import FSQ, ResidualFSQ
from vector_quantize_pytorch import finite_scalar_quantization as home

import flexlam_fast as ff
from flexlam_fast import ops
from flexlam_fast.accelerate import Acceleration, accelerate
from flexlam_fast.backend import choose
from flexlam_fast.bottleneck import Bottleneck
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import BackendError, InputError

L = [8, 5, 5, 5]
BACKENDS = sorted({"reference", choose("auto", "cpu").name})
NEWER = set(inspect.signature(FSQ.__init__).parameters)  # the oldest supported release has fewer options

#: Options of an FSQ and the shape of an input; between them every layout and every harmless option of ``FSQ``.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": (dict(levels=L), (3, 7, 4)),
    "other levels": (dict(levels=[7, 3, 16]), (2, 9, 3)),
    "one level": (dict(levels=[5]), (2, 9, 1)),
    "one slot": (dict(levels=L), (1, 1, 4)),
    "no blocks": (dict(levels=L), (0, 7, 4)),
    "no slots": (dict(levels=L), (3, 0, 4)),
    "projections": (dict(levels=L, dim=10), (3, 7, 10)),
    "projections without bias": (dict(levels=L, dim=10, projection_has_bias=False), (3, 7, 10)),
    "two codebooks": (dict(levels=L, num_codebooks=2), (3, 7, 8)),
    "three codebooks, projections": (dict(levels=[8, 5], num_codebooks=3, dim=5), (3, 7, 5)),
    "codebook dimension kept": (dict(levels=L, keep_num_codebooks_dim=True), (3, 7, 4)),
    "channel first": (dict(levels=L, channel_first=True), (3, 4, 7)),
    "channel first, vectors": (dict(levels=L, channel_first=True), (3, 4)),
    "channel first, projections": (dict(levels=L, channel_first=True, dim=6), (3, 6, 7)),
    "image": (dict(levels=L), (2, 4, 3, 5)),
    "image, projections, two codebooks": (dict(levels=L, dim=6, num_codebooks=2), (2, 6, 3, 5)),
    "image, two codebooks": (dict(levels=L, num_codebooks=2), (2, 8, 3, 5)),
    "image, codebook dimension kept": (dict(levels=L, keep_num_codebooks_dim=True), (2, 4, 3, 5)),
    "video": (dict(levels=L), (2, 4, 2, 3, 5)),
    "video, channel first": (dict(levels=L, channel_first=True, dim=3), (2, 3, 2, 3, 5)),
    "scale": (dict(levels=L, scale=2.0), (3, 7, 4)),
    "no indices": (dict(levels=L, return_indices=False), (3, 7, 4)),
    "no indices, image": (dict(levels=L, return_indices=False, dim=6), (2, 6, 3, 5)),
    "no indices, many levels": (dict(levels=[17] * 6, return_indices=False), (3, 7, 6)),
    "nothing forced": (dict(levels=L, force_quantization_f32=False), (3, 7, 4)),
    "nothing forced, projections": (dict(levels=L, force_quantization_f32=False, dim=6), (3, 7, 6)),
    "every dtype allowed": (dict(levels=L, allowed_dtypes=(torch.float32, torch.bfloat16, torch.float16)), (3, 7, 4)),
    "no dtype allowed": (dict(levels=L, allowed_dtypes=(), dim=6), (3, 7, 6)),
}


def pair(backend: str = "reference", **options: Any) -> tuple[FSQ, FSQ]:
    """An accelerated FSQ and the original with the same weights."""
    ours = FSQ(**options)
    theirs = copy.deepcopy(ours)
    record = accelerate(ours, backend)
    assert [part.backend for part in record.swapped] == [backend]
    assert type(ours) is not FSQ
    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    """Latents equal to the bit, in shape, dtype and layout; codes too, or None on both sides."""
    assert type(ours) is tuple
    assert len(ours) == len(theirs) == 2
    for mine, original in zip(ours, theirs, strict=True):
        if original is None:
            assert mine is None
            continue
        assert (mine.shape, mine.dtype) == (original.shape, original.dtype)
        assert mine.is_contiguous() == original.is_contiguous()
        assert torch.equal(mine, original)


def through_ops(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Note every backend that ``ops.fsq`` is called with."""
    seen: list[str | None] = []
    real = ops.fsq

    def noting(z: Tensor, levels: Any, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        seen.append(backend)
        return real(z, levels, backend=backend)

    monkeypatch.setattr(ops, "fsq", noting)
    return seen


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


def test_under_another_default_dtype_it_is_left() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        record = accelerate(FSQ(L))
    finally:
        torch.set_default_dtype(torch.float32)
    assert record.swapped == ()
    reason = "it forms its constants in torch's default dtype, which is torch.bfloat16 now"
    assert [part.reason for part in record.left] == [reason]


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


class Mine(FSQ):
    """A user's own quantizer."""


def replaced() -> FSQ:
    fsq = FSQ(L)
    fsq.forward = lambda z: (z, None)
    return fsq


def parametrized() -> FSQ:
    fsq = FSQ(L, dim=6)
    fsq.weight = nn.Parameter(torch.zeros(3))
    parametrize.register_parametrization(fsq, "weight", nn.Identity())
    return fsq


def altered(**attributes: Any) -> FSQ:
    fsq = FSQ(L)
    for name, value in attributes.items():
        setattr(fsq, name, value)
    return fsq


LEFT: list[tuple[str, Callable[[], FSQ], str]] = [
    ("preserve_symmetry", lambda: FSQ(L, preserve_symmetry=True), "preserve_symmetry is True, which rounds to other"),
    ("noise_dropout", lambda: altered(noise_dropout=0.5), "noise_dropout is 0.5, which adds random offsets"),
    ("bound_hard_clamp", lambda: FSQ(L, bound_hard_clamp=True), "bound_hard_clamp is True, which bounds by a clamp"),
    ("orthogonal_rotation", lambda: FSQ([5, 5], orthogonal_rotation=True), "orthogonal_rotation is True, which rot"),
    ("level", lambda: FSQ([8, 1]), "levels are [8, 1], and a level below 2 holds no code"),
    ("codes", lambda: FSQ([1024, 1025]), "it has 1049600 codes, more than 1048576, up to which they can be counted"),
    ("int32", lambda: FSQ([17] * 9, return_indices=False), f"it has {17**9} codes, more than 2147483647, up to which"),
    ("keep", lambda: altered(num_codebooks=2), "keep_num_codebooks_dim is False with 2 codebooks"),
    ("subclass", lambda: Mine(L), "Mine is a subclass of FSQ and may compute something else"),
    ("parametrized", parametrized, "ParametrizedFSQ is a subclass of FSQ and may compute something else"),
    ("forward", replaced, "its forward was replaced on the object"),
    ("meta", lambda: FSQ(L).to("meta"), "it is on the meta device; accelerate it once its numbers are loaded"),
]


@pytest.mark.parametrize(("make", "sentence"), [row[1:] for row in LEFT], ids=[row[0] for row in LEFT])
def test_what_computes_something_else_is_left_with_the_reason(make: Callable[[], FSQ], sentence: str) -> None:
    try:
        fsq = make()
    except TypeError:
        pytest.skip("this release has no such option")
    was, held = type(fsq), dict(vars(fsq))
    record = accelerate(nn.Sequential(fsq))
    assert record.swapped == ()
    assert [(part.path, part.kind, part.backend) for part in record.left] == [("0", "FSQ", None)]
    assert record.left[0].reason.startswith(sentence)
    assert "\n" not in record.left[0].reason
    assert f"left     0  FSQ: {sentence}" in str(record)
    assert type(fsq) is was
    assert vars(fsq) == held


def test_the_layers_of_a_residual_fsq_are_left_as_they_are() -> None:
    model = ResidualFSQ(levels=L, num_quantizers=2, dim=4)
    theirs = copy.deepcopy(model)
    record = accelerate(model)
    assert len(record.swapped) + len(record.left) == 2
    z = torch.randn(2, 7, 4)
    assert_same(model.eval()(z), theirs.eval()(z))


def test_an_unknown_release_is_tried_before_it_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, count = FSQ.quantize, FSQ.codes_to_indices
    monkeypatch.setattr(FSQ, "quantize", lambda self, z: quantize(self, z * 1.1))
    assert "gives other values than the formula" in accelerate(FSQ(L)).left[0].reason
    monkeypatch.setattr(FSQ, "quantize", quantize)
    monkeypatch.setattr(FSQ, "codes_to_indices", lambda self, zhat: (count(self, zhat) - 1).clamp_min(0))
    assert "gives other codes than the formula" in accelerate(FSQ(L)).left[0].reason
    assert accelerate(FSQ(L, return_indices=False)).left == (), "no codes, no wrong codes"


def test_an_option_of_a_newer_release_is_left_unless_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(FSQ):
        def __init__(self, levels: list[int], wobble: float = 0.0) -> None:
            super().__init__(levels)
            self.wobble = wobble

    monkeypatch.setattr(home, "FSQ", Newer)
    assert len(accelerate(Newer(L)).swapped) == 1
    assert accelerate(Newer(L, 0.5)).left[0].reason.startswith("wobble is an option of a newer")
    lacking = Newer(L)
    del lacking.codebook_dim
    assert accelerate(lacking).left[0].reason.endswith("has an FSQ without codebook_dim")


class Model(nn.Module):
    """Quantizers at three depths, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FSQ(L, dim=6)
        self.again = self.first
        self.inner = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(6, 4), FSQ(L)), "odd": Mine(L)})
        self.bottleneck = Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, codes = self.again(self.first(z)[0])
        y, more = self.inner["deep"](x)
        return self.bottleneck(y).latents, codes, more


def test_a_nested_model_is_walked_and_the_record_says_what_happened() -> None:
    model = Model()
    theirs = copy.deepcopy(model)
    held = {key: (t.data_ptr(), t.clone()) for key, t in model.state_dict().items()}
    parts = [id(m) for m in model.modules()]
    record = accelerate(model, "reference")
    why = choose("reference", "cpu").reason
    assert record.swapped == (
        ("first", "FSQ", "reference", why),
        ("inner.deep.1", "FSQ", "reference", why),
        ("bottleneck", "Bottleneck", "reference", why),
    )
    assert [part.path for part in record.left] == ["inner.odd"]
    assert str(record).splitlines() == [
        "accelerate: 3 swapped, 1 left",
        "  swapped  first         FSQ: reference",
        "  swapped  inner.deep.1  FSQ: reference",
        "  swapped  bottleneck    Bottleneck: reference",
        "  left     inner.odd     FSQ: Mine is a subclass of FSQ and may compute something else",
        f"  reference: {why}",
    ]
    assert repr(record) == str(record)
    assert model.bottleneck.backend == "reference"
    assert [id(m) for m in model.modules()] == parts
    assert isinstance(model.first, FSQ)
    after = model.state_dict()
    assert list(after) == list(held)
    assert all(after[key].data_ptr() == where and torch.equal(after[key], t) for key, (where, t) in held.items())
    z = torch.randn(2, 7, 6)
    for mine, original in zip(model(z), theirs(z), strict=True):
        assert torch.equal(mine, original)
    theirs.load_state_dict(after)


def test_undo_gives_back_exactly_what_was_there() -> None:
    model = Model()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    record = accelerate(model)
    assert [(type(m), vars(m)) for m in model.modules()] != before
    record.undo()
    assert [(type(m), vars(m)) for m in model.modules()] == before
    again = accelerate(model)
    record.undo()
    assert len(again.swapped) == 3
    assert type(model.first) is not FSQ, "a second undo does nothing, whatever has been swapped since"
    again.undo()
    assert [(type(m), vars(m)) for m in model.modules()] == before


def test_a_context_ends_with_undo_even_by_an_error() -> None:
    fsq = FSQ(L)

    def fail() -> None:
        with accelerate(fsq) as record:
            assert isinstance(record, Acceleration)
            assert type(fsq) is not FSQ
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert type(fsq) is FSQ


def test_undo_leaves_what_somebody_else_has_changed_since() -> None:
    fsq, bottleneck = FSQ(L), Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))
    record = accelerate(nn.ModuleList([fsq, bottleneck]))
    fsq.__class__ = Mine
    bottleneck.backend = "mine"
    record.undo()
    assert type(fsq) is Mine
    assert bottleneck.backend == "mine"


def test_a_second_call_swaps_nothing() -> None:
    model = Model()
    accelerate(model, "reference")
    classes = [type(m) for m in model.modules()]
    record = accelerate(model, "reference")
    assert record.swapped == ()
    already = "already accelerated, on reference"
    assert [part.reason for part in record.left if part.path != "inner.odd"] == [already] * 3
    assert [type(m) for m in model.modules()] == classes
    record.undo()
    assert [type(m) for m in model.modules()] == classes, "what it did not swap it does not give back"


def test_a_second_call_for_another_backend_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fsq = FSQ(L)
    accelerate(fsq, "reference")
    other = choose("reference", "cpu")._replace(name="other")
    monkeypatch.setattr(sys.modules["flexlam_fast.accelerate"], "choose", lambda name, device: other)
    record = accelerate(fsq, "other")
    assert record.left[0].reason == "already accelerated, on reference; undo that first to change it"


def test_the_root_itself_is_swapped_and_named() -> None:
    fsq = FSQ(L)
    record = accelerate(fsq, "reference")
    assert record.swapped[0].path == ""
    assert "swapped  the FSQ itself  FSQ: reference" in str(record)
    assert "AcceleratedFSQ" in repr(fsq)


def test_nothing_recognised_is_no_error() -> None:
    record = accelerate(nn.Sequential(nn.Linear(3, 3)))
    assert (record.swapped, record.left) == ((), ())
    sentence = "accelerate: found no FSQ, Qwen3ForCausalLM or Bottleneck in the Sequential itself"
    assert str(record) == sentence
    record.undo()


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


def test_a_deep_copy_stays_accelerated_and_is_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(FSQ(L, dim=6))
    model.append(model[0])
    model[0].notes = [model[0]]
    record = accelerate(model, "reference")
    twin = copy.deepcopy(model)
    assert twin[0].notes[0] is twin[0]
    assert twin[0] is twin[1]
    assert twin[0] is not model[0]
    assert type(twin[0]) is type(model[0])
    assert twin[0].project_in.weight.data_ptr() != model[0].project_in.weight.data_ptr()
    z = torch.randn(2, 7, 6)
    expected = model[0](z)
    record.undo()
    calls = through_ops(monkeypatch)
    assert_same(twin[0](z), expected)
    assert calls == ["reference"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_as_the_original_class(protocol: int) -> None:
    model = nn.Sequential(FSQ(L, dim=6))
    accelerate(model)
    data = pickle.dumps(model, protocol)
    assert b"flexlam" not in data
    loaded = pickle.loads(data)
    assert type(loaded[0]) is FSQ
    z = torch.randn(2, 7, 6)
    assert_same(model(z), loaded(z))


def test_torch_saves_the_whole_module() -> None:
    fsq = FSQ(L, dim=6)
    accelerate(fsq)
    file = io.BytesIO()
    torch.save(fsq, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is FSQ
    assert torch.equal(loaded.project_in.weight, fsq.project_in.weight)


@pytest.mark.parametrize("name", ["nonsense", "Reference", ""])
@pytest.mark.parametrize("make", [lambda: FSQ(L), lambda: Mine(L), lambda: nn.Linear(2, 2), Model])
def test_a_backend_that_cannot_run_is_refused_by_name(name: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(BackendError, match=r"^backend: expected one of .*, got '"):
        accelerate(model, name)
    assert not [m for m in model.modules() if "Accelerated" in type(m).__name__]


def test_an_error_swaps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(FSQ(L), FSQ(L))
    asked = []

    def second_fails(name: str, device: torch.device) -> Any:
        asked.append(name)
        if len(asked) == 2:
            raise BackendError("backend: expected one that runs here, got 'other'")
        return choose("reference", device)

    monkeypatch.setattr(sys.modules["flexlam_fast.accelerate"], "choose", second_fails)
    with pytest.raises(BackendError, match="^backend: expected one that runs here"):
        accelerate(model, "other")
    assert [type(m) for m in model] == [FSQ, FSQ]


def test_a_module_that_moves_takes_what_is_best_there_only_if_auto_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, named = FSQ(L), FSQ(L)
    accelerate(chosen, "auto")
    accelerate(named, "reference")
    calls = through_ops(monkeypatch)
    for fsq in (chosen, named):
        fsq(torch.randn(2, 7, 4))
        fsq.to("meta")(torch.randn(2, 7, 4, device="meta"))
    assert calls == ["auto", "auto", "reference", "reference"]


@pytest.mark.parametrize("make", [lambda: FSQ(L), lambda: Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))])
def test_kernels_that_do_not_take_the_levels_are_passed_over_by_auto_and_refused_by_name(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ops.fsq

    def narrow(*args: Any, backend: str | None = None) -> tuple[Tensor, Tensor]:
        if backend == "other":
            raise BackendError("backend: expected at most 3 channels for 'other', got 4")
        return real(*args, backend=backend)

    other = choose("reference", "cpu")._replace(name="other")
    monkeypatch.setattr(ops, "fsq", narrow)
    monkeypatch.setattr(sys.modules["flexlam_fast.accelerate"], "choose", lambda name, device: other)
    with pytest.raises(BackendError, match="at most 3 channels"):
        accelerate(make(), "other")
    model = make()
    record = accelerate(model)
    assert [part.backend for part in record.swapped] == ["reference"]
    assert record.swapped[0].reason == "backend: expected at most 3 channels for 'other', got 4"
    assert len(model(torch.randn(2, 7, 4))) == 2


@pytest.mark.parametrize("module", [3, None, FSQ, "fsq", torch.zeros(2, 3)])
def test_what_is_no_module_gets_one_sentence(module: Any) -> None:
    with pytest.raises(InputError, match=r"^module: expected an nn\.Module, got \S.*$"):
        accelerate(module)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_works_after_inference_mode(backend: str) -> None:
    fsq = FSQ([9, 7, 5])
    accelerate(fsq, backend)
    with torch.inference_mode():
        fsq(torch.randn(2, 7, 3))
    z = torch.randn(2, 7, 3, requires_grad=True)
    fsq(z)[0].sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", ["projections", "image, two codebooks", "channel first", "no indices"])
def test_it_compiles_without_a_break(case: str, backend: str) -> None:
    options, shape = CASES[case]
    ours = FSQ(**options)
    theirs = copy.deepcopy(ours)
    accelerate(ours, backend)
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(nn.Identity(), ours), fullgraph=True, backend="eager")
    z = torch.randn(shape) * 2
    assert_same(compiled(z), theirs(z))


def test_gradients_pass_through_a_compiled_model_that_was_compiled_before() -> None:
    fsq = FSQ(L, dim=6)
    theirs = copy.deepcopy(fsq)
    torch.compiler.reset()
    compiled = torch.compile(fsq, backend="aot_eager")
    z = torch.randn(2, 7, 6)
    compiled(z)
    record = accelerate(compiled)
    assert [part.path for part in record.swapped] == ["_orig_mod"]
    mine, original = z.clone().requires_grad_(), z.clone().requires_grad_()
    got, expected = compiled(mine), theirs(original)
    assert_same(got, expected)
    got[0].square().sum().backward()
    expected[0].square().sum().backward()
    assert mine.grad is not None
    assert torch.allclose(mine.grad, original.grad, rtol=1e-5, atol=1e-6)
    record.undo()
    assert_same(compiled(z), expected)


def test_the_other_package_is_looked_up_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(sys.modules["flexlam_fast.accelerate"].__file__ or "").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(imports) > 5
    assert not [node for node in imports if "vector_quantize" in ast.unparse(node)]
    assert "import_module" not in source
    fsq = FSQ(L)
    for name in [name for name in sys.modules if name.startswith("vector_quantize_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    assert accelerate(nn.Sequential(fsq)).swapped == ()
    bottleneck = Bottleneck(BottleneckConfig(levels=tuple(L), slots=7))
    assert len(accelerate(bottleneck).swapped) == 1
    assert not [name for name in sys.modules if name.startswith("vector_quantize_pytorch")]


def test_the_public_name_is_a_call_in_whatever_order_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(ff), "accelerate", raising=False)
    assert ff.accelerate is accelerate
    # the name as Python leaves it when the submodule is imported first
    monkeypatch.setattr(ff, "accelerate", sys.modules["flexlam_fast.accelerate"])
    assert len(ff.accelerate(FSQ(L), backend="reference").swapped) == 1
