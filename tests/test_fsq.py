"""FSQ, retained prefix and null fill against ``vector_quantize_pytorch`` and against plain statements of the rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vector_quantize_pytorch import FSQ

from flexlam_fast import ops
from flexlam_fast.bottleneck import Bottleneck, prefix_weights, sample_prefix
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget

LEVEL_SETS = [(8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5), (7, 7, 7), (16, 15, 9), (3, 4), (4,), (9, 3, 6, 5, 4)]
EPS = 1e-3


def bits(x: Tensor) -> Tensor:
    """The bit patterns of fp32 values, so that -0.0 and 0.0 differ."""
    assert x.dtype == torch.float32
    return x.contiguous().view(torch.int32)


def constants(levels: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``half``, ``offset``, ``shift`` and ``L // 2`` of design section 2, formed in fp64."""
    n = torch.tensor(levels, dtype=torch.float64)
    half = (n - 1) * (1 + EPS) / 2
    offset = torch.where(n % 2 == 0, 0.5, 0.0).double()
    return half.to(dtype), offset.to(dtype), (offset / half).atanh().to(dtype), (n // 2).to(dtype)


def near_the_edges(levels: tuple[int, ...]) -> Tensor:
    """``[blocks, 64, d]`` inputs within a few ulps of where the code changes, and far out in the tails."""
    half, offset, shift, _ = constants(levels, torch.float64)
    columns = []
    for i, n in enumerate(levels):
        low = -(n // 2)
        border = torch.arange(low, low + n - 1).double() + 0.5
        edge = (((border + offset[i]) / half[i]).atanh() - shift[i]).float()
        near = [edge]
        for direction in (-torch.inf, torch.inf):
            x = edge
            for _ in range(12):
                x = torch.nextafter(x, torch.full_like(x, direction))
                near.append(x)
        tails = torch.tensor([-1e30, -100.0, -9.1, -0.0, 0.0, 9.1, 100.0, 1e30])
        columns.append(torch.cat([*near, tails]))
    generator = torch.Generator().manual_seed(1)
    rows = 64 * 40
    picked = [c[torch.randint(len(c), (rows,), generator=generator)] for c in columns]
    return torch.stack(picked, dim=1).view(40, 64, len(levels))


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_ten_million_codes_equal_those_of_vector_quantize_pytorch(levels: tuple[int, ...]) -> None:
    theirs = FSQ(levels=list(levels))
    generator = torch.Generator().manual_seed(sum(levels))
    counted, seen = 0, torch.zeros(math.prod(levels), dtype=torch.bool)
    for chunk in range(5):
        # 5 chunks x 8 level sets x 250,000 = 10^7 codes
        z = torch.randn(4000, 63, len(levels), generator=generator) * (0.5, 1.0, 1.5, 3.0, 8.0)[chunk]
        latents, codes = ops.fsq(z, levels)
        expected_values, expected_codes = theirs(z)
        assert codes.dtype == torch.int32
        assert torch.equal(codes, expected_codes.to(torch.int32))
        # the straight-through sum of the other side may be off the lattice by one rounding
        assert float((latents - expected_values).abs().max()) <= torch.finfo(torch.float32).eps
        assert torch.equal(bits(ops.codes_to_latents(codes, levels)), bits(latents))
        seen[codes.flatten().long()] = True
        counted += codes.numel()
    assert counted * len(LEVEL_SETS) >= 10**7
    assert bool(seen.all()), "the sample should reach every code"


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_codes_agree_within_ulps_of_every_rounding_edge(levels: tuple[int, ...]) -> None:
    z = near_the_edges(levels)
    latents, codes = ops.fsq(z, levels)
    expected_values, expected_codes = FSQ(levels=list(levels))(z)
    assert torch.equal(codes, expected_codes.to(torch.int32))
    assert float((latents - expected_values).abs().max()) <= torch.finfo(torch.float32).eps
    assert [len(latents[..., i].unique()) for i in range(len(levels))] == list(levels)


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_gradient_equals_that_of_vector_quantize_pytorch(levels: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(64, 64, len(levels), generator=generator) * 1.5
    weight = torch.randn(z.shape, generator=generator)

    def straight_through(z: Tensor, weight: Tensor) -> Tensor:
        half, _, shift, half_width = constants(levels, z.dtype)
        return weight * (1 - (z + shift).tanh().square()) * half / half_width

    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    (ops.fsq(ours, levels, backend="reference")[0] * weight).sum().backward()
    (FSQ(levels=list(levels))(theirs)[0] * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    # the same chain of roundings but for the last two, which come in another order
    assert torch.allclose(ours.grad, theirs.grad, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    shape = dict(working_dtype=torch.float32, factor=GRADIENT_FACTOR)
    assert_within_budget(ours.grad, straight_through, z, weight, name="dz", **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [*LEVEL_SETS, (2,), (2, 3), (2, 2, 5)], ids=str)
def test_every_code_survives_the_round_trip(levels: tuple[int, ...]) -> None:
    codes = torch.arange(math.prod(levels), dtype=torch.int32)
    values = ops.codes_to_latents(codes, levels)
    half, offset, shift, half_width = constants(levels, torch.float64)
    z = ((values.double() * half_width + offset) / half).clamp(-1, 1).atanh().clamp(-20, 20) - shift
    latents, again = ops.fsq(z.float().unsqueeze(0), levels)
    assert torch.equal(again[0], codes)
    assert torch.equal(bits(latents[0]), bits(values))
    assert float(values.min()) == -1.0
    assert len(values.unique(dim=0)) == len(codes)


def test_codes_follow_the_formula_digit_by_digit() -> None:
    # levels (3, 4): half (1.001, 1.5015), offsets (0, 0.5); q = (1, -2) and (-1, 1) by hand
    z = torch.tensor([[5.0, -5.0], [-5.0, 5.0], [0.0, 0.0]])
    latents, codes = ops.fsq(z, (3, 4))
    assert codes.tolist() == [2 + 3 * 0, 0 + 3 * 3, 1 + 3 * 2]
    assert latents.tolist() == [[1.0, -1.0], [-1.0, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_in_fp32(dtype: torch.dtype) -> None:
    z = (torch.randn(50, 16, 4, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    latents, codes = ops.fsq(z, (8, 5, 5, 5))
    exact, expected = ops.fsq(z.float(), (8, 5, 5, 5))
    assert latents.dtype == dtype
    assert torch.equal(codes, expected)
    assert torch.equal(latents, exact.to(dtype))


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], Tensor, Tensor]:
    """Inputs of any number of leading dimensions, odd, empty or strided, with every ``keep`` from 0 to K."""
    levels = draw(st.sampled_from([(8, 5, 5, 5), (4,), (3, 4), (7, 5, 5, 5, 5)]))
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    slots = draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = [*lead, slots, len(levels)]
    layout: str = draw(st.sampled_from(["plain", "transposed", "every other", "expanded"]))
    if layout == "transposed":
        z = torch.randn(shape[::-1], generator=generator).permute(*range(len(shape) - 1, -1, -1))
    elif layout == "every other":
        z = torch.randn([*shape[:-1], 2 * shape[-1]], generator=generator)[..., ::2]
    elif layout == "expanded":
        z = torch.randn([*lead, 1, len(levels)], generator=generator).expand(shape)
    else:
        z = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    keep = torch.randint(0, slots + 1, lead, generator=generator).to(kind)
    strided: bool = draw(st.booleans())
    if lead and strided:
        keep = torch.stack([keep, keep], dim=-1)[..., 0]  # strided
    null = torch.randn(2 * len(levels), generator=generator)[::2]
    return z, levels, keep, null


@settings(max_examples=150, deadline=None)
@given(blocks())
def test_prefix_and_null_fill_follow_the_rule_slot_by_slot(
    case: tuple[Tensor, tuple[int, ...], Tensor, Tensor],
) -> None:
    z, levels, keep, null = case
    latents, codes = ops.fsq(z, levels, keep, null)
    values, plain = ops.fsq(z.contiguous(), levels)
    assert torch.equal(codes, plain), "codes are complete, whatever is kept"
    assert latents.shape == z.shape
    kept = keep.reshape(-1)
    flat, full = (x.reshape(len(kept), *z.shape[-2:]) for x in (latents, values))
    for b in range(len(kept)):
        for i in range(z.shape[-2]):
            expected = full[b, i] if i < int(kept[b]) else null
            assert torch.equal(bits(flat[b, i]), bits(expected))
    assert torch.equal(bits(ops.codes_to_latents(codes, levels, keep, null)), bits(latents))


@settings(max_examples=100, deadline=None)
@given(blocks(), st.integers(0, 2**31))
def test_what_stands_beyond_keep_changes_no_bit(
    case: tuple[Tensor, tuple[int, ...], Tensor, Tensor], seed: int
) -> None:
    z, levels, keep, null = case
    generator = torch.Generator().manual_seed(seed)
    beyond = torch.arange(z.shape[-2]) >= keep.unsqueeze(-1)
    other = torch.where(beyond.unsqueeze(-1), torch.randn(z.shape, generator=generator), z)
    latents, codes = ops.fsq(z, levels, keep, null)
    assert torch.equal(bits(ops.fsq(other, levels, keep, null)[0]), bits(latents))
    noise = torch.randint(-(2**31), 2**31 - 1, codes.shape, generator=generator).to(torch.int32)
    changed = torch.where(beyond, noise, codes)
    assert torch.equal(bits(ops.codes_to_latents(changed, levels, keep, null)), bits(latents))


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_gradients_stop_at_the_prefix_and_null_collects_the_suffix(
    case: tuple[Tensor, tuple[int, ...], Tensor, Tensor],
) -> None:
    z, levels, keep, null = case
    z, null = z.clone().requires_grad_(), null.clone().requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (ops.fsq(z, levels, keep, null)[0] * weight).sum().backward()
    beyond = (torch.arange(z.shape[-2]) >= keep.unsqueeze(-1)).unsqueeze(-1)
    free = z.detach().clone().requires_grad_()
    (ops.fsq(free, levels)[0] * weight).sum().backward()
    assert z.grad is not None
    assert null.grad is not None
    assert free.grad is not None
    assert torch.equal(z.grad, torch.where(beyond, 0.0, free.grad))

    def suffix_sum(weight: Tensor) -> Tensor:
        return torch.where(beyond, weight, torch.zeros_like(weight)).flatten(0, -2).sum(0)

    assert_within_budget(
        null.grad, suffix_sum, weight, working_dtype=torch.float32, factor=GRADIENT_FACTOR, name="dnull"
    )


def test_null_gradient_is_the_slope_of_the_loss() -> None:
    levels, generator = (8, 5, 5, 5), torch.Generator().manual_seed(0)
    z, weight = (torch.randn(7, 11, 4, generator=generator) for _ in range(2))
    keep = torch.tensor([0, 1, 5, 10, 11, 3, 0])
    null = torch.randn(4, generator=generator).requires_grad_()

    def loss(null: Tensor) -> Tensor:
        return (ops.fsq(z, levels, keep, null)[0].double() * weight).sum()

    loss(null).backward()
    assert null.grad is not None
    for i in range(4):
        step = torch.zeros(4)
        step[i] = 0.25
        slope = float(loss(null.detach() + step) - loss(null.detach() - step)) / 0.5  # the loss is linear in null
        assert math.isclose(slope, float(null.grad[i]), rel_tol=1e-5, abs_tol=1e-5)


def test_null_gradient_is_summed_in_fp32_and_repeats_to_the_bit() -> None:
    # 4096 ones: a bf16 sum would stop at 256
    z = torch.zeros(64, 64, 4, dtype=torch.bfloat16)
    grads = []
    for _ in range(3):
        null = torch.zeros(4, requires_grad=True)
        ops.fsq(z, (8, 5, 5, 5), torch.zeros(64, dtype=torch.int64), null)[0].sum().backward()
        assert null.grad is not None
        grads.append(null.grad)
    assert grads[0].tolist() == [4096.0] * 4
    weight = torch.randn(64, 64, 4, generator=torch.Generator().manual_seed(2))
    repeats = []
    for _ in range(3):
        null = torch.zeros(4, requires_grad=True)
        keep = torch.arange(64) % 65
        (ops.fsq(z.float(), (8, 5, 5, 5), keep, null)[0] * weight).sum().backward()
        assert null.grad is not None
        repeats.append(bits(null.grad))
    assert torch.equal(repeats[0], repeats[1])
    assert torch.equal(repeats[0], repeats[2])


Z, KEEP, NULL = torch.zeros(3, 6, 4), torch.tensor([0, 3, 6]), torch.zeros(4)
L = (8, 5, 5, 5)
WRONG_FSQ = [
    (dict(z=Z.to(torch.int32)), r"^z: expected \[\.\.\.,K,4\] float32 or .*, got \[3,6,4\] int32 cpu$"),
    (dict(z=torch.zeros(3, 6, 5)), r"^z: expected .*, got \[3,6,5\] float32 cpu$"),
    (dict(z=torch.zeros(4)), r"^z: expected .*, got \[4\] float32 cpu$"),
    (dict(z=[1.0]), r"^z: expected .*, got list"),
    (dict(levels=(8, 5, 5, 1)), r"^levels: expected integers of at least 2, got \[8, 5, 5, 1\]$"),
    (dict(levels=()), r"^levels: expected integers"),
    (dict(levels=(8, 5, 5, 2.5)), r"^levels: expected integers"),
    (dict(levels=(2**16, 2**15)), r"^levels: expected a codebook below 2\^31"),
    (dict(keep=KEEP.float()), r"^keep: expected \[3\] int32 or int64 cpu, got \[3\] float32 cpu$"),
    (dict(keep=KEEP[:2]), r"^keep: expected \[3\] .*, got \[2\] int64 cpu$"),
    (dict(keep=torch.tensor([0, 3, 7])), r"^keep: expected 0\.\.6, got 0\.\.7$"),
    (dict(keep=torch.tensor([-1, 3, 6])), r"^keep: expected 0\.\.6, got -1\.\.6$"),
    (dict(keep=KEEP.to("meta")), r"^keep: expected \[3\] int32 or int64 cpu, got \[3\] int64 meta$"),
    (dict(null=None), r"^null: expected a null latent with keep, got None$"),
    (dict(null=torch.zeros(5)), r"^null: expected \[4\] .*, got \[5\] float32 cpu$"),
    (dict(null=torch.zeros(4, dtype=torch.int64)), r"^null: expected .*, got \[4\] int64 cpu$"),
    (dict(null=NULL.to("meta")), r"^null: expected .* cpu, got \[4\] float32 meta$"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_FSQ, ids=[s for _, s in WRONG_FSQ])
def test_fsq_says_in_one_sentence_what_is_wrong(change: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {"z": Z, "levels": L, "keep": KEEP, "null": NULL, **change}
    with pytest.raises(InputError, match=sentence) as caught:
        ops.fsq(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


CODES = torch.zeros(3, 6, dtype=torch.int32)
WRONG_CODES = [
    (dict(codes=CODES.float()), r"^codes: expected \[\.\.\.,K\] int32 or int64, got \[3,6\] float32 cpu$"),
    (dict(codes=torch.tensor(3)), r"^codes: expected .*, got \[\] int64 cpu$"),
    (dict(codes=CODES + 1000), r"^codes: expected 0\.\.999, got int 1000$"),
    (dict(codes=CODES - 1), r"^codes: expected 0\.\.999, got int -1$"),
    (dict(codes=CODES + 1000, keep=None), r"^codes: expected 0\.\.999, got int 1000$"),
    (dict(keep=torch.tensor([0, 3, 7])), r"^keep: expected 0\.\.6, got 0\.\.7$"),
    (dict(null=torch.zeros(3)), r"^null: expected \[4\]"),
    (dict(levels=(1, 5)), r"^levels: expected integers of at least 2, got \[1, 5\]$"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_CODES, ids=[s for _, s in WRONG_CODES])
def test_codes_to_latents_says_in_one_sentence_what_is_wrong(change: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {"codes": CODES, "levels": L, "keep": KEEP, "null": NULL, **change}
    with pytest.raises(InputError, match=sentence) as caught:
        ops.codes_to_latents(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BackendError, match="^backend: expected"):
        ops.fsq(Z, L, backend="cuda")
    with pytest.raises(BackendError, match="^backend: expected"):
        ops.codes_to_latents(CODES, L, backend="cuda")


def test_uniform_prefix_draws_every_length_equally() -> None:
    cfg = BottleneckConfig(slots=16)
    uniform = (torch.arange(1700, dtype=torch.float64) + 0.5) / 1700
    drawn = sample_prefix(cfg, uniform)
    assert drawn.dtype == torch.int64
    assert torch.bincount(drawn, minlength=17).tolist() == [100] * 17


def test_full_prefix_draws_nothing_but_k() -> None:
    uniform = torch.cat([torch.zeros(1), torch.rand(1000, generator=torch.Generator().manual_seed(0))])
    assert sample_prefix(BottleneckConfig(slots=16, prefix="full"), uniform).unique().tolist() == [16]


def test_weighted_prefix_draws_with_the_given_odds() -> None:
    cfg = BottleneckConfig(slots=4, prefix=(0.0, 1.0, 0.0, 2.0, 1.0))
    assert prefix_weights(cfg).tolist() == [0.0, 0.25, 0.0, 0.5, 0.25]
    uniform = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    assert torch.bincount(sample_prefix(cfg, uniform), minlength=5).tolist() == [0, 100, 0, 200, 100]


def test_bottleneck_null_lies_off_the_lattice_and_is_its_only_parameter() -> None:
    torch.manual_seed(0)
    bottleneck = Bottleneck(BottleneckConfig(levels=L, slots=6))
    assert [name for name, _ in bottleneck.named_parameters()] == ["null"]
    lattice = ops.codes_to_latents(torch.arange(1000), L)
    assert float((lattice - bottleneck.null.detach()).norm(dim=1).min()) > 1e-3
    z = torch.randn(3, 6, 4)
    kept = bottleneck(z, KEEP)
    assert torch.equal(kept.latents, bottleneck.lookup(kept.codes, KEEP))
    assert torch.equal(kept.latents[0], bottleneck.null.expand(6, 4))
