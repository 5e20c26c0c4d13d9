"""Sequence model: a Qwen3-style causal transformer that predicts code blocks (paper B.4, Table 8; design section 2)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlam_fast.ambient import isolated
from flexlam_fast.backend import AUTO, REFERENCE
from flexlam_fast.checks import check_budget, check_tensor
from flexlam_fast.config import FlexLAMConfig, SequenceConfig, check_config
from flexlam_fast.errors import InputError
from flexlam_fast.layers import Linear, patchify, product_dtype
from flexlam_fast.ops.activation import swiglu
from flexlam_fast.ops.frequencies import rope_frequencies
from flexlam_fast.ops.linear import rms_norm as plain_rms_norm
from flexlam_fast.ops.patches import frame_patches
from flexlam_fast.ops.rms_norm import rms_norm
from flexlam_fast.ops.rotary import qk_norm_rope
from flexlam_fast.ops.self_attention import self_attention
from flexlam_fast.ops.varlen import Sequences, varlen_attention


class Rotation(NamedTuple):
    """Cosines and sines ``[B or 1, 1, N, D]`` of one set of positions, fp32 (fp64 for an fp64 model)."""

    cos: Tensor
    sin: Tensor


class KeyValueStore(Protocol):
    """Where attention puts new keys and values, and finds all those it may attend to."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep ``k``, ``v`` ``[B, kv_heads, N, D]`` of a layer; return all of its keys and values."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """What norms and angles of a ``dtype`` model are computed in; fp64 stays, so that it can be an exact reference."""
    return torch.promote_types(dtype, torch.float32)


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32) -> Rotation:
    """Angles of integer ``positions [B, N]`` or ``[N]``, exact at any position; ``dtype`` is the result's.

    They are formed in fp64 and reduced by whole turns before rounding: in fp32 the angle of position 10^8 would be
    wrong by several radians.
    """
    angle = positions.double().unsqueeze(-1) * rope_frequencies(theta, head_dim, positions.device)
    angle = torch.cat([angle, angle], dim=-1)
    if angle.dim() == 2:
        angle = angle.unsqueeze(0)
    return Rotation(angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1))


def rotate(x: Tensor, r: Rotation) -> Tensor:
    """Apply RoPE to ``x [B, heads, N, D]``, pairing channel ``i`` with ``i + D/2``; fp32 inside, ``x``'s dtype out."""
    y = x.to(at_least_fp32(x.dtype))
    first, second = y.chunk(2, dim=-1)
    return (y * r.cos + torch.cat([-second, first], dim=-1) * r.sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., W]`` to ``[..., W]``."""
        return plain_rms_norm(x, self.weight, self.eps)


class SequenceBlock(nn.Module):
    """Pre-norm decoder block: grouped-query attention with QK-norm and RoPE, then SwiGLU; no biases.

    ``backend`` is that of the ops of training; other than the reference's, they want no store.
    """

    backend = REFERENCE

    def __init__(self, cfg: SequenceConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.norm1 = RMSNorm(cfg.hidden, cfg.rms_eps)
        self.q = Linear(cfg.hidden, cfg.heads * cfg.head_dim, bias=False)
        self.k = Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v = Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=False)
        self.out = Linear(cfg.heads * cfg.head_dim, cfg.hidden, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_eps)
        self.norm2 = RMSNorm(cfg.hidden, cfg.rms_eps)
        self.gate = Linear(cfg.hidden, cfg.intermediate, bias=False)
        self.up = Linear(cfg.hidden, cfg.intermediate, bias=False)
        self.down = Linear(cfg.intermediate, cfg.hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        r: Rotation,
        mask: Tensor | None,
        layer: int,
        store: KeyValueStore | None,
        packed: Sequences | None = None,
    ) -> Tensor:
        """``x [B, N, hidden]``; ``mask`` bool, broadcast to ``[B, heads, N, keys]``; None is plain causal."""
        if self.backend != REFERENCE:
            return self._fused(x, r, mask, packed)
        x = x + self.attend(self.norm1(x), r, mask, layer, store)
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out

    def _fused(self, x: Tensor, r: Rotation, mask: Tensor | None, packed: Sequences | None) -> Tensor:
        """The same by the ops of training; ``mask`` is ``[N, N]`` or None. ``packed`` divides the tokens of one row."""
        (b, n, _), dtype, backend = x.shape, product_dtype(x), self.backend
        y = rms_norm(x, self.norm1.weight, self.norm1.eps, dtype=dtype, backend=backend)
        q, k, v = (part(y).view(b, n, -1, self.head_dim) for part in (self.q, self.k, self.v))
        weights = self.q_norm.weight, self.k_norm.weight
        cos, sin = (t[0, 0] if len(t) == 1 else t[:, 0] for t in r)
        q, k = qk_norm_rope(q, k, *weights, cos, sin, self.q_norm.eps, dtype=dtype, backend=backend)
        if packed is None:
            y = self_attention(q, k, v, mask=mask, causal=mask is None)
        else:
            y = varlen_attention(q[0], k[0], v[0], packed.starts, packed.longest, lengths=packed.lengths).unsqueeze(0)
        x = x + self.out(y.flatten(2))
        y = rms_norm(x, self.norm2.weight, self.norm2.eps, dtype=dtype, backend=backend)
        out: Tensor = x + self.down(swiglu(self.gate(y), self.up(y), backend=backend))
        return out

    def attend(self, y: Tensor, r: Rotation, mask: Tensor | None, layer: int, store: KeyValueStore | None) -> Tensor:
        """Attention of normed ``y`` over its own keys and those in ``store``."""
        b, n, _ = y.shape
        q = rotate(self.q_norm(self.q(y).view(b, n, self.heads, self.head_dim)).transpose(1, 2), r)
        k = rotate(self.k_norm(self.k(y).view(b, n, self.kv_heads, self.head_dim)).transpose(1, 2), r)
        v = self.v(y).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        if store is not None:
            k, v = store.update(layer, k, v)
        # under autocast the norms leave fp32 and the projections bf16, and pages may be narrower than the weights;
        # attention wants one dtype
        width, q, k = y.dtype, q.to(v.dtype), k.to(v.dtype)
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, n, -1).to(width))
        return out


class SequenceModel(nn.Module):
    """Causal transformer over code embeddings and linearly embedded observation patches.

    ``backend`` is that of the ops of training; ``layers.set_backend`` sets it here and in all blocks.
    """

    backend = REFERENCE

    def __init__(self, cfg: FlexLAMConfig) -> None:
        super().__init__()
        check_config(cfg)
        self.cfg = cfg
        seq = cfg.sequence
        self.codes = nn.Embedding(cfg.bottleneck.codebook_size, seq.hidden)
        self.observe = Linear(cfg.channels * seq.patch**2, seq.hidden)
        self.blocks = nn.ModuleList(SequenceBlock(seq) for _ in range(seq.layers))
        self.norm = RMSNorm(seq.hidden, seq.rms_eps)
        self.head = nn.Linear(seq.hidden, cfg.bottleneck.codebook_size, bias=False)
        if seq.places:
            self.slot_place = nn.Parameter(torch.randn(cfg.bottleneck.slots, seq.hidden) * 0.02)
            self.patch_place = nn.Parameter(torch.randn(cfg.tokens_per_frame, seq.hidden) * 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            for name in ("out", "down"):
                nn.init.normal_(getattr(block, name).weight, std=0.02 / (2 * seq.layers) ** 0.5)
        nn.init.zeros_(self.observe.bias)

    def embed_codes(self, codes: Tensor, slots: Tensor) -> Tensor:
        """Codes integers ``[B, N]`` standing in ``slots [N]`` to ``[B, N, hidden]``."""
        x: Tensor = self.codes(codes.long())
        return x + self.slot_place[slots] if self.cfg.sequence.places else x

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Observation blocks ``[B, tokens per frame, hidden]`` of pixels ``[B, C, H, W]`` in ``[-1, 1]``, or of stored
        frames, uint8 ``[B, H, W, C]``."""
        patch = self.cfg.sequence.patch
        if frames.dtype == torch.uint8:
            patches = frame_patches(frames, patch, dtype=product_dtype(self.observe.weight), backend=self.backend)
        else:
            patches = patchify(frames, patch)
        x: Tensor = self.observe(patches)
        return x + self.patch_place if self.cfg.sequence.places else x

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
        packed: Sequences | None = None,
    ) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` at integer ``positions [N]`` or ``[B, N]`` to normed hidden states.

        ``mask`` is bool, True where a token may attend, ``[N, keys]`` or ``[B, 1, N, keys]``; None is plain causal.
        ``store`` keeps keys and values between calls; None attends to this call's tokens alone. ``packed`` says where
        in ``x [1, T, hidden]`` sequences start that do not see each other; the reference's blocks do not take it.
        """
        r = rotation(positions, self.cfg.sequence.head_dim, self.cfg.sequence.rope_theta, at_least_fp32(x.dtype))
        for layer, block in enumerate(self.blocks):
            x = block(x, r, mask, layer, store, packed)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` to code logits ``[..., C]``, fp32 (fp64 from an fp64 model)."""
        out: Tensor = self.head(hidden)
        return out.to(at_least_fp32(out.dtype))

    @isolated
    @torch.no_grad()
    def generate(self, codes: Tensor, k: int) -> Tensor:
        """Continue a plain sequence of codes greedily: ``codes [B, N]`` (N at least 1) to int32 ``[B, k]``.

        Codes stand in slots ``0, 1, ..., K - 1, 0, ...``. Acting on frames goes through :class:`flexlam_fast.Policy`.

        Raises:
            InputError: wrong shape or dtype, an empty sequence, or a code outside ``[0, C)``.
            BudgetError: ``k`` below 1.
        """
        check_tensor("codes", codes, ["B", "N"], (torch.int32, torch.int64))
        check_budget("k", k, 1, 2**31 - 1)
        size = self.cfg.bottleneck.codebook_size
        if not codes.shape[1] or bool(((codes < 0) | (codes >= size)).any()):
            raise InputError(f"codes: expected at least one code in 0..{size - 1}, got shape {list(codes.shape)}")
        from flexlam_fast.sequence import plain

        return plain.generate(plain.runner_of(self, AUTO), codes, k)

    @classmethod
    def from_qwen3(cls, hf_model: Any) -> SequenceModel:
        """Take over the weights of a ``transformers`` Qwen3 causal language model whose vocabulary is the codebook.

        Args:
            hf_model: a ``Qwen3ForCausalLM``. Its embedding becomes the code embedding; the observation embedding, for
                which it has no counterpart, keeps its random start.

        Raises:
            InputError: a model of another kind, or one with biases, sliding windows, or scaled RoPE.
        """
        from flexlam_fast.sequence.convert import from_qwen3

        return from_qwen3(cls, hf_model)
