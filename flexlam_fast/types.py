"""Small records and constants that several rooms of the package share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # games and data sets need the names here, and no torch
    from torch import Tensor

#: The joint vocabulary of the four ViZDoom scenarios; a button that a scenario lacks does nothing there.
VIZDOOM_ACTIONS = ("NOOP", "TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "ATTACK", "MOVE_LEFT", "MOVE_RIGHT")


class Actions(NamedTuple):
    """Executable actions: ``discrete`` int64 ``[B, discrete dimensions]``, ``continuous`` float32 ``[B, n]``."""

    discrete: Tensor
    continuous: Tensor


class Decision(NamedTuple):
    """What one call of ``policy.act`` decided.

    ``actions`` to execute now; ``codes`` int32 ``[B, k]``, the generated prefix; ``budget`` the ``k`` that was used;
    ``frames`` int64 ``[B]``, the index ``t`` of the newest frame of each session.
    """

    actions: Actions
    codes: Tensor
    budget: int
    frames: Tensor
