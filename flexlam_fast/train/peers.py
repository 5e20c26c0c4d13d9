"""The processes that train together: one alone, or those that ``torchrun`` started, by ``torch.distributed``.

A step's batch belongs to all of them: sample ``i`` is the same whoever computes it, and every process takes an equal,
contiguous share. So the number of processes changes nothing but the order in which gradients are added.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexlam_fast.errors import FlexLAMError, InputError

#: How long a process waits for the others in a step before it gives up on them.
STEP_LIMIT = timedelta(minutes=5)
#: How long it waits while one of them does what only one does: encode a data set, write a checkpoint.
WAIT_LIMIT = timedelta(days=1)


class LostPeer(FlexLAMError, RuntimeError):
    """Another process of the run is gone, or did not answer in time."""


def is_shared() -> bool:
    """Whether ``torchrun`` started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


class Peers:
    """This process among those that train together; ``Peers()`` is one alone.

    Attributes:
        rank: of this process, 0 for the one that writes.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._waiting: Any = None

    @classmethod
    def join(cls, device: torch.device) -> Peers:
        """Join the processes that ``torchrun`` started beside this one; alone where it was not ``torchrun``.

        Args:
            device: of this process: gloo joins CPUs, NCCL GPUs.

        Raises:
            LostPeer: they did not all come.
        """
        if not is_shared():
            return cls()
        if not dist.is_initialized():
            cuda = device.type == "cuda"
            if cuda:
                torch.cuda.set_device(device)
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=STEP_LIMIT)
            except (RuntimeError, ValueError) as error:
                raise LostPeer(f"expected all processes of the run to meet, got: {_first_line(error)}") from error
            atexit.register(dist.destroy_process_group)
        peers = cls(dist.get_rank(), dist.get_world_size())
        peers._waiting = dist.new_group(backend="gloo", timeout=WAIT_LIMIT)
        return peers

    def share(self, batch: int) -> range:
        """The samples of a step's batch that this process computes.

        Raises:
            InputError: the batch cannot be cut into equal shares.
        """
        if batch % self.size:
            raise InputError(f"batch: expected a multiple of the {self.size} processes, got {batch}")
        each = batch // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over the processes, with its gradient."""
        if self.size == 1:
            return x
        total: Tensor = _Total.apply(x)
        return total / self.size

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the processes, without a gradient."""
        return x if self.size == 1 else _total(x.detach())

    def wait(self) -> None:
        """Wait for all of them to get here."""
        if self.size > 1:
            dist.barrier(group=self._waiting)

    def first(self, work: Callable[[], Any]) -> None:
        """Have the first process do ``work`` while the others wait for it."""
        if self.rank == 0:
            work()
        self.wait()

    def together(self, forward: nn.Module, device: torch.device, shard: bool = False) -> nn.Module:
        """``forward`` with the gradients of its parameters averaged over the processes.

        Args:
            forward: what is trained; its parameters are this process's.
            device: of the parameters.
            shard: False gives every process all weights (DDP). True gives each its part of weights, gradients and what
                the optimiser keeps, and gathers the weights of a layer when it is computed (FSDP2): parameters become
                ``DTensor``.

        Raises:
            InputError: ``shard`` with one process.
        """
        if shard and self.size == 1:
            raise InputError("shard: expected several processes, started by torchrun, got one")
        if self.size == 1:
            return forward
        if not shard:
            return nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for stack in [m for m in forward.modules() if isinstance(m, nn.ModuleList)]:
            for layer in stack:
                fully_shard(layer, mesh=mesh)
        fully_shard(forward, mesh=mesh)
        return forward


class _Total(torch.autograd.Function):
    """The sum over the processes. Each of them has a loss that depends on it, so gradients are added up as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _total(grad)


def _total(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


ALONE = Peers()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in parts: every process has to ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` where and in such parts as ``like`` is, a parameter of the same shape."""
    tensor = tensor.to(like.device)
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, like.placements)  # type: ignore[attr-defined]


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether ``error`` says that another process does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
