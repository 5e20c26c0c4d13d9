"""Latent action model: encoder, bottleneck and decoder, and what the retained prefix promises downstream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from flexlam_fast.bottleneck import sample_prefix
from flexlam_fast.config import BottleneckConfig, DecoderConfig, EncoderConfig, FlexLAMConfig
from flexlam_fast.errors import BudgetError, FlexLAMError, InputError
from flexlam_fast.flow import velocity_of
from flexlam_fast.lam import LatentActionModel, spread_loss

SLOTS = 6


def small(predict: str = "velocity", prefix: str = "uniform") -> FlexLAMConfig:
    return dataclasses.replace(
        FlexLAMConfig.preset("tiny"),
        frame=16,
        bottleneck=BottleneckConfig(levels=(8, 5, 5, 5), slots=SLOTS, prefix=prefix),
        encoder=EncoderConfig(depth=2, width=32, heads=2, mlp_ratio=2, patch=4),
        decoder=DecoderConfig(depth=2, heads=2, head_dim=16, ffn=48, patch=4, steps=3, predict=predict),
    )


def build(predict: str = "velocity", prefix: str = "uniform") -> LatentActionModel:
    """A model whose zero-initialised layers are off zero, so that everything reaches the output."""
    torch.manual_seed(0)
    lam = LatentActionModel(small(predict, prefix)).eval()
    for p in lam.decoder.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.1)
    return lam


def frames(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def noise_like(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 16, 16, generator=generator), torch.rand(batch, generator=generator)


def test_codes_are_complete_blocks_and_depend_on_both_frames() -> None:
    lam, a, b = build(), frames(4), frames(4, 1)
    codes = lam.encode(a, b)
    assert codes.shape == (4, SLOTS)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 1000
    assert not torch.equal(lam.encode(b, b), codes)
    assert not torch.equal(lam.encode(a, a), codes)
    assert not torch.equal(lam.encode(b, a), codes)
    assert torch.equal(lam.encode(lam.pixels("a", a), lam.pixels("b", b)), codes)


def test_slots_are_told_apart_by_their_queries() -> None:
    lam = build()
    z = lam.encoder(lam.pixels("a", frames(2)), lam.pixels("b", frames(2, 1))).detach()
    assert z.shape == (2, SLOTS, 4)
    assert float(torch.cdist(z, z).add(torch.eye(SLOTS)).min()) > 1e-3


def test_adaln_zero_starts_every_block_as_the_identity() -> None:
    torch.manual_seed(0)
    lam = LatentActionModel(small())
    x, tau = noise_like(2)
    tokens = torch.randn(2, 5, 32)
    for block in lam.decoder.blocks:
        assert torch.equal(block(tokens, torch.randn(2, 32)), tokens)
    assert not lam.velocity(x, tau, x, torch.zeros(2, SLOTS, 4)).any()


def test_frame_prediction_is_a_change_of_the_present_frame() -> None:
    torch.manual_seed(0)
    lam = LatentActionModel(small("frame"))
    x, tau = noise_like(2)
    now = lam.pixels("o_t", frames(2))
    out = lam.velocity(x, tau, now, torch.zeros(2, SLOTS, 4))
    assert torch.equal(out, velocity_of(now, x, tau)), "untrained, it predicts the present frame"
    # so the untrained sampler copies o_t
    assert torch.equal(lam.decode(frames(2), torch.zeros(2, SLOTS, 4)), frames(2))


@pytest.mark.parametrize("predict", ["velocity", "frame"])
def test_the_decoder_uses_all_it_is_given(predict: str) -> None:
    lam = build(predict)
    x, tau = noise_like(1)
    now, latents = lam.pixels("o_t", frames(1)), torch.zeros(1, SLOTS, 4)
    base = lam.velocity(x, tau, now, latents)
    assert base.shape == x.shape
    assert not torch.equal(lam.velocity(x, 1 - tau, now, latents), base)
    assert not torch.equal(lam.velocity(x, tau, -now, latents), base)
    assert not torch.equal(lam.velocity(-x, tau, now, latents), base)
    outputs = [base]
    for slot in range(SLOTS):
        changed = latents.clone()
        changed[0, slot, 2] = 1.0
        outputs.append(lam.velocity(x, tau, now, changed))
    flat = torch.stack(outputs).flatten(1)
    assert float(torch.cdist(flat, flat).detach().add(torch.eye(SLOTS + 1) * 9).min()) > 1e-4, "slots are told apart"


def test_decode_repeats_with_the_same_generator_and_takes_steps() -> None:
    lam, now = build(), frames(2)
    latents = lam.latents(lam.encode(now, frames(2, 1)), 3)

    def sample(seed: int, steps: int | None = None) -> Tensor:
        return lam.decode(now, latents, steps, torch.Generator().manual_seed(seed))

    first = sample(0)
    assert first.shape == now.shape
    assert first.dtype == torch.uint8
    assert torch.equal(sample(0), first)
    assert torch.equal(sample(0, 3), first), "the configuration's steps are the default"
    assert not torch.equal(sample(1), first)
    assert not torch.equal(sample(0, 9), first)


@pytest.mark.parametrize("k", range(SLOTS + 1))
@pytest.mark.parametrize("predict", ["velocity", "frame"])
def test_slots_beyond_the_budget_change_no_bit_of_the_frame(k: int, predict: str) -> None:
    lam, now = build(predict), frames(3)
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 1000, (3, SLOTS), generator=generator)
    x, tau = noise_like(3)
    latents = lam.latents(codes, k)
    velocity = lam.velocity(x, tau, lam.pixels("o_t", now), latents)
    image = lam.decode(now, latents, 2, torch.Generator().manual_seed(9))
    for _ in range(5):
        codes[:, k:] = torch.randint(-(2**40), 2**40, (3, SLOTS - k), generator=generator)
        changed = lam.latents(codes, k)
        assert torch.equal(changed.view(torch.int32), latents.view(torch.int32))
        assert torch.equal(lam.velocity(x, tau, lam.pixels("o_t", now), changed), velocity)
        assert torch.equal(lam.decode(now, changed, 2, torch.Generator().manual_seed(9)), image)


def test_latents_take_a_short_prefix_or_one_budget_per_example() -> None:
    lam = build()
    codes = lam.encode(frames(4), frames(4, 1))
    for k in range(SLOTS + 1):
        full = lam.latents(codes, k)
        assert torch.equal(lam.latents(codes[:, :k], k), full)
        assert torch.equal(full[:, k:], lam.bottleneck.null.expand(4, SLOTS - k, 4))
        assert torch.equal(lam.latents(codes, np.int64(k)), full)  # type: ignore[arg-type]
    keep = torch.tensor([0, 2, 5, 6])
    mixed = lam.latents(codes, keep)
    for i, k in enumerate(keep.tolist()):
        assert torch.equal(mixed[i], lam.latents(codes, k)[i])


@pytest.mark.parametrize("predict", ["velocity", "frame"])
def test_full_prefix_is_fixed_k_to_the_bit(predict: str) -> None:
    """Loss and gradients of ``prefix="full"`` are those of a model that has no prefix at all."""
    lam, batch = build(predict, prefix="full"), 8
    now, following = lam.pixels("o_t", frames(batch)), lam.pixels("o_next", frames(batch, 1))
    noise, tau = noise_like(batch)
    drawn = sample_prefix(lam.cfg.bottleneck, torch.rand(batch, generator=torch.Generator().manual_seed(0)))
    assert drawn.tolist() == [SLOTS] * batch
    full = lam.loss(now, following, drawn, noise, tau)
    full.loss.backward()
    gradients = {name: p.grad.clone() for name, p in lam.named_parameters() if p.grad is not None}
    assert not gradients.pop("bottleneck.null").any(), "no slot is ever null"

    lam.zero_grad()
    quantized = lam.bottleneck(lam.encoder(now, following))  # no prefix, no null
    t = tau.view(-1, 1, 1, 1)
    velocity = lam.velocity((1 - t) * noise + t * following, tau, now, quantized.latents)
    plain = (velocity - (following - noise)).square().mean()
    plain.backward()
    assert torch.equal(plain, full.loss)
    for name, p in lam.named_parameters():
        if name in gradients:
            assert torch.equal(p.grad, gradients[name]), name  # type: ignore[arg-type]
    assert len(gradients) == len(list(lam.parameters())) - 1


def test_the_loss_tells_its_parts_and_reaches_every_parameter() -> None:
    lam, batch = build(), 7
    now, following = lam.pixels("o_t", frames(batch)), lam.pixels("o_next", frames(batch, 1))
    keep = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    out = lam.loss(now, following, keep, *noise_like(batch))
    assert torch.equal(out.loss, out.flow), "no other term unless asked for"
    assert torch.equal(out.codes, lam.encode(now, following))
    out.loss.backward()
    for name, p in lam.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.any()), name


def test_a_smaller_prefix_hides_the_transition() -> None:
    lam, batch = build(), 4
    now = lam.pixels("o_t", frames(batch))
    one, other = lam.pixels("a", frames(batch, 1)), lam.pixels("b", frames(batch, 2))
    x, tau = noise_like(batch)
    for k, same in ((0, True), (SLOTS, False)):
        keep = torch.full((batch,), k)
        a, b = (lam.bottleneck(lam.encoder(now, following), keep).latents for following in (one, other))
        assert torch.equal(lam.velocity(x, tau, now, a), lam.velocity(x, tau, now, b)) is same


def test_half_precision_weights_take_the_same_frames() -> None:
    lam = build()
    lam.encoder.to(torch.bfloat16)
    lam.decoder.to(torch.bfloat16)
    codes = lam.encode(frames(2), frames(2, 1))
    assert codes.dtype == torch.int32
    assert lam.decode(frames(2), lam.latents(codes, 3)).dtype == torch.uint8


CODES = torch.zeros(2, SLOTS, dtype=torch.int32)
NAN = torch.full((2, 3, 16, 16), torch.nan)


def a_keep(*lengths: int) -> Tensor:
    return torch.tensor(lengths)


WRONG: list[tuple[Callable[[LatentActionModel], object], type[FlexLAMError], str]] = [
    (
        lambda m: m.encode(NAN, frames(2)),
        InputError,
        r"^o_t: expected finite values, got 1536 NaN or infinite of 1536$",
    ),
    (lambda m: m.encode(frames(2), NAN), InputError, r"^o_next: expected finite values, got 1536 NaN"),
    (lambda m: m.encode(frames(2)[:, :8], frames(2)), InputError, r"^o_t: expected \[B,16,16,3\] .*, got \[2,8,16,3\]"),
    (lambda m: m.encode(frames(2), frames(3)), InputError, r"^o_next.*: expected \[2,3,16,16\] .*, got \[3,3,16,16\]"),
    (lambda m: m.encode(frames(2), frames(2).long()), InputError, r"^o_next: expected .* got \[2,16,16,3\] int64 cpu$"),
    (lambda m: m.latents(CODES, -1), BudgetError, r"^k: expected an integer in 0\.\.6, got -1$"),
    (lambda m: m.latents(CODES, 7), BudgetError, r"^k: expected an integer in 0\.\.6, got 7$"),
    (lambda m: m.latents(CODES[:, :3], 4), BudgetError, r"^k: expected an integer in 0\.\.3, got 4$"),
    (lambda m: m.latents(CODES, True), BudgetError, r"^k: expected an integer in 0\.\.6, got True$"),
    (lambda m: m.latents(CODES, 2.0), BudgetError, r"^k: expected an integer in 0\.\.6, got 2\.0$"),  # type: ignore[arg-type]
    (lambda m: m.latents(CODES, a_keep(1, 7)), InputError, r"^keep: expected 0\.\.6, got 1\.\.7$"),
    (lambda m: m.latents(CODES[:, :3], a_keep(1, 4)), InputError, r"^keep: expected 0\.\.3, got 1\.\.4$"),
    (lambda m: m.latents(CODES, a_keep(1, 2, 3)), InputError, r"^keep: expected \[2\] .*, got \[3\] int64 cpu$"),
    (lambda m: m.latents(CODES + 1000, 3), InputError, r"^codes: expected 0\.\.999, got int 1000$"),
    (lambda m: m.latents(CODES.float(), 3), InputError, r"^codes: expected \[B,n\] .*, got \[2,6\] float32 cpu$"),
    (
        lambda m: m.latents(CODES.repeat(1, 2), 3),
        InputError,
        r"^codes: expected at most 6 per block, got \[2,12\] int32",
    ),
    (lambda m: m.decode(NAN, m.latents(CODES, 1)), InputError, r"^o_t: expected finite values, got 1536 NaN"),
    (lambda m: m.decode(frames(3), m.latents(CODES, 1)), InputError, r"^latents: expected \[3,6,4\] .*, got \[2,6,4\]"),
    (lambda m: m.decode(frames(2), m.latents(CODES, 1)[:, :5]), InputError, r"^latents: expected .* got \[2,5,4\]"),
    (lambda m: m.decode(frames(2), m.latents(CODES, 1), steps=0), BudgetError, r"^steps: expected an integer in 1\.\."),
]


@pytest.mark.parametrize(("call", "kind", "sentence"), WRONG, ids=[s for _, _, s in WRONG])
def test_what_is_wrong_is_said_in_one_sentence(
    call: Callable[[LatentActionModel], object], kind: type[FlexLAMError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        call(build())
    assert "\n" not in str(caught.value)


def test_spread_asks_every_channel_to_vary_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 2, 2, generator=generator) * torch.tensor([[2.0, 0.5], [1.5, 0.0]])
    # channels of deviation 2 and 1.5 are wide enough, those of 0.5 and 0 fall short by 0.5 and 1
    assert abs(float(spread_loss(z)) - (0.5 + 1.0) / 4) < 0.01
    lam = build()
    lam.cfg = dataclasses.replace(lam.cfg, bottleneck=dataclasses.replace(lam.cfg.bottleneck, spread=0.3))
    now, following = lam.pixels("o_t", frames(4)), lam.pixels("o_next", frames(4, 1))
    out = lam.loss(now, following, torch.tensor([0, 2, 4, 6]), *noise_like(4))
    assert torch.equal(out.loss, out.flow + 0.3 * spread_loss(lam.encoder(now, following)))
