"""Batches made ahead: the same ones in the same order, errors where they belong, and a thread that always ends."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flexlam_fast.errors import InputError
from flexlam_fast.train.loader import Loader

CPU = torch.device("cpu")


class Batch(NamedTuple):
    """What a stage would make."""

    frames: Tensor
    index: Tensor
    step: int


def make(step: int) -> Batch:
    """A batch that is a function of its step."""
    generator = torch.Generator().manual_seed(step)
    frames = torch.randint(0, 256, (2, 3, 4, 4, 3), dtype=torch.uint8, generator=generator)
    return Batch(frames, torch.arange(step, step + 3), step)


def same(ours: Batch, theirs: Batch) -> bool:
    return torch.equal(ours.frames.cpu(), theirs.frames) and torch.equal(ours.index.cpu(), theirs.index)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for what a thread is about to do, at most 10 seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    assert true()


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "flexlam-loader"]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> object:
    yield
    gc.collect()
    wait_until(lambda: not threads())


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_batches_are_those_of_make_in_the_order_of_the_steps(ahead: int) -> None:
    steps = [3, 4, 5, 9, 1]
    with Loader(make, steps, CPU, ahead=ahead) as loader:
        batches = list(loader)
    assert [b.step for b in batches] == steps
    assert all(isinstance(b, Batch) and same(b, make(b.step)) for b in batches)


def test_a_plain_tuple_stays_one() -> None:
    with Loader(lambda step: (torch.tensor(step), "note"), [1], CPU) as loader:
        assert next(loader) == (torch.tensor(1), "note")


def test_no_more_batches_are_made_ahead_than_asked_for() -> None:
    made: list[int] = []

    def watched(step: int) -> tuple[int]:
        made.append(step)
        return (step,)

    with Loader(watched, itertools.count(), CPU, ahead=3) as loader:
        for taken in range(1, 6):
            next(loader)
            wait_until(lambda taken=taken: len(made) == taken + 3)
            time.sleep(0.01)
            assert len(made) == taken + 3
    assert made == list(range(8))


def test_batches_are_made_while_the_consumer_works() -> None:
    ready = threading.Event()

    def second_is_ready(step: int) -> tuple[int]:
        if step == 1:
            ready.set()
        return (step,)

    with Loader(second_is_ready, range(2), CPU) as loader:
        assert next(loader) == (0,)
        assert ready.wait(10), "made without being asked for"
        assert next(loader) == (1,)


def test_an_exception_is_raised_at_the_step_it_belongs_to() -> None:
    def fails(step: int) -> Batch:
        if step == 2:
            raise ValueError("step 2 has no frames")
        return make(step)

    loader = Loader(fails, range(5), CPU, ahead=4)
    wait_until(lambda: not threads())  # it has failed long before anybody asks
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(ValueError, match="step 2 has no frames"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_an_exception_of_the_steps_themselves_is_raised_too() -> None:
    def steps() -> object:
        yield 0
        raise RuntimeError("no more steps")

    with Loader(make, steps(), CPU) as loader:  # type: ignore[arg-type]
        assert next(loader).step == 0
        with pytest.raises(RuntimeError, match="no more steps"):
            next(loader)


def test_closing_ends_a_thread_that_waits_for_room_at_once() -> None:
    loader = Loader(make, itertools.count(), CPU, ahead=1)
    next(loader)
    began = time.monotonic()
    loader.close()
    assert not threads()
    assert time.monotonic() - began < 5
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_wakes_a_consumer_that_waits_for_a_batch() -> None:
    go, ended = threading.Event(), []

    def slow(step: int) -> tuple[int]:
        go.wait(10)
        return (step,)

    loader = Loader(slow, range(3), CPU)
    consumer = threading.Thread(target=lambda: ended.append(list(loader)))
    consumer.start()
    threading.Timer(0.05, go.set).start()
    loader.close()
    consumer.join(10)
    assert ended == [[]]


def test_a_consumer_that_breaks_off_leaves_nothing_behind() -> None:
    class Big:
        """A stand-in for what a batch holds."""

    alive: list[weakref.ref[Big]] = []

    def tracked(step: int) -> tuple[Big]:
        big = Big()
        alive.append(weakref.ref(big))
        return (big,)

    for batch in Loader(tracked, itertools.count(), CPU, ahead=2):
        assert len(batch) == 1
        break
    del batch
    gc.collect()
    wait_until(lambda: not threads())
    gc.collect()
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize("ahead", [0, -1, 1.5, True])
def test_a_number_of_batches_ahead_that_is_none_is_refused(ahead: object) -> None:
    with pytest.raises(InputError, match=r"^ahead: expected an integer of at least 1, got "):
        Loader(make, range(3), CPU, ahead=ahead)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_the_consumer_sees_whole_batches() -> None:
    """Large batches, and a consumer whose stream is late: copies must neither be read early nor overwritten."""

    def large(step: int) -> tuple[Tensor, Tensor]:
        return torch.full((1 << 24,), step % 251, dtype=torch.uint8), torch.full((1 << 20,), step)

    with Loader(large, range(40), torch.device("cuda"), ahead=3) as loader:
        sums = []
        for frames, index in loader:
            torch.cuda._sleep(2_000_000)
            assert frames.is_cuda
            sums.append((frames.long().sum() // (1 << 24), index.sum() // (1 << 20)))
            del frames, index
    assert [(int(a), int(b)) for a, b in sums] == [(step % 251, step) for step in range(40)]
