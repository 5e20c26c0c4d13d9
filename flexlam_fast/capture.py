"""A function of tensors as CUDA graphs, one for each shape it is called with. Not yet run on a GPU.

A graph holds every launch of a call, so that a call costs the host one. Inputs are copied into memory that the graph
reads; weights and whatever else the function finds by itself are read, and written, where they are.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Runs before a capture, which load kernels and make what is made once.
WARM_RUNS = 2
#: Held during a capture, and by threads that pin memory or start copies to a device.
CAPTURING = threading.RLock()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream that all captures on a device record: a pool's memory is reused on the stream that it was taken on.

    Torch's own default is one for all devices, made on whichever is current first.
    """
    return torch.cuda.Stream(device)


@contextmanager
def warming(device: torch.device) -> Iterator[None]:
    """Run the block on a stream of its own: after what is queued on the current one, before what follows there."""
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """Record what the block launches on ``device`` into ``graph``, undisturbed by other threads and the collector.

    CUDA's default mode ends a capture when any thread of the process allocates meanwhile; here only this one's calls
    count. What the garbage collector frees inside a capture would end it as well, so it runs before, and not inside.
    """
    with CAPTURING, torch.cuda.device(device):
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_stream_of(device), capture_error_mode="thread_local"):
                yield
        finally:
            if collects:
                gc.enable()


class Captured(NamedTuple):
    """A graph, where it reads its arguments, and the tensor it leaves its result in."""

    graph: torch.cuda.CUDAGraph
    args: tuple[Any, ...]
    out: Tensor


class GraphedFunction:
    """Calls ``function`` by replaying what was captured for arguments of the same shapes, dtypes and other values.

    Args:
        function: of tensors on ``device`` and other values that have an equality, to one tensor. It may read nothing
            back from the device, and what it draws at random must come from its arguments.
        device: a CUDA device.
        state: every tensor that ``function`` changes beside its result; warm runs are undone on them.
        most: graphs kept; the one that was used longest ago gives way.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        state: Callable[[], Iterable[Tensor]] = tuple,
        most: int = 16,
    ) -> None:
        self.function, self.device, self.state, self.most = function, device, state, most
        self.captured: OrderedDict[tuple[object, ...], Captured] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args: Any) -> Tensor:
        """The function's result for ``args``, in memory of its own."""
        key = tuple((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args)
        found = self.captured.get(key)
        if found is None:
            found = self.captured[key] = self._capture(args)
            if len(self.captured) > self.most:
                self.captured.popitem(last=False)
        self.captured.move_to_end(key)
        for place, given in zip(found.args, args, strict=True):
            if isinstance(place, Tensor):
                place.copy_(given, non_blocking=True)
        found.graph.replay()
        return found.out.clone()

    def _capture(self, args: tuple[Any, ...]) -> Captured:
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        with warming(self.device):
            kept = [(t, t.clone()) for t in self.state()]
            for _ in range(WARM_RUNS):
                self.function(*args)
            for tensor, before in kept:
                tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self.pool, self.device):
            out = self.function(*args)
        return Captured(graph, args, out)
