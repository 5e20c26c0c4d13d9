"""A whole block of codes in one call, by C++ on a CPU: every pass, every choice, nothing of Python in between.

The rule is that of ``sequence.decode.generate``: code ``j`` is chosen from the logits that stand, greedily or by
Gumbel-max, embedded, and passed through all layers over the session's pages for the logits of code ``j + 1``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.backend import NATIVE
from flexlam_fast.checks import check_budget, check_tensor
from flexlam_fast.errors import InputError
from flexlam_fast.ops.arguments import FLOATS
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.native import TYPES


class LayerTensors(NamedTuple):
    """Weights of one layer: norms ``[W]`` and ``[D]``, qkv ``[(H + 2 G) D, W]``, gate and up ``[2 I, W]``."""

    norm1: Tensor
    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


class ModelTensors(NamedTuple):
    """Weights of a sequence model: embedding and head ``[C, W]``, place ``[K, W]`` or None, norm ``[W]``."""

    layers: tuple[LayerTensors, ...]
    embedding: Tensor
    place: Tensor | None
    norm: Tensor
    head: Tensor

    def all(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        rest = [self.embedding, self.norm, self.head, *([] if self.place is None else [self.place])]
        return [tensor for layer in self.layers for tensor in layer] + rest


class Spot(NamedTuple):
    """Where the codes' tokens stand.

    table int32 ``[B, T]`` and context int32 ``[B]`` are those of ``paged_attention``, and the codes are their session's
    own tokens, in order. rows and positions int64 ``[B, K]`` have at least ``k`` columns.
    """

    table: Tensor
    context: Tensor
    rows: Tensor
    positions: Tensor


class Entry(NamedTuple):
    """Where ``N`` tokens enter.

    table int32 ``[B, T]``, context and start int32 ``[B]`` are those of ``paged_attention``; rows and positions int64
    ``[B, N]``.
    """

    table: Tensor
    context: Tensor
    start: Tensor
    rows: Tensor
    positions: Tensor


class Draw(NamedTuple):
    """How codes are drawn: 1 / temperature, top k (0: all), and noise fp32 ``[B, k, C]``."""

    inverse: float
    top_k: int
    noise: Tensor


class BlockEngine:
    """The sequence model's weights, for generating blocks of codes from pages.

    Args:
        weights: on the CPU, contiguous, of one dtype: float32, bfloat16 or float16. They are read where they are, so
            what is written into them counts from the next block on.
        theta: base of the RoPE frequencies.
        eps: of the RMS norms.

    Raises:
        BackendError: the extension is not built.
        InputError: weights of different dtypes or elsewhere than on the CPU.
    """

    def __init__(self, weights: ModelTensors, theta: float, eps: float) -> None:
        kind = weights.head.dtype
        for tensor in weights.all():
            if tensor.dtype != kind or not tensor.is_cpu or not tensor.is_contiguous() or kind not in TYPES:
                check_tensor("weights", tensor, list(tensor.shape), FLOATS[:3], torch.device("cpu"))
                raise InputError(f"weights: expected contiguous ones of {kind}, got {tensor.dtype}")
        self.weights, self.theta, self.eps, first = weights, theta, eps, weights.layers[0]
        self.addresses = [tensor.data_ptr() for tensor in weights.all()]
        hidden, dim = first.norm1.shape[0], first.q_norm.shape[0]
        heads = first.out.shape[1] // dim
        kv_heads = (first.qkv.shape[0] // dim - heads) // 2
        self.hidden, self.codes, self.heads = hidden, weights.head.shape[0], (kv_heads, dim)
        addresses = [[tensor.data_ptr() for tensor in layer] for layer in weights.layers]
        others = (weights.embedding, weights.place, weights.norm, weights.head)
        self._engine = compiled(NATIVE).SequenceEngine(
            addresses, *(0 if t is None else t.data_ptr() for t in others), hidden, first.down.shape[1], heads,
            kv_heads, dim, self.codes, 0 if weights.place is None else len(weights.place), theta, eps, TYPES[kind],
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads the weights of the copy: the C++ object, which holds addresses, is made anew."""
        return type(self), (self.weights, self.theta, self.eps)

    def reads(self, weights: ModelTensors) -> bool:
        """Whether ``weights`` are where this engine reads; memory that is shared with another process moves."""
        return [tensor.data_ptr() for tensor in weights.all()] == self.addresses

    def takes(self, tokens: int, pages: Tensor) -> bool:
        """Whether :meth:`append` takes so many tokens over such pages: bf16, sizes of whole 32s, and AMX here."""
        kind = TYPES.get(pages.dtype)
        return kind is not None and pages.dim() == 5 and bool(self._engine.takes(tokens, pages.shape[2], kind))

    @torch.no_grad()
    def append(self, k_pages: Tensor, v_pages: Tensor, entry: Entry, x: Tensor) -> Tensor:
        """Pass tokens that enter together through all layers; fp32 ``[B, C]``, the logits of each session's last one.

        Keys and values are written to their rows, and a row outside the pool stores nothing. Sums depend on the session
        alone, not on its neighbours, nor on the number of threads.

        Args:
            k_pages: as in :meth:`generate`.
            v_pages: likewise.
            entry: where they enter and what they see.
            x: ``[B, N, W]`` in the weights' dtype.

        Raises:
            InputError: wrong shape, dtype or layout, or what :meth:`takes` says no to.
        """
        self._check_pages(k_pages, v_pages)
        check_tensor("x", x, ["B", "N", self.hidden], self.weights.head.dtype)
        batch, tokens, _ = x.shape
        if not self.takes(tokens, k_pages):
            raise InputError(f"x: expected tokens, sizes and a processor for matrix tiles of bf16, got {list(x.shape)}")
        check_tensor("table", entry.table, [batch, "T"], torch.int32)
        for name, tensor in (("context", entry.context), ("start", entry.start)):
            check_tensor(name, tensor, [batch], torch.int32)
        for name, tensor in (("rows", entry.rows), ("positions", entry.positions)):
            check_tensor(name, tensor, [batch, tokens], torch.int64)
        logits = torch.empty(batch, self.codes, dtype=torch.float32, device="cpu")
        x, read = x.contiguous(), [t.contiguous() for t in entry]
        _, pages, page, *_ = k_pages.shape
        if batch:
            self._engine.append(
                x.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), *(t.data_ptr() for t in read), logits.data_ptr(),
                batch, tokens, page, entry.table.shape[1], pages, TYPES[k_pages.dtype], torch.get_num_threads(),
            )  # fmt: skip
        return logits

    @torch.no_grad()
    def generate(
        self,
        k_pages: Tensor,
        v_pages: Tensor,
        spot: Spot,
        first: Tensor,
        k: int,
        draw: Draw | None = None,
        *,
        given: Tensor | None = None,
        logits: Tensor | None = None,
        variant: str = "",
    ) -> Tensor:
        """Generate ``k`` codes of every session, int32 ``[B, k]``.

        Sums depend on the session alone: not on its neighbours, nor on the number of threads, by a single bit.

        Args:
            k_pages: ``[layers, pages, P, G, D]`` contiguous, of any of the three dtypes; the codes' keys are written.
            v_pages: likewise.
            spot: where the codes stand and what they see.
            first: fp32 ``[B, C]``, logits of the first code.
            k: how many codes; ``k - 1`` passes.
            draw: None is greedy.
            given: int32 ``[B, k]``: feed these instead of what is chosen, to compare passes.
            logits: fp32 ``[B, k, C]``: filled with the logits that each code was chosen from.
            variant: an instruction set by name; "" is the widest.

        Raises:
            InputError: wrong shape, dtype or layout.
            BudgetError: ``k`` below 1, or beyond the columns of ``spot`` or the model's places.
        """
        batch = self._check(k_pages, v_pages, spot, first)
        place = self.weights.place
        check_budget("k", k, 1, spot.rows.shape[1] if place is None else min(spot.rows.shape[1], len(place)))
        if given is not None:
            check_tensor("given", given, [batch, k], torch.int32)
            if bool(((given < 0) | (given >= self.codes)).any()):
                raise InputError(f"given: expected codes in 0..{self.codes - 1}, got {given.min()}..{given.max()}")
        if logits is not None:
            check_tensor("logits", logits, [batch, k, self.codes], torch.float32)
            if not logits.is_contiguous():
                raise InputError(f"logits: expected a contiguous tensor to fill, got strides {logits.stride()}")
        chosen = torch.empty(batch, k, dtype=torch.int32, device="cpu")
        if not batch:
            return chosen
        if draw is not None:
            check_tensor("noise", draw.noise, [batch, k, self.codes], torch.float32)
        starts = torch.arange(k, dtype=torch.int32, device="cpu").unsqueeze(1).expand(k, batch)
        by_slot = starts, spot.rows[:, :k].t(), spot.positions[:, :k].t()
        noise = None if draw is None else draw.noise
        read = [
            None if t is None else t.contiguous() for t in (spot.table, spot.context, *by_slot, first, noise, given)
        ]
        _, pages, page, *_ = k_pages.shape
        self._engine.generate(
            k_pages.data_ptr(), v_pages.data_ptr(), *(0 if t is None else t.data_ptr() for t in read),
            chosen.data_ptr(), 0 if logits is None else logits.data_ptr(), batch, k, page, spot.table.shape[1], pages,
            0 if draw is None else draw.top_k, 0.0 if draw is None else draw.inverse, TYPES[k_pages.dtype],
            torch.get_num_threads(), variant,
        )  # fmt: skip
        return chosen

    def _check(self, k_pages: Tensor, v_pages: Tensor, spot: Spot, first: Tensor) -> int:
        """Check what every block brings; return the number of sessions."""
        self._check_pages(k_pages, v_pages)
        check_tensor("first", first, ["B", self.codes], torch.float32)
        batch = len(first)
        check_tensor("table", spot.table, [batch, "T"], torch.int32)
        check_tensor("context", spot.context, [batch], torch.int32)
        check_tensor("rows", spot.rows, [batch, "K"], torch.int64)
        check_tensor("positions", spot.positions, list(spot.rows.shape), torch.int64)
        return batch

    def _check_pages(self, k_pages: Tensor, v_pages: Tensor) -> None:
        shape: list[int | str] = [len(self.weights.layers), "pages", "P", *self.heads]
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            check_tensor(name, pages, shape, FLOATS[:3], torch.device("cpu"))
            if not pages.is_contiguous() or pages.shape != k_pages.shape or pages.dtype != k_pages.dtype:
                raise InputError(f"{name}: expected contiguous pages like the keys', got {list(pages.shape)}")
