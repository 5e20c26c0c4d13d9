"""The codes of a data set, encoded once by a frozen LAM and kept beside the run."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import StorageError
from flexlam_fast.lam import LatentActionModel


def encode_dataset(
    lam: LatentActionModel, store: EpisodeStore, folder: Path, device: torch.device, batch: int = 256
) -> NDArray[np.int32]:
    """Return the codes of every transition, int32 ``[num_frames, K]``, memory-mapped.

    Row ``i`` is the block of the transition ``(i, i + 1)``, or -1 where there is none. The file is named after the
    LAM's weights and the data, so it is found again by the same pair and by no other. Encoding is in fp32, as when
    acting.

    Raises:
        StorageError: the disk is full or forbids it.
    """
    path = folder / f"codes-{fingerprint(lam)[:16]}-{store.fingerprint[:16]}.npy"
    if not path.exists():
        codes = _encode(lam, store, device, batch)
        unfinished = path.with_suffix(".part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                np.save(file, codes)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise StorageError(f"{path}: expected to write the codes, got: {error.strerror or error}") from error
    found: NDArray[np.int32] = np.load(path, mmap_mode="r")
    return found


def fingerprint(lam: LatentActionModel) -> str:
    """sha256 over the weights that decide the codes (encoder and bottleneck), by name."""
    digest = hashlib.sha256(str(lam.cfg.bottleneck.levels).encode())
    for name, tensor in sorted(lam.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _encode(lam: LatentActionModel, store: EpisodeStore, device: torch.device, batch: int) -> NDArray[np.int32]:
    codes = np.full((store.num_frames, lam.cfg.bottleneck.slots), -1, dtype=np.int32)
    index = np.concatenate([store.transitions(split) for split in ("train", "test")])
    lam.eval()
    for start in tqdm(range(0, len(index), batch), desc="encode", unit="batch", dynamic_ncols=True):
        rows = index[start : start + batch]
        now, following = torch.from_numpy(store.take(np.stack([rows, rows + 1]))).to(device)
        codes[rows] = lam.encode(now, following).cpu().numpy()
    return codes
