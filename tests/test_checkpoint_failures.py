"""Failures during a save: a full disk or a kill never costs the old checkpoint."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import names_beside, save, seed_of

from flexlam_fast.checkpoint import load_checkpoint, recover_checkpoint
from flexlam_fast.errors import StorageError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "last", 1)
    return tmp_path / "last"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "second rename"])
def test_a_failing_disk_is_one_sentence_and_the_old_checkpoint_stays(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    name, real = call.split()[-1], getattr(os, call.split()[-1])
    left = [call.startswith("second")]

    def fail(*args: Any) -> Any:
        if left.pop() if left else False:
            return real(*args)
        monkeypatch.undo()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(StorageError, match=f"last: expected to write the checkpoint, got: {os.strerror(code)}"):
        save(checkpoint, 2)
    assert seed_of(load_checkpoint(checkpoint)) == 1
    assert names_beside(checkpoint) == ["last"]


def start_child(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "flexlam_fast.checkpoint"])
    child = context.Process(target=target, args=args)
    child.start()
    return child


def run_child(target: Callable[..., None], *args: Any) -> int:
    child = start_child(target, *args)
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def save_with_little_room(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
    try:
        save(folder, 2, size=1 << 16)
    except StorageError as error:
        os._exit(0 if "File too large" in str(error) else 3)
    os._exit(4)


def test_a_file_size_limit_is_one_sentence_and_the_old_checkpoint_stays(checkpoint: Path) -> None:
    assert run_child(save_with_little_room, checkpoint) == 0
    assert seed_of(load_checkpoint(checkpoint)) == 1
    assert names_beside(checkpoint) == ["last"]


def save_until_step(folder: Path, step: int) -> None:
    """Save, and die just before the ``step``-th change of the disk."""
    left = [step]
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        real = getattr(os, name)

        def counted(*args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **options)

        setattr(os, name, counted)
    save(folder, 2)
    os._exit(0)


def test_a_kill_before_any_step_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes, gaps = [], 0
    for step in range(100):
        folder = tmp_path / f"{step}" / "last"
        save(folder, 1)
        code = run_child(save_until_step, folder, step)
        gaps += not folder.exists()
        outcomes.append(seed_of(load_checkpoint(folder)))
        previous = folder.parent / ".last.previous"
        assert not previous.exists() or seed_of(load_checkpoint(previous)) == 1  # it may be all that is left
        save(folder, 3)
        assert seed_of(load_checkpoint(folder)) == 3
        assert names_beside(folder) == ["last"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes == sorted(outcomes)  # old until the one moment of change, new from then on
    assert outcomes.count(1) >= 8
    assert outcomes.count(2) >= 8
    assert gaps == 1  # the kill between the two renames did happen


def save_for_ever(folder: Path, first: int, size: int, saved_one: Any) -> None:
    for seed in range(first, first + 1000):
        save(folder, seed, size)
        saved_one.set()


def test_a_kill_at_a_random_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    draw, folder, size = random.Random(7), tmp_path / "last", 4096
    for turn in range(1, 21):
        saved_one = multiprocessing.get_context("forkserver").Event()
        child = start_child(save_for_ever, folder, 1000 * turn, size, saved_one)
        assert saved_one.wait(60)
        time.sleep(draw.uniform(0.0, 0.1))
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        # A checkpoint of this turn: what was once saved stays saved.
        assert seed_of(load_checkpoint(folder), size) // 1000 == turn
    recover_checkpoint(folder)
    assert names_beside(folder) == ["last"]
