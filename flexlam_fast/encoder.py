"""Encoder: a transition of two frames becomes K slot outputs (paper Table 6, design section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexlam_fast.backend import REFERENCE
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.layers import MLP, Attention, Linear, init_linear, patchify, product_dtype, sincos_grid
from flexlam_fast.ops.encode import TransformerEngine
from flexlam_fast.ops.modulate import layer_norm
from flexlam_fast.ops.patches import tubelets

CHANGE_GAIN = 4.0  # frames change by about a quarter of their own spread (0.1 against 0.45 rms in ViZDoom)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    backend = REFERENCE

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, W]`` to ``[B, N, W]``."""
        x = x + self.attention(self._normed(x, self.norm1))
        out: Tensor = x + self.mlp(self._normed(x, self.norm2))
        return out

    def _normed(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        weights = norm.weight, norm.bias
        return layer_norm(x, *weights, eps=norm.eps, dtype=product_dtype(x), backend=self.backend)

    def tensors(self) -> list[Tensor]:
        """Weight and bias of every part, in order; aliases, which stay where a parameter's data is now."""
        attention, mlp = self.attention, self.mlp
        parts = self.norm1, attention.qkv, attention.out, self.norm2, mlp.up, mlp.down
        return [t.detach() for part in parts for t in (part.weight, part.bias)]


class Encoder(nn.Module):
    """ViT over the tubelet patches of ``(o_t, o_{t+1})`` and ``K`` learned slot queries.

    A tubelet patch is the same square of both frames, given as ``o_t`` and the change to ``o_{t+1}``: the same linear
    maps as of the two frames, but the change, which the code is about, starts as loud as the scene, which it is not
    about. Only the slot outputs leave the module, through one linear to the ``d`` channels of FSQ.
    """

    backend = REFERENCE

    def __init__(self, cfg: FlexLAMConfig) -> None:
        super().__init__()
        enc = cfg.encoder
        self.patch = enc.patch
        self.slots, self.heads = cfg.bottleneck.slots, enc.heads
        self.embed = Linear(enc.tubelet * cfg.channels * enc.patch**2, enc.width)
        self.position = nn.Parameter(sincos_grid(cfg.frame // enc.patch, enc.width).to(torch.get_default_dtype()))
        self.queries = nn.Parameter(torch.randn(self.slots, enc.width) * 0.5)
        self.blocks = nn.ModuleList(EncoderBlock(enc.width, enc.heads, enc.mlp_ratio) for _ in range(enc.depth))
        self.norm = nn.LayerNorm(enc.width)
        self.project = nn.Linear(enc.width, cfg.bottleneck.dim)
        self.apply(init_linear)

    def forward(self, now: Tensor, following: Tensor) -> Tensor:
        """Pixels ``o_t``, ``o_{t+1}`` ``[B, C, H, W]`` in ``[-1, 1]`` to slot outputs ``[B, K, d]`` before FSQ."""
        return self.finish(self.tokens(now, following))

    def finish(self, x: Tensor) -> Tensor:
        """:meth:`tokens` to slot outputs."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.project(self.norm(x[:, : self.slots]))
        return out

    def tokens(self, now: Tensor, following: Tensor) -> Tensor:
        """The slot queries and the embedded tubelets ``[B, K + N, W]``."""
        tubelets = torch.cat([patchify(now, self.patch), CHANGE_GAIN * patchify(following - now, self.patch)], dim=-1)
        return self.embedded(tubelets)

    def forward_frames(self, now: Tensor, following: Tensor) -> Tensor:
        """:meth:`forward` of uint8 frames ``[B, H, W, C]``."""
        dtype = product_dtype(self.embed.weight)
        return self.finish(
            self.embedded(tubelets(now, following, self.patch, CHANGE_GAIN, dtype=dtype, backend=self.backend))
        )

    def embedded(self, tubelets: Tensor) -> Tensor:
        """Tubelet patches ``[B, N, 2 C p p]`` to tokens."""
        x = self.embed(tubelets.to(product_dtype(self.embed.weight))) + self.position
        return torch.cat([self.queries.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)


class NativeEncoder:
    """``encoder`` with its blocks in one call of C++ where that takes them: bf16 on a CPU with matrix tiles."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._engine: TransformerEngine | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy makes an engine of its own encoder when it first runs."""
        return type(self), (self.encoder,)

    def __call__(self, now: Tensor, following: Tensor) -> Tensor:
        """As :class:`Encoder`."""
        encoder = self.encoder
        engine = self._ready()
        if engine is None:
            out: Tensor = encoder(now, following)
            return out
        x = encoder.tokens(now, following)
        if not engine.takes(x.shape[1]):
            return encoder.finish(x)
        kept: Tensor = encoder.project(engine.run(x, encoder.slots))
        return kept

    def _ready(self) -> TransformerEngine | None:
        """The engine of the weights as they stand."""
        encoder = self.encoder
        if encoder.norm.weight.dtype != torch.bfloat16 or encoder.norm.weight.device.type != "cpu":
            return None
        layers = [block.tensors() for block in encoder.blocks if isinstance(block, EncoderBlock)]
        ends = [encoder.norm.weight.detach(), encoder.norm.bias.detach()]
        if self._engine is None or not self._engine.reads([t for layer in layers for t in layer] + ends):
            self._engine = TransformerEngine(layers, ends, encoder.heads, encoder.norm.eps)
        return self._engine
