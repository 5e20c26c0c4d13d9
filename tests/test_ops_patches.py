"""Patches straight from stored frames: what the modules make of normalised pixels, to the bit, on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from frame_cases import DTYPES, SHAPES, Case, case, plain_flow, plain_tubelets
from linear_cases import every_kernel
from native_cases import Forced, every_variant
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.layers import normalise, patchify
from flexlam_fast.ops import native_frames

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def every_op(c: Case, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    """All three ops of one batch."""
    options = dict(dtype=dtype, backend=backend)
    return [
        ops.frame_patches(c.following, c.patch, **options),  # type: ignore[arg-type]
        ops.tubelets(c.now, c.following, c.patch, 4.0, **options),  # type: ignore[arg-type]
        ops.flow_patches(c.now, c.following, c.noise, c.tau, c.patch, **options),  # type: ignore[arg-type]
    ]


def every_plain(c: Case, dtype: torch.dtype) -> list[Tensor]:
    """The modules' own way to the same three."""
    frames = patchify(normalise(c.following), c.patch).to(dtype)
    return [frames, plain_tubelets(c, 4.0, dtype), plain_flow(c, dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_shape
@every_kernel
def test_patches_are_the_modules_to_the_bit(
    backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    c = case(shape, device)
    for ours, plain in zip(every_op(c, dtype, backend), every_plain(c, dtype), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, plain)


@every_shape
def test_the_reference_is_the_modules_to_the_bit(shape: tuple[int, ...]) -> None:
    c = case(shape)
    for dtype in (*DTYPES, torch.float64):
        for ours, plain in zip(every_op(c, dtype, "reference"), every_plain(c, dtype), strict=True):
            assert torch.equal(ours, plain)


@every_variant
def test_every_instruction_set_makes_the_same_bits(variant: str) -> None:
    for shape in SHAPES:
        c = case(shape)
        for dtype in DTYPES:
            rest = c.patch, 4.0, dtype
            ours = [
                native_frames.make_patches(Forced(variant), c.following, None, None, None, 0, *rest),  # type: ignore[arg-type]
                native_frames.make_patches(Forced(variant), c.now, c.following, None, None, 1, *rest),  # type: ignore[arg-type]
                native_frames.make_patches(Forced(variant), c.now, c.following, c.noise, c.tau, 2, *rest),  # type: ignore[arg-type]
            ]
            assert all(torch.equal(a, b) for a, b in zip(ours, every_plain(c, dtype), strict=True)), shape


@every_kernel
def test_every_value_of_a_byte_is_normalised_as_the_module_does(backend: str, device: str) -> None:
    frames = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    ours = ops.frame_patches(frames, 16, backend=backend)
    assert torch.equal(ours.flatten(), normalise(frames).flatten())


@every_kernel
def test_inputs_may_be_strided_and_batches_empty(backend: str, device: str) -> None:
    c = case((4, 8, 16, 3, 4), device)
    wide = [torch.stack([t, t.flip(0)], dim=-1) for t in (c.now, c.following, c.noise, c.tau)]
    strided = Case(*(t[::2, ..., 0] for t in wide), c.out, c.patch)
    assert not strided.now.is_contiguous()
    for ours, plain in zip(every_op(strided, torch.float32, backend), every_plain(strided, torch.float32), strict=True):
        assert torch.equal(ours, plain)
    none = Case(*(t[:0] for t in c[:5]), c.patch)
    assert [t.shape for t in every_op(none, torch.bfloat16, backend)] == [(0, 8, 48), (0, 8, 96), (0, 8, 96)]


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    c = case((7, 16, 16, 3, 4))
    made = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made.append(every_op(c, torch.bfloat16, None))
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


def test_fp64_is_left_to_the_reference_by_auto_and_refused_by_name() -> None:
    c = case(SHAPES[2])
    assert torch.equal(every_op(c, torch.float64, None)[1], plain_tubelets(c, 4.0, torch.float64))
    with pytest.raises(BackendError, match="float32, float16 or bfloat16"):
        ops.frame_patches(c.now, 8, dtype=torch.float64, backend="native")


@every_kernel
def test_opcheck(backend: str, device: str) -> None:
    c = case(SHAPES[4], device)
    for kind, reads in enumerate([(None,) * 3, (c.following, None, None), (c.following, c.noise, c.tau)]):
        args = (c.now, *reads, kind, c.patch, 4.0, torch.float16, backend)
        told = torch.library.opcheck(torch.ops.flexlam_fast.make_patches.default, args)
        assert set(told.values()) == {"SUCCESS"}


@every_kernel
def test_one_graph_under_torch_compile(backend: str, device: str) -> None:
    c = case(SHAPES[2], device)
    compiled = torch.compile(lambda: every_op(c, torch.float32, backend), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(), every_plain(c, torch.float32), strict=True))


C = case((2, 8, 12, 3, 4))
BAD = [
    (
        lambda: ops.frame_patches(C.now.float(), 4),
        r"^frames: expected \[B,H,W,C\] uint8, got \[2,8,12,3\] float32 cpu$",
    ),
    (lambda: ops.frame_patches(C.now, 0), r"^patch: expected an integer in 1\.\.256, got 0$"),
    (
        lambda: ops.frame_patches(C.now, 5),
        r"^frames: expected frames of whole patches of 5 pixels, got \[2, 8, 12, 3\]$",
    ),
    (
        lambda: ops.frame_patches(C.now, 4, dtype=torch.int32),
        r"^dtype: expected a floating dtype, got dtype torch\.int32$",
    ),
    (lambda: ops.tubelets(C.now, C.now[:1], 4, 4.0), r"^following: expected \[2,8,12,3\] uint8 cpu, got \[1,8,12,3\]"),
    (
        lambda: ops.flow_patches(*C[:2], C.noise[:, 1:], C.tau, 4),
        r"^noise: expected \[2,288\] float32 cpu, got \[2,287\]",
    ),
    (lambda: ops.flow_patches(*C[:3], C.tau.double(), 4), r"^tau: expected \[2\] float32 cpu, got \[2\] float64 cpu$"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[s for _, s in BAD])
def test_one_sentence_says_what_is_wrong(call: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()  # type: ignore[operator]
