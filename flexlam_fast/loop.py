"""The decision loop: from uint8 frames to actions, on the device from end to end (design section 3; Algorithm 1).

Everything that changes from one decision to the next is in tensors of fixed place, and nothing is read back in between,
so that one decision can be captured as one CUDA graph (``graphs.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexlam_fast.backend import NATIVE, TRITON
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.encoder import NativeEncoder
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.layers import normalise
from flexlam_fast.ranges import span
from flexlam_fast.sequence import decode
from flexlam_fast.sequence.cache import PagedCache
from flexlam_fast.sequence.decode import Runner
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import NativeBlock
from flexlam_fast.sequence.native_cuda import CudaBlock, cuda_runner
from flexlam_fast.sequence.sampling import Sampling
from flexlam_fast.translator import PackedTranslator, Translator, TranslatorOutput, no_actions, one_hot_actions
from flexlam_fast.types import Actions

_STREAM = 2**40  # draws before a session would meet the next one's: 18 years at 30 decisions of 64 codes a second


class Outcome(NamedTuple):
    """One decision on the device: actions, codes int32 ``[B, k]``, frame indices int64 ``[B]``."""

    actions: Actions
    codes: Tensor
    frames: Tensor

    def cpu(self) -> Outcome:
        """The same on the host, in memory that the loop does not go on using."""
        return Outcome(Actions(*(part.cpu() for part in self.actions)), self.codes.cpu(), self.frames.cpu())


class How(NamedTuple):
    """What a call may choose anew: ``budget``, temperature of the codes (0: greedy), ``top_k`` (None: all)."""

    budget: int
    temperature: float = 0.0
    top_k: int | None = None


class Stages(NamedTuple):
    """The modules a decision goes through, and the ways through the sequence model and, where there are others than the
    modules' own, translator and encoder."""

    lam: LatentActionModel
    runner: Runner
    translator: Translator
    fused: PackedTranslator | None = None
    encoder: Callable[[Tensor, Tensor], Tensor] | None = None

    def observe(self, now: Tensor, following: Tensor) -> Tensor:
        """Codes int32 ``[B, K]`` of transitions, given as pixels ``[B, C, H, W]`` in ``[-1, 1]``."""
        codes: Tensor = self.lam.bottleneck((self.encoder or self.lam.encoder)(now, following)).codes
        return codes

    @property
    def capturable(self) -> bool:
        """Whether a decision on a GPU may be captured as one CUDA graph."""
        return isinstance(self.runner, Fused) or (isinstance(self.runner, CudaBlock) and self.runner.capturable)

    def twin(self) -> Stages:
        """The same modules with runners of their own: those keep memory from call to call, for one thread at a time."""
        return Stages(self.lam, copy.copy(self.runner), self.translator, copy.copy(self.fused), copy.copy(self.encoder))

    def refresh(self) -> None:
        """Take in what has been written into weights since the last decision."""
        if self.fused is not None:
            self.fused.refresh()

    def check(self) -> None:
        """Say what a kernel could not say while the last decision was on its way.

        Raises:
            BackendError: it gave up waiting, and the decision is worth nothing.
        """
        if isinstance(self.runner, CudaBlock):
            self.runner.check()

    def score(self, codes: Tensor, k: int, previous: Tensor, dtype: torch.dtype) -> TranslatorOutput:
        """Codes int32 ``[B, k]`` and encoded previous actions to scores, the other slots filled with the null."""
        if self.fused is not None:
            return self.fused.scores(codes, k, self.lam.bottleneck.null, previous)
        out: TranslatorOutput = self.translator(self.lam.fill(codes, k).to(dtype), previous)
        return out


def stages_of(
    lam: LatentActionModel,
    sequence: SequenceModel,
    translator: Translator,
    backend: str,
    device: torch.device,
    pages: torch.dtype,
) -> Stages:
    """The way through the modules that belongs to a backend on a device, for pages of that dtype."""
    if backend == TRITON:
        levels, slots = lam.bottleneck.levels, lam.bottleneck.slots
        return Stages(lam, Fused(sequence), translator, PackedTranslator(translator, levels, slots, backend))
    if backend != NATIVE:
        return Stages(lam, Eager(sequence), translator)
    runner: Runner = NativeBlock(sequence) if device.type == "cpu" else cuda_runner(sequence, device, pages)
    encoder = NativeEncoder(lam.encoder) if device.type == "cpu" else None
    return Stages(lam, runner, translator, encoder=encoder)


class DecisionLoop:
    """The sessions of one pool: their cache, previous actions, latest frames, and the state of what is drawn."""

    def __init__(
        self, cfg: FlexLAMConfig, capacity: int, device: torch.device, dtype: torch.dtype, pages: torch.dtype, seed: int
    ) -> None:
        self.cfg, self.dtype = cfg, dtype
        self.cache = PagedCache(cfg, capacity, device, pages)
        self.previous = no_actions(capacity, cfg.translator, device)
        self.pixels = torch.zeros(capacity, cfg.channels, cfg.frame, cfg.frame, device=device, dtype=dtype)
        self.seed = torch.tensor([seed % 2**63, 0], device=device)
        # what each session has drawn so far; goes on when sessions are reset, so that no two episodes draw the same
        self.drawn = torch.arange(capacity, device=device) * _STREAM

    def state(self) -> list[Tensor]:
        """What a decision changes, but for the pages: small, so that it can be kept and put back."""
        cache = self.cache
        return [cache.t, cache.count, cache.o_frame, cache.z_frame, *self.previous, self.pixels, self.drawn]

    def restart(self, seed: int) -> None:
        """Be as a new loop of this ``seed``, without an open session, in the same tensors: graphs of it stay right."""
        self.cache.restart()
        self.forget(list(range(self.cache.capacity)))
        self.pixels.zero_()
        self.seed.copy_(torch.tensor([seed % 2**63, 0]))
        torch.arange(self.cache.capacity, out=self.drawn).mul_(_STREAM)

    def forget(self, sessions: list[int]) -> None:
        """Start sessions anew, whose cache has been reset."""
        which = torch.tensor(sessions, dtype=torch.int64, device=self.pixels.device)
        self.previous.discrete.index_fill_(0, which, -1)
        self.previous.continuous.index_fill_(0, which, 0.0)

    @torch.no_grad()
    def decide(self, stages: Stages, how: How, frames: Tensor, sessions: Tensor) -> Outcome:
        """Decide for ``sessions`` int64 ``[B]`` from their newest frames uint8 ``[B, H, W, C]``, both on the device."""
        runner, translator = stages.runner, stages.translator
        pixels = normalise(frames).to(self.dtype)
        with span("encode"):
            # of no meaning at a session's first frame, where the cache takes it for padding
            observed = stages.observe(self.pixels[sessions], pixels)
        with span("append"):
            appended = decode.append(runner, self.cache, observed, pixels, sessions)
        drawn = self.drawn[sessions]
        sampling = Sampling(how.temperature, how.top_k, self.seed, drawn) if how.temperature else None
        with span("codes"):
            codes = decode.generate(runner, self.cache, appended, how.budget, sampling)
        with span("translate"):
            previous = one_hot_actions(Actions(*(part[sessions] for part in self.previous)), self.cfg.translator)
            actions = translator.choose(stages.score(codes, how.budget, previous, self.dtype))
        changed = (*self.previous, self.pixels, self.drawn)
        for ours, new in zip(changed, (*actions, pixels, drawn + self.cache.slots), strict=True):
            ours.index_copy_(0, sessions, new.to(ours.dtype))
        return Outcome(actions, codes, self.cache.t[sessions])
