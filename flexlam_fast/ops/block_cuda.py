"""A whole block of codes in one launch on a GPU: what :class:`~flexlam_fast.ops.block.BlockEngine` does on a CPU.

One persistent kernel (``csrc/engine_phases.cuh``) goes through every pass of a block, its blocks meeting at barriers in
between. Tested in an emulation on a CPU and compiled for sm_90a; not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlam_fast.backend import NATIVE
from flexlam_fast.checks import check_budget, check_tensor
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops.block import Draw, ModelTensors, Spot
from flexlam_fast.ops.contracts import compiled
from flexlam_fast.ops.native import TYPES


def refusal(cfg: FlexLAMConfig, dtype: torch.dtype, pages: torch.dtype, entries: int, device: torch.device) -> str:
    """Why the engine does not take a model on a device, in one sentence; empty if it does.

    Args:
        cfg: the model.
        dtype: of its weights.
        pages: dtype of the cache.
        entries: pages of a session.
        device: a CUDA device.
    """
    if dtype not in TYPES or pages not in TYPES:
        return f"dtype: expected float32, bfloat16 or float16, got {dtype} and pages of {pages}"
    seq = cfg.sequence
    sizes = seq.hidden, seq.intermediate, seq.heads, seq.kv_heads, seq.head_dim, cfg.bottleneck.codebook_size
    with torch.cuda.device(device):
        said: str = compiled(NATIVE).cuda_engine_refusal(*sizes, TYPES[dtype], TYPES[pages], cfg.page, entries)
    return said


class CudaBlockEngine:
    """The sequence model's weights on a GPU, for generating blocks of codes from the pages of one cache.

    Args:
        weights: on one CUDA device, contiguous, of one dtype: float32, bfloat16 or float16. They are read where they
            are, so what is written into them counts from the next block on.
        theta: base of the RoPE frequencies.
        eps: of the RMS norms.
        pages: dtype of the pages, one of the same.
        page: tokens of a page.
        entries: pages of a session.

    Raises:
        InputError: weights of different dtypes or devices, or sizes that the kernel does not take.
        BackendError: the device cannot hold the kernel's blocks all at once.
    """

    def __init__(
        self, weights: ModelTensors, theta: float, eps: float, pages: torch.dtype, page: int, entries: int
    ) -> None:
        kind, self.device = weights.head.dtype, weights.head.device
        for tensor in weights.all():
            alike = tensor.dtype == kind and tensor.device == self.device and tensor.is_contiguous()
            if not alike or not tensor.is_cuda or kind not in TYPES:
                where = f"{tensor.dtype} on {tensor.device}"
                raise InputError(f"weights: expected contiguous ones of one dtype on one CUDA device, got {where}")
        self.weights, self.pages, self.page, self.entries = weights, pages, page, entries
        self.theta, self.eps, self.addresses = theta, eps, [tensor.data_ptr() for tensor in weights.all()]
        first = weights.layers[0]
        hidden, dim = first.norm1.shape[0], first.q_norm.shape[0]
        heads = first.out.shape[1] // dim
        kv_heads = (first.qkv.shape[0] // dim - heads) // 2
        self.codes, self.heads = weights.head.shape[0], (kv_heads, dim)
        addresses = [[tensor.data_ptr() for tensor in layer] for layer in weights.layers]
        others = (weights.embedding, weights.place, weights.norm, weights.head)
        try:
            with torch.cuda.device(self.device):
                self._engine = compiled(NATIVE).CudaSequenceEngine(
                    addresses, *(0 if t is None else t.data_ptr() for t in others), hidden, first.down.shape[1],
                    heads, kv_heads, dim, self.codes, 0 if weights.place is None else len(weights.place), theta, eps,
                    TYPES[kind], TYPES[pages], page, entries,
                )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error)) from None
        except RuntimeError as error:
            raise BackendError(str(error)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads the weights of the copy: the C++ object, which holds addresses, is made anew."""
        return type(self), (self.weights, self.theta, self.eps, self.pages, self.page, self.entries)

    def reads(self, weights: ModelTensors) -> bool:
        """Whether ``weights`` are where this engine reads."""
        return [tensor.data_ptr() for tensor in weights.all()] == self.addresses

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
    ) -> Tensor:
        """Generate ``k`` codes of every session, int32 ``[B, k]``, on the current stream.

        Arguments are those of :meth:`BlockEngine.generate`, on the GPU. Nothing is read back, and all memory is
        torch's, so that the call can be captured in a CUDA graph. Blocks of one engine must not overlap.

        Raises:
            InputError: wrong shape, dtype, layout or device.
            BudgetError: ``k`` below 1, or beyond the columns of ``spot`` or the model's places.
            BackendError: as :meth:`check`.
        """
        self.check()
        batch = self._check(k_pages, v_pages, spot, first)
        place = self.weights.place
        check_budget("k", k, 1, spot.rows.shape[1] if place is None else min(spot.rows.shape[1], len(place)))
        for name, tensor, dtype in (("given", given, torch.int32), ("logits", logits, torch.float32)):
            if tensor is not None:
                size = [batch, k] if name == "given" else [batch, k, self.codes]
                check_tensor(name, tensor, size, dtype, self.device)
        if logits is not None and not logits.is_contiguous():
            raise InputError("logits: expected a contiguous tensor, got strides of others")
        if draw is not None:
            check_tensor("noise", draw.noise, [batch, k, self.codes], torch.float32, self.device)
        chosen = torch.empty(batch, k, dtype=torch.int32, device=self.device)
        if not batch:
            return chosen
        starts = torch.arange(k, dtype=torch.int32, device=self.device).unsqueeze(1).expand(k, batch)
        by_slot = starts, spot.rows[:, :k].t(), spot.positions[:, :k].t()
        noise = None if draw is None else draw.noise
        read = [
            None if t is None else t.contiguous() for t in (spot.table, spot.context, *by_slot, first, noise, given)
        ]
        room = torch.empty(self._engine.room(), dtype=torch.uint8, device=self.device)
        with torch.cuda.device(self.device):
            self._engine.generate(
                k_pages.data_ptr(), v_pages.data_ptr(), *(0 if t is None else t.data_ptr() for t in read),
                chosen.data_ptr(), 0 if logits is None else logits.data_ptr(), batch, k, self.page, self.entries,
                k_pages.shape[1], 0 if draw is None else draw.top_k, 0.0 if draw is None else draw.inverse,
                TYPES[self.pages], room.data_ptr(), torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        return chosen

    def check(self) -> None:
        """Say whether a launch that has run, captured ones included, lost a barrier. Waits for nothing.

        Raises:
            BackendError: one did. Its codes and all later ones are zeros, and a new engine is needed.
        """
        try:
            self._engine.check()
        except RuntimeError as error:
            raise BackendError(str(error)) from None

    def _check(self, k_pages: Tensor, v_pages: Tensor, spot: Spot, first: Tensor) -> int:
        """Check what every block brings; return the number of sessions."""
        shape: list[int | str] = [len(self.weights.layers), "pages", self.page, *self.heads]
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            check_tensor(name, pages, shape, self.pages, self.device)
            if not pages.is_contiguous() or pages.shape != k_pages.shape:
                raise InputError(f"{name}: expected contiguous pages like the keys', got {list(pages.shape)}")
        check_tensor("first", first, ["B", self.codes], torch.float32, self.device)
        batch = len(first)
        check_tensor("table", spot.table, [batch, self.entries], torch.int32, self.device)
        check_tensor("context", spot.context, [batch], torch.int32, self.device)
        check_tensor("rows", spot.rows, [batch, "K"], torch.int64, self.device)
        check_tensor("positions", spot.positions, list(spot.rows.shape), torch.int64, self.device)
        return batch
