"""The encoder's transformer in one call, by C++ on a CPU whose matrix tiles multiply bf16 (paper Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.backend import NATIVE
from flexlam_fast.checks import check_tensor
from flexlam_fast.errors import InputError
from flexlam_fast.ops.contracts import compiled


class TransformerEngine:
    """Weights of pre-norm blocks with full attention, LayerNorm, biases and a tanh GELU.

    Args:
        layers: of each block norm, qkv, out, norm, up and down, each as weight and bias; bfloat16, on the CPU and
            contiguous. They are read where they are.
        norm: weight and bias of the final norm.
        heads: of attention.
        eps: of the norms.

    Raises:
        BackendError: the extension is not built.
        InputError: weights of another dtype, layout or device.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]], norm: Sequence[Tensor], heads: int, eps: float) -> None:
        self.layers, self.norm, self.heads, self.eps = layers, norm, heads, eps
        self.tensors = [t for layer in layers for t in layer] + list(norm)
        self.addresses = [t.data_ptr() for t in self.tensors]
        for tensor in self.tensors:
            check_tensor("weights", tensor, list(tensor.shape), torch.bfloat16, torch.device("cpu"))
            if not tensor.is_contiguous():
                raise InputError(f"weights: expected contiguous ones, got strides {tensor.stride()}")
        addresses = [[t.data_ptr() for t in layer] for layer in layers]
        ends = [t.data_ptr() for t in norm]
        self.width, inner = norm[0].shape[0], layers[0][8].shape[0]
        self._engine = compiled(NATIVE).EncoderEngine(addresses, *ends, self.width, heads, inner, eps)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads the weights of the copy: the C++ object, which holds addresses, is made anew."""
        return type(self), (self.layers, self.norm, self.heads, self.eps)

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are where this engine reads; memory that is shared with another process moves."""
        return [t.data_ptr() for t in tensors] == self.addresses

    def takes(self, tokens: int) -> bool:
        """Whether so many tokens go through: whole 16s, sizes of whole 32s, and AMX here."""
        return bool(self._engine.takes(tokens))

    @torch.no_grad()
    def run(self, x: Tensor, keep: int) -> Tensor:
        """Embedded tokens bf16 ``[B, N, W]`` through all blocks; final norm ``[B, keep, W]`` of the first ``keep``.

        Raises:
            InputError: wrong shape or dtype, or a number of tokens that :meth:`takes` says no to.
        """
        check_tensor("x", x, ["B", "N", self.width], torch.bfloat16, torch.device("cpu"))
        batch, tokens, _ = x.shape
        if not self.takes(tokens) or not 0 <= keep <= tokens:
            raise InputError(f"x: expected whole 16s of tokens, {keep} of them to keep, and AMX, got {list(x.shape)}")
        x, out = x.contiguous(), x.new_empty(batch, keep, self.width)
        if out.numel():
            self._engine.run(x.data_ptr(), out.data_ptr(), batch, tokens, keep, torch.get_num_threads())
        return out
