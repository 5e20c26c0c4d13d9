"""The plain fast way through the sequence model: fewer, larger PyTorch operations, and no copy of what is cached.

Query, key and value projections are one matrix product, gate and up another, the norms of queries and keys one call;
attention reads a session's reservation in place. Angles, masks and places are worked out once for a whole decision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ranges import LAYERS, span
from flexlam_fast.sequence.cache import PagedCache, Placement
from flexlam_fast.sequence.layers import Layer, pack
from flexlam_fast.sequence.model import SequenceBlock, SequenceModel, at_least_fp32, rotation
from flexlam_fast.sequence.sampling import PlainChoice


class PackedStep(NamedTuple):
    """What all layers share for new tokens at ``place``.

    cos and sin ``[B, N, 1, D]`` (sin with the sign of the rotation), pool rows ``[B, N]``, the host's session ids, a
    bias ``[B, N or 1, S]`` of zeros and -inf (None: plain causal), and how many slots count.
    """

    cache: PagedCache
    place: Placement
    cos: Tensor
    sin: Tensor
    rows: Tensor
    sessions: list[int]
    bias: Tensor | None
    slots: int

    def column(self, j: int) -> PackedStep:
        """Token ``j`` of generated codes alone: it sees the scratch up to itself."""
        at, slots = slice(j, j + 1), self.cache.scratch_base + j + 1
        angles = self.cos[:, at], self.sin[:, at]
        return PackedStep(self.cache, self.place, *angles, self.rows[:, at], self.sessions, self.bias, slots)


class Packed(PlainChoice):
    """Runs ``model`` over the cache; its projections become views of the packed ones, so weights are held once."""

    def __init__(self, model: SequenceModel) -> None:
        self.model = model
        self.layers: list[Layer] = []
        self.norms: list[Tensor] = []  # of queries and keys, [H + G, D] a layer

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs its own model when it first runs."""
        return type(self), (self.model,)

    def prepare(self, cache: PagedCache, place: Placement) -> PackedStep:
        """Work out what all layers share."""
        self.layers = pack(self.model, self.layers)
        self.norms = [_norms(layer.block) for layer in self.layers]
        dtype, seq = self.model.head.weight.dtype, self.model.cfg.sequence
        r = rotation(place.positions, seq.head_dim, seq.rope_theta, at_least_fp32(dtype))
        sign = torch.ones_like(r.sin[0, 0, 0])
        sign[: seq.head_dim // 2] = -1
        angles = r.cos.transpose(1, 2), (r.sin * sign).transpose(1, 2)
        sessions = place.sessions.tolist()
        return PackedStep(cache, place, *angles, cache.rows(place), sessions, *self.window(cache, place))

    def window(self, cache: PagedCache, place: Placement) -> tuple[Tensor | None, int]:
        """What the tokens of ``place`` see: the bias, and how many slots of the reservation count."""
        codes = place.slots.shape[1] == cache.slots  # codes share one mask, because their slots end with their own
        mask = cache.mask(place.column(0) if codes else place)[:, 0]
        if codes:
            mask[:, :, cache.scratch_base :] = True
        return bias_of(mask, cache.k.dtype), cache.scratch_base if codes else cache.size

    def logits(self, x: Tensor, step: PackedStep) -> Tensor:
        """Embedded tokens ``[B, N, hidden]`` through all layers; logits ``[B, C]`` of the last one."""
        eps = self.model.cfg.sequence.rms_eps
        for i in range(len(self.layers)):
            with span("layer", LAYERS, i):
                x = self._layer(x, i, step, eps)
        hidden = F.rms_norm(x, x.shape[-1:], self.model.norm.weight, eps)
        return self.model.logits(hidden[:, -1])

    def _layer(self, x: Tensor, index: int, step: PackedStep, eps: float) -> Tensor:
        layer = self.layers[index]
        y = self.norm(x, layer.block.norm1.weight, eps)
        attended = self._attend(F.linear(y, layer.qkv), layer, index, step)
        if index == len(self.layers) - 1:  # of the last layer only the last token is asked for
            x, attended = x[:, -1:], attended[:, -1:]
        x = _add_linear(x, attended, layer.block.out.weight)
        y = self.norm(x, layer.block.norm2.weight, eps)
        return _add_linear(x, self.swiglu(F.linear(y, layer.gate_up)), layer.block.down.weight)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm of rows ``[..., W]``."""
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def swiglu(self, x: Tensor) -> Tensor:
        """Rows ``[..., 2 I]`` of gates and what they gate, one behind the other, to ``[..., I]``."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _attend(self, qkv: Tensor, layer: Layer, index: int, step: PackedStep) -> Tensor:
        """Attention output ``[B, N, H * D]`` of one layer, after writing its keys and values."""
        block, cache = layer.block, step.cache
        batch, tokens, _ = qkv.shape
        heads, groups, dim = block.heads, block.kv_heads, block.head_dim
        qkv = qkv.view(batch, tokens, heads + 2 * groups, dim)
        qk = F.rms_norm(qkv[:, :, : heads + groups], (dim,), None, block.q_norm.eps) * self.norms[index]
        wide = qk.to(step.cos.dtype)
        qk = torch.addcmul(wide * step.cos, wide.roll(dim // 2, -1), step.sin).to(cache.k.dtype)
        k, v = cache.k[index], cache.v[index]
        rows = step.rows.flatten()
        for pool, new in ((k, qk[:, :, heads:]), (v, qkv[:, :, heads + groups :])):
            pool.view(-1, groups, dim).index_copy_(0, rows, new.flatten(0, 1).to(pool.dtype))
        k, v = (pool.view(cache.capacity, cache.size, groups, dim) for pool in (k, v))
        out = torch.empty(batch, tokens, heads, dim, dtype=qk.dtype, device=qk.device)
        # one session after the other, in place: its result cannot depend on the others, and nothing is copied
        for b, s in enumerate(step.sessions):
            bias = None if step.bias is None else step.bias[b, :, : step.slots]
            out[b] = _attention(qk[b, :, :heads], k[s, : step.slots], v[s, : step.slots], bias)
        return out.view(batch, tokens, -1).to(qkv.dtype)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros where a bool ``mask`` is True, and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of ``q [N, H, D]`` over ``k``, ``v`` ``[S, G, D]`` with ``bias [N or 1, S]``: ``[N, H, D]``.

    Without a bias it is plain causal, and ``S = N``.

    One query in fp32 goes through plain products, which stream keys and values faster than torch's fused attention
    does on a CPU: 220 against 290 us for 2,560 tokens of 4 heads of 64, one after the other on two quiet cores. Within
    a decision both take longer, because what each of these calls needs has left the cache by then.
    """
    if bias is not None and q.shape[0] == 1 and q.dtype in (torch.float32, torch.float64):
        return _one_query(q[0], k, v, bias[0]).unsqueeze(0)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    seen = None if bias is None else bias[None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=bias is None, enable_gqa=grouped)
    return y[0].transpose(0, 1)


def _one_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of ``q [H, D]``, one key head after the other for the scores, all at once for the values."""
    (heads, dim), (tokens, groups, _) = q.shape, k.shape
    per = heads // groups
    scores, q = q.new_empty(heads, tokens), q * dim**-0.5
    for g in range(groups):
        rows = slice(g * per, (g + 1) * per)
        if per == 1:  # a product of matrix and vector: 118 us for 4 heads, where a batched product takes 173
            torch.mv(k[:, g], q[g], out=scores[g])
        else:
            torch.mm(q[rows], k[:, g].t(), out=scores[rows])
    weights = scores.add_(bias).softmax(-1)
    if groups > 8:  # beyond, what the one product below throws away costs more than it saves
        return torch.bmm(weights.view(groups, per, tokens), v.transpose(0, 1)).view(heads, dim)
    # every head times the values of all: v is read in one go (102 us, head by head 147), and a block of each row kept
    every = torch.mm(weights, v.reshape(tokens, groups * dim)).view(groups, per, groups, dim)
    return every.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(heads, dim)


def _norms(block: SequenceBlock) -> Tensor:
    return torch.cat([block.q_norm.weight.expand(block.heads, -1), block.k_norm.weight.expand(block.kv_heads, -1)])


def _add_linear(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``x + y @ weight.T`` in one operation."""
    return torch.addmm(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), weight.t()).view(x.shape)
