"""Shared modules and rearrangements against plain statements of what they mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flexlam_fast.errors import InputError
from flexlam_fast.layers import (
    MLP,
    Attention,
    as_pixels,
    init_linear,
    normalise,
    patchify,
    sincos_grid,
    time_features,
    to_uint8,
    unpatchify,
)


def test_every_byte_survives_the_trip_to_pixels_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    pixels = normalise(frames)
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0
    assert pixels[0, 0, 0, 3] == torch.tensor(3 / 127.5 - 1.0)
    assert torch.equal(to_uint8(pixels), frames)


def test_pixels_out_of_range_are_clamped() -> None:
    pixels = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5)
    assert to_uint8(pixels).flatten().tolist() == [0, 0, 128, 255, 255]


def test_patches_go_row_by_row_with_channels_first() -> None:
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 9, 12)
    for row in range(3):
        for column in range(3):
            square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[:, 3 * row + column], square.flatten(1))
    assert torch.equal(unpatchify(patches, 2, 3, 6), x)


def test_as_pixels_takes_bytes_or_floats() -> None:
    frames = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = as_pixels("o_t", frames, 8, 3)
    assert torch.equal(pixels, normalise(frames))
    assert as_pixels("o_t", pixels, 8, 3) is pixels


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (
            torch.zeros(2, 8, 9, 3, dtype=torch.uint8),
            r"^o_t: expected \[B,8,8,3\] uint8 .*, got \[2,8,9,3\] uint8 cpu$",
        ),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"^o_t: expected .*, got \[8,8,3\] uint8 cpu$"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int64), r"^o_t: expected .*, got \[2,8,8,3\] int64 cpu$"),
        (torch.zeros(2, 8, 8, 3), r"^o_t: expected \[B,3,8,8\] .*, got \[2,8,8,3\] float32 cpu$"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), r"^o_t: expected .*, got \[2,3,8,8\] float64 cpu$"),
        (torch.full((2, 3, 8, 8), torch.nan), r"^o_t: expected finite values, got 384 NaN or infinite of 384$"),
        (torch.full((2, 3, 8, 8), torch.inf), r"^o_t: expected finite values, got 384 NaN or infinite of 384$"),
        ([[0]], r"^o_t: expected .*, got list"),
    ],
)
def test_as_pixels_refuses_the_rest_in_one_sentence(frames: torch.Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        as_pixels("o_t", frames, 8, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("side", "width"), [(8, 192), (16, 128), (3, 10), (1, 4)])
def test_every_place_of_the_grid_is_told_apart(side: int, width: int) -> None:
    grid = sincos_grid(side, width)
    assert grid.shape == (side * side, width)
    assert len(grid.unique(dim=0)) == side * side
    quarter = width // 4
    column = torch.arange(side).repeat(side)
    assert torch.equal(grid[:, 2 * quarter], column.double().sin().float())
    assert torch.equal(grid[:, 0], torch.arange(side).repeat_interleave(side).double().sin().float())


def test_attention_is_softmax_of_scaled_scores_per_head() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, 5).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    parts = (x @ layer.qkv.weight.T + layer.qkv.bias).view(2, 7, 3, 3, 5)
    heads = []
    for h in range(3):
        q, k, v = parts[:, :, 0, h], parts[:, :, 1, h], parts[:, :, 2, h]
        heads.append((q @ k.transpose(1, 2) / math.sqrt(5)).softmax(-1) @ v)
    expected = torch.cat(heads, dim=-1) @ layer.out.weight.T + layer.out.bias
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_mlp_is_two_linears_around_a_gelu() -> None:
    torch.manual_seed(0)
    layer = MLP(6, 10).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    h = x @ layer.up.weight.T + layer.up.bias
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert torch.allclose(layer(x), gelu @ layer.down.weight.T + layer.down.bias, rtol=1e-12, atol=1e-12)


def test_flow_times_are_told_apart() -> None:
    features = time_features(torch.linspace(0, 1, 101), 64)
    assert features.shape == (101, 64)
    assert torch.equal(features[0], torch.tensor([1.0] * 32 + [0.0] * 32))
    distance = torch.cdist(features, features) + torch.eye(101) * 9
    assert float(distance.min()) > 0.1


def test_init_linear_starts_biases_at_zero_and_leaves_other_modules_alone() -> None:
    torch.manual_seed(0)
    layer, norm = nn.Linear(100, 100), nn.LayerNorm(3)
    nn.Sequential(layer, norm).apply(init_linear)
    assert not layer.bias.any()
    bound = math.sqrt(6 / 200)
    assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert norm.weight.tolist() == [1.0, 1.0, 1.0]
