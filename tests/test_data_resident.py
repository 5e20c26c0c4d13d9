"""Frames held on the device: the store's own, and one sentence that says why they are there or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fsq_cases import DEVICES

pytest.importorskip("pyarrow")

from test_data_store import write

from flexlam_fast.data import resident
from flexlam_fast.data.resident import FrameCache
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import InputError

every_device = pytest.mark.parametrize("device", [torch.device(d) for d in DEVICES], ids=str)


def caches(path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[FrameCache]]:
    """All 36 frames, 2,160 bytes, and a cache that holds them beside one for which there is no room."""
    frames, _ = write(path / "set", [5, 20, 2, 9])
    store = EpisodeStore.open(path / "set")
    found = []
    for free in (4320, 4319):
        monkeypatch.setattr(resident, "free_memory", lambda device, free=free: free)
        found.append(FrameCache(store, device, 0.5))
    return frames, found


@every_device
def test_frames_are_the_stores_whether_resident_or_not(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_PIECE", 7 * 60)  # several pieces, the last one short
    frames, found = caches(tmp_path, device, monkeypatch)
    assert [c.resident for c in found] == [True, False]
    wanted = np.array([[[0, 35], [8, 6]], [[7, 7], [34, 13]]])
    for cache in found:
        for indices in (wanted, torch.from_numpy(wanted), torch.from_numpy(wanted).to(device), wanted.astype(np.int32)):
            taken = cache.take(indices)
            assert (taken.dtype, taken.device.type) == (torch.uint8, device.type)
            np.testing.assert_array_equal(taken.cpu().numpy(), frames[wanted])
        assert cache.take(np.empty((0, 2), dtype=np.int64)).shape == (0, 2, 4, 5, 3)
        taken = cache.take(wanted)
        taken.zero_()
        np.testing.assert_array_equal(cache.take(wanted).cpu().numpy(), frames[wanted]), "a fresh tensor"


@every_device
def test_one_sentence_says_whether_and_why(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (held, left) = caches(tmp_path, device, monkeypatch)
    facts = f"2.16e-06 GB of frames, 50% of 4.32e-06 GB free on {device}"
    assert held.reason == f"{facts}: they fit: all are held there"
    assert left.reason == f"{facts}: they do not fit: read from disk and copied"


def test_frames_whose_bytes_are_whole_words_are_moved_by_words(tmp_path: Path) -> None:
    from flexlam_fast.data.store import EpisodeWriter

    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    with EpisodeWriter(tmp_path / "set", (4, 4, 3), ("stay",)) as writer:
        writer.add(frames, np.zeros(8, dtype=np.int64), np.zeros(8), "task", "train", seed=0)
    cache = FrameCache(EpisodeStore.open(tmp_path / "set"), torch.device("cpu"))
    assert cache.resident, cache.reason
    np.testing.assert_array_equal(cache.take(np.array([8, 0, 3])).numpy(), frames[[8, 0, 3]])


def test_indices_out_of_range_and_a_share_of_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = caches(tmp_path, torch.device("cpu"), monkeypatch)
    for cache in found:
        for bad in (np.array([36]), np.array([-1]), np.array([0.5])):
            with pytest.raises(InputError, match=r"indices: expected integers in 0\.\.35"):
                cache.take(bad)
    for share in (0, 1.5):
        with pytest.raises(InputError, match=r"^share: expected a number above 0 and at most 1, got "):
            FrameCache(found[0]._store, torch.device("cpu"), share)


@every_device
def test_free_memory_is_some_of_what_there_is(device: torch.device) -> None:
    assert 1 << 20 < resident.free_memory(device) < 1 << 50
