"""Latent action model: encoder, bottleneck and decoder together (paper sections 3, 4.1; design section 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlam_fast.ambient import isolated, outside_autocast
from flexlam_fast.backend import AUTO, REFERENCE, check_weights_dtype, choose, find_device
from flexlam_fast.bottleneck import Bottleneck, Quantized
from flexlam_fast.capture import GraphedFunction
from flexlam_fast.checkpoint import copy_tensors, save_weights
from flexlam_fast.checks import check_budget, check_tensor, describe
from flexlam_fast.config import FlexLAMConfig, check_config
from flexlam_fast.decoder import Decoder
from flexlam_fast.encoder import Encoder
from flexlam_fast.errors import InputError
from flexlam_fast.flow import euler, interpolate, velocity_of
from flexlam_fast.layers import Attention, as_pixels, product_dtype, set_backend, to_uint8
from flexlam_fast.manifest import MODEL
from flexlam_fast.ops.arguments import check_prefix
from flexlam_fast.ops.attention import AttentionChoice, choose_attention
from flexlam_fast.ops.flow_loss import flow_loss
from flexlam_fast.ops.patches import flow_patches
from flexlam_fast.run_folder import LAM, Found, find_stage


class LamLoss(NamedTuple):
    """``loss`` scalar, what is minimised; ``flow`` scalar, its rectified-flow part; ``codes`` int32 ``[B, K]``."""

    loss: Tensor
    flow: Tensor
    codes: Tensor


class LatentActionModel(nn.Module):
    """What turns a transition into codes, codes into latents, and latents into the next frame.

    Frames are uint8 ``[B, H, W, C]`` or fp32 pixels ``[B, C, H, W]`` in ``[-1, 1]`` everywhere.
    """

    #: of the ops of training; ``layers.set_backend`` sets it here and in all layers.
    backend = REFERENCE

    def __init__(self, cfg: FlexLAMConfig, backend: str = "auto") -> None:
        super().__init__()
        check_config(cfg)
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.bottleneck = Bottleneck(cfg.bottleneck, backend)
        self.decoder = Decoder(cfg)
        self._graphs: tuple[tuple[int, ...], GraphedFunction] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> Self:
        """Load a latent action model, in evaluation mode and without gradients.

        Args:
            name: what :meth:`save_pretrained` or a training stage (``lam``, ``joint``) wrote, a stage's folder, that of
                a run, or a policy, by its folder or shipped name. Of a stage's two checkpoints ``best`` is taken if it
                is there, else ``last``.
            device: where it shall live; ``"auto"`` takes a GPU where there is one.
            dtype: float32, bfloat16 or float16, of encoder and decoder; the bottleneck stays float32.
            backend: ``"auto"`` or a name (see ``flexlam_fast.backend``).

        Raises:
            CheckpointError: nothing is there, something else, or a checkpoint that is corrupt or too new.
            BackendError: a backend asked for by name that cannot run here.
            InputError: a device that is not here, or another dtype.
        """
        return cls.of(find_stage(name, LAM), device=device, dtype=dtype, backend=backend)

    @classmethod
    def of(cls, found: Found, *, device: torch.device | str, dtype: torch.dtype, backend: str) -> Self:
        """:meth:`from_pretrained` of what has been found."""
        check_weights_dtype("dtype", dtype)
        where = find_device(device)
        taken = choose(backend, where).name
        lam = cls.loaded(found, backend)
        lam.settle(where, dtype, taken)
        return lam

    @classmethod
    @torch.inference_mode(False)  # so that the weights can be trained later
    def loaded(cls, found: Found, backend: str) -> Self:
        """What has been found, fp32 on the CPU, with the plain modules of training."""
        with torch.random.fork_rng(devices=[]):
            lam = cls(found.cfg, backend)
        copy_tensors(str(found.path / MODEL), lam.state_dict(), found.tensors)
        return lam

    def save_pretrained(
        self, directory: str | Path, *, dtype: torch.dtype | None = None, notes: dict[str, str] | None = None
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` and a manifest of sha256 sums.

        Args:
            directory: where; an older checkpoint there is replaced in one step.
            dtype: of the stored weights, float32, bfloat16 or float16; None keeps them as they are.
            notes: further text files by name.

        Raises:
            StorageError: the disk is full or forbids it; what was there before is intact.
        """
        save_weights(directory, self.state_dict(), self.cfg.to_json(), dtype, notes)

    def settle(
        self, device: torch.device, dtype: torch.dtype, backend: str, attention: str = "auto"
    ) -> AttentionChoice:
        """Get ready to encode and decode: no gradients, encoder and decoder in ``dtype``, kernels of ``backend``.

        Raises:
            BackendError: an ``attention`` asked for by name that cannot run there.
        """
        self.to(device).eval().requires_grad_(False)
        for part in (self.encoder, self.decoder):
            part.to(dtype)
        kernels = REFERENCE if backend == REFERENCE else AUTO
        set_backend(self.decoder, kernels, device)
        if device.type == "cuda":  # norms and activations in one launch each; a CPU has the whole encoder in one call
            set_backend(self.encoder, kernels, device)
        layers = [part for part in self.encoder.modules() if isinstance(part, Attention)]
        chosen = choose_attention(device, dtype, layers[0].head_dim, attention)
        for layer in layers:
            layer.implementation = chosen.name
        return chosen

    def pixels(self, name: str, frames: Tensor) -> Tensor:
        """Frames in either accepted form to fp32 pixels, or one sentence."""
        return as_pixels(name, frames, self.cfg.frame, self.cfg.channels)

    @isolated
    @torch.no_grad()
    def encode(self, o_t: Tensor, o_next: Tensor) -> Tensor:
        """Codes int32 ``[B, K]`` of the transitions ``(o_t, o_next)``: complete blocks, whatever the budget.

        Raises:
            InputError: frames of another shape or dtype, or with NaN.
        """
        now, following = self.pixels("o_t", o_t), self.pixels("o_next", o_next)
        check_tensor("o_next in pixels", following, list(now.shape), following.dtype)
        return self.bottleneck(self.encoder(now, following)).codes

    @outside_autocast
    def latents(self, codes: Tensor, k: int | Tensor) -> Tensor:
        """Null-filled latents fp32 ``[B, K, d]`` of the first ``k`` codes.

        Args:
            codes: integers ``[B, n]`` with ``k <= n <= K``; what stands at or beyond ``k`` does not matter.
            k: one budget for all, or ``[B]`` integers, within ``0..n``.

        Raises:
            BudgetError: one ``k`` outside ``0..K``, or more than there are codes.
            InputError: wrong shape or dtype, ``k [B]`` out of range, or a retained code outside ``[0, C)``.
        """
        check_tensor("codes", codes, ["B", "n"], (torch.int32, torch.int64))
        batch, given, slots = *codes.shape, self.cfg.bottleneck.slots
        if given > slots:
            raise InputError(f"codes: expected at most {slots} per block, got {describe(codes)}")
        if not isinstance(k, Tensor):
            k = torch.full((batch,), check_budget("k", k, 0, given), device=codes.device)
        check_prefix(k, self.bottleneck.null, codes.shape[:1], given, self.cfg.bottleneck.dim, codes.device)
        return self.fill(codes, k)

    def fill(self, codes: Tensor, k: int | Tensor) -> Tensor:
        """:meth:`latents` of codes and a budget that this model made itself, without the checks."""
        if not isinstance(k, Tensor):
            k = torch.full((len(codes),), k, device=codes.device)
        return self.bottleneck.lookup(F.pad(codes, (0, self.cfg.bottleneck.slots - codes.shape[1])), k)

    @isolated
    @torch.no_grad()
    def decode(
        self, o_t: Tensor, latents: Tensor, steps: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample the next frame, uint8 ``[B, H, W, C]``, by Euler steps of the flow from noise.

        Args:
            o_t: the present frames.
            latents: ``[B, K, d]`` fp32 from :meth:`latents`.
            steps: Euler steps; None takes the configuration's.
            generator: draws the noise; None takes torch's own.

        Raises:
            InputError: wrong shape or dtype, or fewer than one step.
        """
        now = self.pixels("o_t", o_t)
        steps = check_budget("steps", self.cfg.decoder.steps if steps is None else steps, 1, 100_000)
        shape = [now.shape[0], self.cfg.bottleneck.slots, self.cfg.bottleneck.dim]
        check_tensor("latents", latents, shape, torch.float32)
        noise = torch.randn(now.shape, generator=generator, device=now.device)
        return self._sampler(now.device)(noise, now, latents, steps)

    def sample(self, noise: Tensor, now: Tensor, latents: Tensor, steps: int) -> Tensor:
        """All Euler steps from ``noise``, uint8 ``[B, H, W, C]``; arguments as :meth:`decode` has checked them."""
        return to_uint8(euler(lambda x, tau: self.velocity(x, tau, now, latents), noise, steps))

    def _sampler(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
        """:meth:`sample`, on a GPU as one CUDA graph for each batch size and number of steps."""
        if device.type != "cuda":
            return self.sample
        places = tuple(p.data_ptr() for p in self.decoder.parameters())  # weights that have moved leave a graph behind
        if self._graphs is None or self._graphs[0] != places:
            self._graphs = places, GraphedFunction(self.sample, device)
        return self._graphs[1]

    def __getstate__(self) -> dict[str, Any]:
        """Graphs belong to the weights they were captured with: copies have none."""
        return {**super().__getstate__(), "_graphs": None}

    def velocity(self, x: Tensor, tau: Tensor, now: Tensor, latents: Tensor) -> Tensor:
        """The flow's velocity ``[B, C, H, W]`` fp32 at ``x`` and time ``tau [B]``, whatever the decoder predicts."""
        out: Tensor = self.decoder(x, tau, now, latents)
        if self.cfg.decoder.predict == "frame":
            return velocity_of(now.float() + out, x.float(), tau)
        return out

    def loss(
        self,
        now: Tensor,
        following: Tensor,
        keep: Tensor,
        noise: Tensor,
        tau: Tensor,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> LamLoss:
        """Rectified-flow loss of a batch (paper A.5) with everything random given by the caller.

        Args:
            now: pixels of ``o_t``, ``[B, C, H, W]``.
            following: pixels of ``o_{t+1}``, ``[B, C, H, W]``.
            keep: retained prefix lengths int64 ``[B]``.
            noise: standard normal, ``[B, C, H, W]``.
            tau: flow times ``[B]``.
            mean: of a tensor over the processes that share a batch in equal parts, with its gradient; None: one alone.
        """
        z = self.encoder(now, following)
        quantized = self.bottleneck(z, keep)
        sample = interpolate(following, noise, tau)
        velocity = self.velocity(sample.x, sample.tau, now, quantized.latents)
        flow = (velocity - sample.target).square().mean()
        return self._loss(flow, z, quantized, mean)

    def loss_of_frames(
        self,
        now: Tensor,
        following: Tensor,
        keep: Tensor,
        noise: Tensor,
        tau: Tensor,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> LamLoss:
        """:meth:`loss` straight from stored frames, by the ops of :attr:`backend`.

        Args:
            now: ``o_t``, uint8 ``[B, H, W, C]``.
            following: ``o_{t+1}``, likewise.
            keep: as in :meth:`loss`.
            noise: fp32 ``[B, C * H * W]``.
            tau: as in :meth:`loss`.
            mean: likewise.
        """
        z = self.encoder.forward_frames(now, following)
        quantized = self.bottleneck(z, keep)
        return self._loss(self.flow_of_frames(now, following, quantized.latents, noise, tau), z, quantized, mean)

    def flow_of_frames(self, now: Tensor, following: Tensor, latents: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
        """The rectified-flow part of :meth:`loss_of_frames`, scalar, of whatever latents ``[B, K, d]``."""
        dec, backend = self.cfg.decoder, self.backend
        dtype = product_dtype(self.decoder.embed.weight)
        patches = flow_patches(now, following, noise, tau, dec.patch, dtype=dtype, backend=backend)
        out = self.decoder.forward_patches(patches, tau, latents)
        return flow_loss(out, now, following, noise, tau, predict=dec.predict, backend=backend)

    def _loss(self, flow: Tensor, z: Tensor, quantized: Quantized, mean: Callable[[Tensor], Tensor] | None) -> LamLoss:
        spread = self.cfg.bottleneck.spread
        return LamLoss(flow + spread * spread_loss(z, mean) if spread else flow, flow, quantized.codes)


def spread_loss(z: Tensor, mean: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """How far the standard deviation over the batch of every channel of ``z [B, K, d]`` stays below 1, on average.

    ``mean`` is that over the processes that share the batch, as in :meth:`LatentActionModel.loss`.
    """
    z = z.float()
    variance = z.var(0, unbiased=False) if mean is None else mean((z - mean(z.mean(0))).square().mean(0))
    return (1 - (variance + 1e-6).sqrt()).clamp_min(0).mean()
