"""Batches made ahead of the step that wants them, by one thread, and copied to the device while it computes.

A batch is still a function of its step alone: the thread calls ``make(step)`` for the steps in their order, and what
comes out is what that returns (design section 9).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.capture import CAPTURING
from flexlam_fast.errors import InputError

_PATIENCE = 10.0  # seconds that close() waits for a batch in the making, whose thread ends by itself afterwards


class _Made(NamedTuple):
    """A batch, or why there is none; ``copied`` is recorded behind the copies to a GPU."""

    batch: Any = None
    error: BaseException | None = None
    copied: torch.cuda.Event | None = None
    last: bool = False


class _Shelf:
    """Where the thread puts batches and the consumer takes them; closing it wakes whoever waits."""

    def __init__(self, room: int) -> None:
        self.room, self.closed = room, False
        self.items: deque[_Made] = deque()
        self.changed = threading.Condition()

    def wait_for_room(self) -> bool:
        """Wait until a batch is wanted; False once closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.room)
            return not self.closed

    def put(self, item: _Made) -> None:
        """Add a batch, which is dropped once closed."""
        with self.changed:
            if not self.closed:
                self.items.append(item)
                self.changed.notify_all()

    def get(self) -> _Made:
        """Wait for the next batch; the end, once closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.items)
            item = _Made(last=True) if self.closed else self.items.popleft()
            self.changed.notify_all()
            return item

    def close(self) -> None:
        """Drop what is there and end whoever waits."""
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()


class Loader(Iterator[Any]):
    """Iterates over ``make(step)`` for ``steps``, with the tensors on ``device``.

    At most ``ahead`` batches are made before they are asked for. On a GPU they go through pinned memory and a stream of
    their own; the consumer's stream waits for the copy, the host does not. An exception in ``make`` is raised in the
    consumer when it asks for that step. Leaving the ``with``, :meth:`close`, the end of the steps, an exception or
    dropping the loader ends the thread.

    Args:
        make: returns a tuple or NamedTuple of host tensors; what is no tensor is handed on as it is. It runs in the
            thread, one call at a time.
        steps: the steps, in order; it may be endless.
        device: where the tensors are to be.
        ahead: batches made ahead, at least 1.

    Raises:
        InputError: ``ahead`` below 1.
    """

    def __init__(
        self, make: Callable[[int], Any], steps: Iterable[int], device: torch.device, *, ahead: int = 2
    ) -> None:
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise InputError(f"ahead: expected an integer of at least 1, got {ahead!r}")
        self.device, self._shelf = torch.device(device), _Shelf(ahead)
        # the thread knows the shelf and not the loader, which may so be dropped; the shelf is closed at exit, too
        self._finalizer = weakref.finalize(self, self._shelf.close)
        args = (make, steps, self.device, self._shelf)
        self._thread = threading.Thread(target=_work, args=args, name="flexlam-loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __next__(self) -> Any:
        """The batch of the next step."""
        made = self._shelf.get()
        if made.error is not None:
            self.close()
            raise made.error
        if made.last:
            self.close()
            raise StopIteration
        if made.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(made.copied)
            for part in made.batch:
                if isinstance(part, Tensor):
                    part.record_stream(stream)  # its memory is of the copying stream, which must not reuse it early
        return made.batch

    def close(self) -> None:
        """End the thread: at once where it waits, after the batch in the making where it works."""
        self._finalizer()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)


def _work(make: Callable[[int], Any], steps: Iterable[int], device: torch.device, shelf: _Shelf) -> None:
    """What the thread does: batches in order until it is told to end, has no more steps, or fails."""
    try:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # what make itself may do on the GPU is then in the same order
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for step in steps:
                if not shelf.wait_for_room():
                    return
                made = make(step)
                shelf.put(_Made(to_device(made, device)) if stream is None else _copied(made, device, stream))
                del made  # else it would be kept until the next one is there
        shelf.put(_Made(last=True))
    except BaseException as error:  # whatever it is, the consumer is the one to know
        shelf.put(_Made(error=error))


def _copied(batch: Any, device: torch.device, stream: torch.cuda.Stream) -> _Made:
    """Start the copies of a batch on ``stream``, the current one; torch keeps pinned memory until they are done."""
    with CAPTURING:
        pinned = _like(batch, [p.pin_memory() if isinstance(p, Tensor) and p.is_cpu else p for p in batch])
        moved, copied = to_device(pinned, device), torch.cuda.Event()
        copied.record(stream)
    return _Made(moved, copied=copied)


def to_device(batch: Any, device: torch.device) -> Any:
    """A tuple or NamedTuple with its tensors on ``device``; what is no tensor stays as it is."""
    return _like(batch, [part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch])


def _like(batch: Any, parts: list[Any]) -> Any:
    """A tuple, or a NamedTuple of the same kind as ``batch``."""
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
