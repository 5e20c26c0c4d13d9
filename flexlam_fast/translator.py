"""Translator: null-filled latents and the previous action become an action (paper sections 4.2, A.4, Table 7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlam_fast.checks import check_tensor
from flexlam_fast.config import FlexLAMConfig, TranslatorConfig, check_config
from flexlam_fast.errors import InputError
from flexlam_fast.layers import init_linear
from flexlam_fast.ops.translate import TranslatorWeights, pack_translator, translate
from flexlam_fast.types import Actions


class TranslatorOutput(NamedTuple):
    """``logits``: per discrete dimension ``[B, choices]``; ``continuous [B, n]``."""

    logits: tuple[Tensor, ...]
    continuous: Tensor


class HourglassBlock(nn.Module):
    """Residual block that narrows and widens again: ``wide -> hidden -> wide``."""

    def __init__(self, wide: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(wide)
        self.down = nn.Linear(wide, hidden)
        self.up = nn.Linear(hidden, wide)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, wide]`` to ``[B, wide]``."""
        out: Tensor = x + self.up(F.gelu(self.down(self.norm(x))))
        return out


class Translator(nn.Module):
    """Hourglass MLP with a cross-entropy head per discrete action dimension and an MSE head for the continuous ones.

    The input is fixed in size: every slot is there, filled with the null latent where it was not retained. There is no
    length input and no mask.
    """

    def __init__(self, cfg: FlexLAMConfig) -> None:
        super().__init__()
        check_config(cfg)
        self.cfg = cfg.translator
        inputs = cfg.bottleneck.slots * cfg.bottleneck.dim + self.cfg.action_dim
        self.stem = nn.Linear(inputs, self.cfg.wide)
        self.blocks = nn.ModuleList(HourglassBlock(self.cfg.wide, self.cfg.hidden) for _ in range(self.cfg.depth))
        self.norm = nn.LayerNorm(self.cfg.wide)
        self.head = nn.Linear(self.cfg.wide, self.cfg.action_dim)
        self.apply(init_linear)

    def forward(self, latents: Tensor, previous: Tensor) -> TranslatorOutput:
        """Latents ``[B, K, d]`` and encoded previous actions ``[B, action_dim]`` (see :func:`encode_actions`)."""
        x = self.stem(torch.cat([latents.flatten(1), previous.to(latents.dtype)], dim=1))
        for block in self.blocks:
            x = block(x)
        return self.split(self.head(self.norm(x)).float())

    def split(self, out: Tensor) -> TranslatorOutput:
        """Head outputs fp32 ``[B, action_dim]`` by action dimension."""
        parts = out.split([*self.cfg.discrete, self.cfg.continuous], dim=1)
        return TranslatorOutput(tuple(parts[:-1]), parts[-1])

    def decide(self, latents: Tensor, previous: Tensor) -> Actions:
        """The most likely choice of every discrete dimension, and the continuous values."""
        return self.choose(self(latents, previous))

    def choose(self, out: TranslatorOutput) -> Actions:
        """The most likely choice of every discrete dimension, and the continuous values, of ``out``."""
        chosen = [logits.argmax(-1) for logits in out.logits]
        empty = out.continuous.new_zeros((len(out.continuous), 0), dtype=torch.int64)
        return Actions(torch.stack(chosen, dim=1) if chosen else empty, out.continuous)


class PackedTranslator:
    """A translator as one fused op from codes to scores (``ops.translate``), with weights laid out for it.

    The packed weights are copies: :meth:`refresh` renews them, in place, when the translator's own have changed.
    """

    def __init__(self, translator: Translator, levels: tuple[int, ...], slots: int, backend: str) -> None:
        self.translator, self.levels, self.slots, self.backend = translator, levels, slots, backend
        self.weights = self._pack()
        self.stamp = self._stamp()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs the translator of the copy."""
        return type(self), (self.translator, self.levels, self.slots, self.backend)

    def refresh(self) -> None:
        """Copy the translator's weights again if they were written since the last time."""
        stamp = self._stamp()
        if stamp is None or stamp != self.stamp:
            with torch.no_grad():
                for ours, new in zip(self.weights, self._pack(), strict=True):
                    ours.copy_(new)
            self.stamp = stamp

    def scores(self, codes: Tensor, k: int, null: Tensor, previous: Tensor) -> TranslatorOutput:
        """From ``k`` codes int32 ``[B, k]`` and encoded previous actions fp32 ``[B, A]``."""
        out = translate(codes, k, self.levels, null, previous, self.weights, slots=self.slots, backend=self.backend)
        return self.translator.split(out)

    @torch.inference_mode(False)  # so that they can be written again outside of inference mode
    @torch.no_grad()
    def _pack(self) -> TranslatorWeights:
        return pack_translator(self.translator.state_dict())

    def _stamp(self) -> list[tuple[int, int]] | None:
        """What changes with the translator's weights; None for weights made in inference mode, which count nothing."""
        weights = list(self.translator.parameters())
        if any(p.is_inference() for p in weights):
            return None
        return [(p.data_ptr(), p._version) for p in weights]


def translator_loss(out: TranslatorOutput, target: Actions) -> Tensor:
    """Mean over the batch of cross-entropy (summed over discrete dimensions) plus MSE of the continuous ones."""
    loss = torch.zeros((), device=out.continuous.device)
    for i, logits in enumerate(out.logits):
        loss = loss + F.cross_entropy(logits, target.discrete[:, i])
    if out.continuous.shape[1]:
        loss = loss + F.mse_loss(out.continuous, target.continuous.float())
    return loss


def encode_actions(actions: Actions, cfg: TranslatorConfig) -> Tensor:
    """Actions as the translator sees them: one-hot per discrete dimension, then the continuous values, fp32 ``[B, A]``.

    A discrete ``-1`` means "none yet" (the start of an episode) and encodes as zeros.

    Raises:
        InputError: wrong shape or dtype, or a choice outside its dimension.
    """
    check_tensor("actions.discrete", actions.discrete, ["B", len(cfg.discrete)], torch.int64)
    check_tensor("actions.continuous", actions.continuous, ["B", cfg.continuous], torch.float32)
    for i, choices in enumerate(cfg.discrete):
        chosen = actions.discrete[:, i]
        if bool(((chosen < -1) | (chosen >= choices)).any()):
            raise InputError(f"actions.discrete: expected -1..{choices - 1} in dimension {i}, got {chosen.tolist()}")
    return one_hot_actions(actions, cfg)


def one_hot_actions(actions: Actions, cfg: TranslatorConfig) -> Tensor:
    """:func:`encode_actions` of actions that the translator made itself: nothing is read back from the device."""
    device = actions.discrete.device
    parts = [
        (actions.discrete[:, i : i + 1] == torch.arange(choices, device=device)).float()
        for i, choices in enumerate(cfg.discrete)
    ]
    return torch.cat([*parts, actions.continuous], dim=1)


def no_actions(batch: int, cfg: TranslatorConfig, device: torch.device) -> Actions:
    """What stands for the previous action before the first decision."""
    return Actions(
        torch.full((batch, len(cfg.discrete)), -1, dtype=torch.int64, device=device),
        torch.zeros(batch, cfg.continuous, device=device),
    )
