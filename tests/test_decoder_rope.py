"""Rotary positions of the decoder's patches, and latents in its adaLN: what they mean, and what they leave alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small import small_config

from flexlam_fast.backend import AUTO, REFERENCE
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import ConfigError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.layers import Attention, grid_angles, rotate, set_backend

CPU = torch.device("cpu")
CFG = dataclasses.replace(
    small_config(), decoder=dataclasses.replace(small_config().decoder, patch=4, rope=True, latents_in_adaln=True)
)


def made(cfg: FlexLAMConfig = CFG, dtype: torch.dtype = torch.float32) -> LatentActionModel:
    torch.manual_seed(0)
    lam = LatentActionModel(cfg, "reference")
    for parameter in lam.decoder.parameters():  # adaLN-zero hides everything else
        torch.nn.init.normal_(parameter, std=0.2)
    return lam.to(dtype)


def arguments() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, 5, 16, 16, 3), generator=g, dtype=torch.uint8)
    keep, noise, tau = torch.tensor([0, 1, 2, 3, 4]), torch.randn(5, 768, generator=g), torch.rand(5, generator=g)
    return *frames, keep, noise, tau


def test_scores_depend_on_how_far_two_patches_are_apart_and_on_nothing_else() -> None:
    """One query and one key everywhere: a table of scores by place, the same along every diagonal of the grid."""
    side, g = 5, torch.Generator().manual_seed(0)
    angles = grid_angles(side, 0, 16)
    q, k = (rotate(torch.randn(16, generator=g).expand(1, side * side, 1, 16), angles)[0, :, 0] for _ in range(2))
    scores = (q @ k.T).view(side, side, side, side)
    for row, column in ((1, 0), (0, 1), (-2, 3)):
        far = [
            float(scores[r, c, r + row, c + column])
            for r in range(side)
            for c in range(side)
            if 0 <= r + row < side and 0 <= c + column < side
        ]
        assert len(far) > 1
        assert max(far) - min(far) < 1e-5
    assert abs(float(scores[0, 0, 0, 1] - scores[0, 0, 1, 0])) > 1e-3, "rows are not columns"


def test_tokens_that_are_no_patch_are_not_turned_and_lengths_stay() -> None:
    angles, x = grid_angles(4, 3, 16), torch.randn(2, 19, 2, 16)
    turned = rotate(x, angles)
    assert torch.equal(turned[:, 16:], x[:, 16:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert float((turned[:, 1:16] - x[:, 1:16]).abs().max()) > 0.1
    assert float(grid_angles(8, 0, 32).max()) == pytest.approx(7 * torch.pi / 2)


def test_angles_stay_fp32_wherever_the_weights_go() -> None:
    layer = Attention(32, 2, 16, grid_angles(4, 3, 16))
    for moved in (layer.to(torch.bfloat16), layer.half(), layer.float(), layer.to("meta")):
        assert moved.angles is not None
        assert moved.angles.dtype == torch.float32
    assert layer.angles is not None
    assert layer.angles.is_meta
    assert "angles" not in layer.state_dict()


@pytest.mark.parametrize("backend", [REFERENCE, AUTO])
def test_the_loss_of_stored_frames_is_that_of_pixels(backend: str) -> None:
    lam, (now, following, keep, noise, tau) = made(), arguments()
    pixels = (lam.pixels("f", frames) for frames in (now, following))
    expected = lam.loss(*pixels, keep, noise.view(5, 3, 16, 16), tau)
    set_backend(lam, backend, CPU)
    found = lam.loss_of_frames(now, following, keep, noise, tau)
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=1e-6)
    found.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in lam.parameters())


def test_the_decoder_in_half_precision_is_within_the_budget() -> None:
    lam = made()
    g = torch.Generator().manual_seed(2)
    args = torch.randn(2, 16, 96, generator=g), torch.rand(2, generator=g), torch.randn(2, 4, 2, generator=g)
    double = made(dtype=torch.float64).decoder.forward_patches(*(t.double() for t in args)).detach()
    ours = lam.decoder.to(torch.bfloat16).forward_patches(args[0].bfloat16(), *args[1:]).detach()
    assert float((ours.double() - double).abs().max()) < 0.05 * float(double.abs().max())


def test_codes_beyond_the_budget_change_not_a_bit() -> None:
    lam, (now, following, *_) = made(), arguments()
    codes = lam.encode(now, following)
    other = codes.clone()
    other[:, 2:] = (other[:, 2:] + 7) % 20
    pictures = [lam.decode(now, lam.latents(c, 2), generator=torch.Generator().manual_seed(0)) for c in (codes, other)]
    assert torch.equal(*pictures)


def test_latents_reach_every_layer_by_its_condition_too() -> None:
    """With the latents' tokens silenced, only the condition can say what was done."""
    lam, (now, *_) = made(), arguments()
    torch.nn.init.zeros_(lam.decoder.latent.weight)
    g = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 5, 4, 2, generator=g)
    noise, tau, pixels = torch.zeros(5, 3, 16, 16), torch.full((5,), 0.1), lam.pixels("f", now)
    velocities = [lam.velocity(noise, tau, pixels, z).detach() for z in latents]
    assert float((velocities[0] - velocities[1]).abs().max()) > 1e-3


def test_both_are_off_in_the_papers_sizes_and_an_older_file_has_neither(tmp_path: Path) -> None:
    assert not FlexLAMConfig.preset("dmlab").decoder.rope
    assert not FlexLAMConfig.preset("dmlab").decoder.latents_in_adaln
    text = small_config().to_json().replace(',\n    "rope": false', "").replace(',\n    "latents_in_adaln": false', "")
    assert '"rope"' not in text
    assert FlexLAMConfig.from_json(text) == small_config()
    with pytest.raises(ConfigError, match=r"^decoder\.rope: expected true or false, got 1$"):
        dataclasses.replace(CFG.decoder, rope=1)
    with pytest.raises(ConfigError, match=r"^decoder: expected a head_dim of whole 4s with rope, got 18$"):
        dataclasses.replace(CFG.decoder, head_dim=18)
    made().save_pretrained(tmp_path / "lam")
    again = LatentActionModel.from_pretrained(tmp_path / "lam")
    assert again.decoder.blocks[0].get_submodule("attention").angles is not None  # type: ignore[union-attr]
