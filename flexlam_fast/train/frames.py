"""Where a training's frames come from: a GPU's own memory where all of them fit, else the disk, through the loader."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.data.resident import FrameCache
from flexlam_fast.data.store import EpisodeStore


class Frames:
    """Frames of a store for the batches of one process.

    Attributes:
        reason: one sentence that says where they are.
    """

    def __init__(self, store: EpisodeStore, device: torch.device) -> None:
        self.store = store
        cache = FrameCache(store, device) if device.type == "cuda" else None
        self.cache = cache if cache is not None and cache.resident else None
        self.reason = "frames are read ahead of each step" if cache is None else cache.reason

    def read(self, index: NDArray[np.int64]) -> Tensor:
        """What a batch has of the frames ``index`` on the host: uint8 frames, or indices where they are resident."""
        return torch.from_numpy(self.store.take(index) if self.cache is None else index)

    def on_device(self, read: Tensor) -> Tensor:
        """uint8 frames ``[*index.shape, H, W, C]`` of what :meth:`read` gave, after it was moved to the device."""
        return read if self.cache is None else self.cache.take(read)
