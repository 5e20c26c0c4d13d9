"""Plain sequences: a prompt that is seen whole, and codes that follow it one by one, over pages that grow.

Here nothing slides and nothing is forgotten: every row is as long as the others, its pages stand in order, and a token
sees all those before it. The ways through the layers are those of a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexlam_fast.backend import AUTO, NATIVE, REFERENCE, TRITON
from flexlam_fast.config import SequenceConfig
from flexlam_fast.ops import linear, paged
from flexlam_fast.sequence.cache import Placement
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.layers import pack
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import Native
from flexlam_fast.sequence.packed import Packed, PackedStep, bias_of

PAGE = 64  # tokens of a page; also how many codes are placed at once
#: Tokens of all rows that enter together, at least a page of each. A later part of a prompt sees by a mask, of so many
#: tokens times all those before: 2,432 tokens of the dmlab sizes took 465 ms at once on two cores, 515 in five parts.
PREFILL = 4096


class GrowingPages:
    """Keys and values of ``batch`` plain sequences of one length: what ``Eager``, ``Packed`` and ``Fused`` read.

    ``k``, ``v``: ``[layers, batch * pages of a row, 64, kv_heads, head_dim]``, each row's pages side by side.
    ``length`` counts the tokens of a row so far, ``size`` those that its pages hold.

    Args:
        seq: sizes of the model.
        batch: rows.
        most: tokens that a row can ever have.
        device: where the pages are.
        dtype: of keys and values.
    """

    slots = 0  # no block of codes: their number is not known in advance, and they are kept

    def __init__(
        self, seq: SequenceConfig, batch: int, most: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.capacity, self.most, self.length, self.size = batch, most, 0, 0
        self.sessions = torch.arange(batch, device=device)
        self._tokens = torch.arange(0, device=device)
        self.k = torch.zeros(seq.layers, 0, PAGE, seq.kv_heads, seq.head_dim, device=device, dtype=dtype)
        self.v = self.k

    def reserve(self, tokens: int) -> None:
        """Make room for rows of ``tokens``; pages that are too few at least double, up to ``most`` tokens."""
        if tokens <= self.size:
            return
        pages = -(-max(tokens, min(2 * self.size, self.most)) // PAGE)
        old, self.size = self.size, pages * PAGE
        self._tokens = torch.arange(self.size, device=self.sessions.device)
        layers, _, _, *heads = self.k.shape
        grown = []
        for pool in (self.k, self.v):
            new = pool.new_zeros(layers, self.capacity, self.size, *heads)  # zeros, so that what nobody sees is no NaN
            new[:, :, :old] = pool.view(layers, self.capacity, old, *heads)
            grown.append(new.view(layers, self.capacity * pages, PAGE, *heads))
        self.k, self.v = grown

    def place(self, tokens: int) -> Placement:
        """Place the next ``tokens`` of every row; they count as there from now on.

        A placement is good until the pages grow, which only a later call does.
        """
        start, self.length = self.length, self.length + tokens
        self.reserve(self.length)
        pages = self.size // PAGE
        slots = self._tokens[start : self.length].expand(self.capacity, -1)
        table = self.sessions.unsqueeze(1) * pages + self._tokens[:pages]
        context = torch.zeros(self.capacity, dtype=torch.int32, device=slots.device)
        return Placement(self.sessions, slots, slots, table.to(torch.int32), context, context + start)

    def rows(self, place: Placement) -> Tensor:
        """Where the tokens of ``place`` stand in the pool, int64 ``[B, N]``, counted in tokens."""
        return place.sessions.unsqueeze(1) * self.size + place.slots

    def mask(self, place: Placement) -> Tensor:
        """What the tokens of ``place`` see, bool ``[B, 1, N, S]`` over the pages of their row: those up to itself."""
        return (self._tokens <= place.slots.unsqueeze(2)).unsqueeze(1)


class PlainStep(PackedStep):
    """New tokens of a plain sequence; ``bias`` is ``[B, N, S]`` or None, and ``slots`` ends with the last of them."""

    __slots__ = ()

    def column(self, j: int) -> PlainStep:
        """Token ``j`` alone: it sees those up to itself."""
        assert self.bias is not None  # which only the first tokens of a sequence lack, that enter together
        at, slots = slice(j, j + 1), self.slots - self.rows.shape[1] + j + 1
        return self._replace(
            cos=self.cos[:, at], sin=self.sin[:, at], rows=self.rows[:, at], bias=self.bias[:, at], slots=slots
        )


class PlainPacked(Packed):
    """``Packed`` over growing pages."""

    def prepare(self, cache: Any, place: Placement) -> PlainStep:
        """Work out what all layers share."""
        return PlainStep(*super().prepare(cache, place))

    def window(self, cache: Any, place: Placement) -> tuple[Tensor | None, int]:
        """What the tokens of ``place`` see; those that come first, of which a prompt may have many, need no bias."""
        if cache.length == place.slots.shape[1]:
            return None, cache.length
        return bias_of(cache.mask(place)[:, 0], cache.k.dtype), cache.length


class PlainNative(Native):
    """``Native`` over growing pages: a prompt by packed products, and each code by C++."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.together = PlainPacked(model)


def runner_of(model: SequenceModel, backend: str = AUTO) -> Runner:
    """The way through ``model`` over growing pages that belongs to a backend, where its weights are.

    ``auto`` takes the fused kernels on a GPU where they fit, C++ for each code on a CPU where it is built, and packed
    products in plain PyTorch elsewhere; so does ``native``, but for the kernels.

    Raises:
        BackendError: a backend asked for by name that cannot run here or does not take such sizes.
    """
    if backend == REFERENCE:
        return Eager(model)
    weight = model.head.weight
    fused = takes_kernels(model.cfg.sequence, backend, weight.device, weight.dtype)
    if fused:
        return Fused(model, TRITON)
    return PlainNative(model) if takes_native(weight.device, weight.dtype) else PlainPacked(model)


def takes_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether C++ runs a model of that dtype there."""
    return linear.pick(AUTO, device, dtype, 1, native=True) == NATIVE


def takes_kernels(seq: SequenceConfig, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model of such sizes goes through fused kernels.

    Raises:
        BackendError: they were asked for by name, and cannot run here or do not take such sizes.
    """
    if backend in (REFERENCE, NATIVE):
        return False
    widest = max(seq.hidden, seq.intermediate)
    found = linear.pick(backend, device, dtype, widest), paged.pick(backend, device, dtype, seq.head_dim)
    return REFERENCE not in found


@contextmanager
def _mode_of(model: SequenceModel) -> Iterator[None]:
    """Inference mode if the weights were made in it, whoever calls; else not, so that what is packed can be trained."""
    with torch.inference_mode(model.head.weight.is_inference()), torch.no_grad():
        yield


def pack_weights(runner: Runner) -> None:
    """Lay the weights out as ``runner`` reads them, which it does itself where they have changed since."""
    if not isinstance(runner, Eager):
        with _mode_of(runner.model):
            pack(runner.model, [])


def generate(runner: Runner, codes: Tensor, k: int, stop: Callable[[Tensor], bool] | None = None) -> Tensor:
    """Continue ``codes`` integers ``[B, N]`` greedily: int32 ``[B, k]``, or fewer columns where ``stop`` ended it.

    Args:
        runner: the sequence model and how it is run.
        codes: at least one a row; they stand at positions ``0..N-1``, in slots ``0..K-1, 0, ...``.
        k: how many to generate; ``k - 1`` further passes.
        stop: asked after every code but the last, int32 ``[B]``, whether to end with it.
    """
    with _mode_of(runner.model):
        return _generate(runner, codes, k, stop)


def _generate(runner: Runner, codes: Tensor, k: int, stop: Callable[[Tensor], bool] | None) -> Tensor:
    model, (batch, n), pages = runner.model, codes.shape, _pages_of(runner, codes, k)
    slots, logits = model.cfg.bottleneck.slots, torch.empty(0)
    together = max(PREFILL // max(batch, 1), PAGE)
    for start in range(0, n, together):
        some = codes[:, start : start + together]
        place = pages.place(some.shape[1])
        x = model.embed_codes(some, place.positions[0] % slots)
        logits = runner.logits(x, runner.prepare(pages, place))
    chosen: list[Tensor] = []
    steps: Any = None
    for i in range(k - 1):
        if i % PAGE == 0:
            steps = runner.prepare(pages, pages.place(min(PAGE, k - 1 - i)))
        code, x = runner.feed(logits, (n + i) % slots, None)
        chosen.append(code)
        if stop is not None and stop(code):
            return torch.stack(chosen, dim=1)
        logits = runner.logits(x, steps.column(i % PAGE))
    return torch.stack([*chosen, runner.choose(logits, (n + k - 1) % slots, None)], dim=1)


def _pages_of(runner: Runner, codes: Tensor, k: int) -> Any:
    """Pages for ``codes`` and ``k - 1`` more of each row: as many as the prompt and a first page of those need."""
    (batch, n), weight = codes.shape, runner.model.head.weight
    pages = GrowingPages(runner.model.cfg.sequence, batch, n + k - 1, weight.device, weight.dtype)
    pages.reserve(n + min(PAGE, k - 1))
    return pages
