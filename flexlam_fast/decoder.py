"""Decoder: a DiT that turns noise, the present frame and latents into the next frame (paper Table 6, A.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlam_fast.backend import REFERENCE
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.layers import (
    MLP,
    Attention,
    Linear,
    grid_angles,
    init_linear,
    patchify,
    product_dtype,
    sincos_grid,
    time_features,
    unpatchify,
)
from flexlam_fast.ops.modulate import adaln, gate_add


class DecoderBlock(nn.Module):
    """Transformer block under adaLN-zero: shift, scale and gate of both halves come from the condition."""

    backend = REFERENCE

    def __init__(self, width: int, heads: int, head_dim: int, ffn: int, angles: Tensor | None = None) -> None:
        super().__init__()
        self.attention = Attention(width, heads, head_dim, angles)
        self.mlp = MLP(width, ffn)
        self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens ``[B, N, W]`` and the condition ``[B, W]``, the embedded flow time, to tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(time).chunk(6, dim=-1)
        dtype, backend = product_dtype(x), self.backend
        y = self.attention(adaln(x, shift1, scale1, dtype=dtype, backend=backend))
        x = gate_add(x, y, gate1, backend=backend)
        y = self.mlp(adaln(x, shift2, scale2, dtype=dtype, backend=backend))
        return gate_add(x, y, gate2, backend=backend)


class Decoder(nn.Module):
    """DiT over the patches of ``[x_tau, o_t]`` (channels concatenated) and the K projected latents.

    The concatenation is the paper's image-conditioning path. The latents are plain tokens: a slot that holds the null
    latent is the only sign that it was not retained.
    """

    backend = REFERENCE

    def __init__(self, cfg: FlexLAMConfig) -> None:
        super().__init__()
        dec = cfg.decoder
        self.patch, self.channels, self.size = dec.patch, cfg.channels, cfg.frame
        self.embed = Linear(2 * cfg.channels * dec.patch**2, dec.width)
        self.position = nn.Parameter(sincos_grid(cfg.frame // dec.patch, dec.width).to(torch.get_default_dtype()))
        self.latent = nn.Linear(cfg.bottleneck.dim, dec.width)
        self.slot = nn.Parameter(torch.randn(cfg.bottleneck.slots, dec.width) * 0.5)
        self.time = nn.Sequential(nn.Linear(dec.width, dec.width), nn.SiLU(), nn.Linear(dec.width, dec.width))
        slots, numbers = cfg.bottleneck.slots, cfg.bottleneck.slots * cfg.bottleneck.dim
        self.latent_condition = nn.Linear(numbers, dec.width, bias=False) if dec.latents_in_adaln else None
        angles = grid_angles(cfg.frame // dec.patch, slots, dec.head_dim) if dec.rope else None
        sizes = dec.width, dec.heads, dec.head_dim, dec.ffn
        self.blocks = nn.ModuleList(DecoderBlock(*sizes, angles) for _ in range(dec.depth))
        self.condition = nn.Linear(dec.width, 2 * dec.width)
        self.head = Linear(dec.width, cfg.channels * dec.patch**2)
        self.apply(init_linear)
        # Xavier would let d = 4 inputs whisper beside the slot embeddings; codes would collapse before they are heard
        nn.init.normal_(self.latent.weight, std=cfg.bottleneck.dim**-0.5)
        if self.latent_condition is not None:
            nn.init.normal_(self.latent_condition.weight, std=0.5 * cfg.bottleneck.dim**-0.5)
        for layer in [self.condition, self.head, *(block.get_submodule("condition") for block in self.blocks)]:
            nn.init.zeros_(layer.get_parameter("weight"))  # adaLN-zero: every block starts as the identity

    def forward(self, x: Tensor, tau: Tensor, now: Tensor, latents: Tensor) -> Tensor:
        """Velocity fp32 at ``x``, time ``tau [B]``, given ``o_t`` (all ``[B, C, H, W]``) and latents ``[B, K, d]``."""
        patches = patchify(torch.cat([x, now], dim=1), self.patch)
        return unpatchify(self.forward_patches(patches, tau, latents).float(), self.patch, self.channels, self.size)

    def forward_patches(self, patches: Tensor, tau: Tensor, latents: Tensor) -> Tensor:
        """What :meth:`forward` makes of patches ``[B, N, 2 C p p]`` of ``[x, o_t]``, as patches ``[B, N, C p p]``."""
        dtype = self.embed.weight.dtype
        patches = patches.to(product_dtype(self.embed.weight))
        tokens = self.embed(patches) + self.position
        tokens = torch.cat([tokens, self.latent(latents.to(dtype)) + self.slot], dim=1)
        time = self.time(time_features(tau, self.slot.shape[1]).to(dtype))
        if self.latent_condition is not None:
            time = time + self.latent_condition(latents.to(dtype).flatten(1))
        time = F.silu(time)
        for block in self.blocks:
            tokens = block(tokens, time)
        shift, scale = self.condition(time).chunk(2, dim=-1)
        tokens = tokens[:, : patches.shape[1]]
        out: Tensor = self.head(adaln(tokens, shift, scale, dtype=product_dtype(tokens), backend=self.backend))
        return out
