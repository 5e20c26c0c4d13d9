"""All frames of a data set in a device's memory, where they fit: a batch is then a gather, without disk or copies."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import InputError

_PIECE = 1 << 26  # bytes read at a time


class FrameCache:
    """Frames of a store by global index, as tensors on a device: from its memory if they all fit, else from the store.

    Args:
        store: the data set.
        device: where frames are wanted.
        share: of the memory that is free now, what the frames may take: above 0, at most 1.

    Attributes:
        device: where frames are.
        resident: whether all frames are in its memory.
        reason: one sentence that says whether and why.

    Raises:
        InputError: a share outside ``(0, 1]``.
    """

    def __init__(self, store: EpisodeStore, device: torch.device, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise InputError(f"share: expected a number above 0 and at most 1, got {share!r}")
        self.device, self._store = torch.device(device), store
        size, free = store.num_frames * int(np.prod(store.frame_shape)), free_memory(self.device)
        self.resident = size <= share * free
        facts = f"{size / 1e9:.3g} GB of frames, {share:.0%} of {free / 1e9:.3g} GB free on {self.device}"
        told = "they fit: all are held there" if self.resident else "they do not fit: read from disk and copied"
        self.reason = f"{facts}: {told}"
        self._frames = self._load() if self.resident else None

    def take(self, indices: NDArray[np.int64] | Tensor) -> Tensor:
        """Gather frames.

        Args:
            indices: global frame indices, integers of any shape. Those that already are on a GPU are not checked, which
                would make the host wait; where frames are not resident, it waits for them.

        Returns:
            uint8 ``[*indices.shape, H, W, C]`` on the device, a fresh tensor.

        Raises:
            InputError: for an index on the host outside ``0 .. num_frames - 1``.
        """
        shape = self._store.frame_shape
        if self._frames is None:
            wanted = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
            return torch.from_numpy(self._store.take(wanted)).to(self.device)
        index = torch.as_tensor(indices)
        if index.is_cpu:
            self._check(index)
        rows = self._frames.index_select(0, index.reshape(-1).to(self.device, torch.int64, non_blocking=True))
        return rows.view(torch.uint8).view(*index.shape, *shape)

    def _check(self, index: Tensor) -> None:
        low, high = (int(x) for x in torch.aminmax(index)) if index.numel() else (0, 0)
        if index.is_floating_point() or index.dtype == torch.bool or low < 0 or high >= self._store.num_frames:
            last = self._store.num_frames - 1
            raise InputError(f"indices: expected integers in 0..{last}, got {low}..{high} in {index.dtype}")

    def _load(self) -> Tensor:
        """Frames as rows of the widest words that divide them: a gather moves words, and bytes one by one are slow."""
        count, pixels = self._store.num_frames, int(np.prod(self._store.frame_shape))
        frames = torch.empty(count, pixels, dtype=torch.uint8, device=self.device)
        step = max(1, _PIECE // pixels)
        for first in range(0, count, step):
            piece = self._store.take(np.arange(first, min(first + step, count)))
            frames[first : first + step] = torch.from_numpy(piece).view(len(piece), pixels)
        return frames.view(torch.int64) if pixels % 8 == 0 else frames


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in this machine's memory, where 0 means that it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
