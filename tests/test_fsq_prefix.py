"""Retained prefix and null fill against plain statements of the rule, and how lengths are drawn."""

from __future__ import annotations

import math

import torch
from fsq_rule import KEEP, L, bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexlam_fast import ops
from flexlam_fast.bottleneck import Bottleneck, prefix_weights, sample_prefix
from flexlam_fast.config import BottleneckConfig
from flexlam_fast.testing import GRADIENT_FACTOR, assert_within_budget


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
