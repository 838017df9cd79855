"""Training of one model by several processes that torchrun started: their ranks, and their joint decisions.

A batch of the configuration is divided among the processes, so that the same configuration gives the same training on
one GPU and on eight. Decisions (stop, non-finite loss) use a separate process group on the host: no GPU waits for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from fastfundus.errors import ConfigError
from fastfundus.machine import usable_cores

__all__ = ["World", "join_processes", "limit_threads", "was_restarted"]

_Value = TypeVar("_Value")
_PATIENCE = timedelta(hours=2)
"""Timeout of a process that waits for the others: one of them may be evaluating the test photos."""


class World:
    """The processes of a run, seen from this one; a single process unless torchrun started several.

    Args:
        rank: rank of this process.
        size: number of processes.
        local: rank of this process on its machine, which is also the index of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._host: Any = distributed.new_group(backend="gloo", timeout=_PATIENCE) if size > 1 else None

    @property
    def leads(self) -> bool:
        """True if this process writes files and messages."""
        return self.rank == 0

    def device(self) -> torch.device:
        """Return the GPU of this process, or the CPU."""
        return torch.device(f"cuda:{self.local}" if torch.cuda.is_available() else "cpu")

    def share(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this process's part of a batch.

        Raises:
            ConfigError: the batch has fewer photos than there are processes.
        """
        if len(batch) < self.size:
            raise ConfigError(
                f"a batch of {len(batch)} photos cannot be divided among {self.size} processes; raise loop.batch_size"
            )
        return np.array_split(batch, self.size)[self.rank]

    def gather(self, value: _Value) -> list[_Value]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._host)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether any process has raised it."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=self._host)
        return tuple(bool(value) for value in raised.tolist())

    def wait(self) -> None:
        """Wait until every process has arrived here."""
        if self.size > 1:
            distributed.barrier(group=self._host)

    def spread(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Wrap `forward` to average gradients over the processes, and set the weights of `model` to those of rank 0."""
        if self.size == 1:
            return forward
        assert isinstance(forward, nn.Module)
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(
            forward, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def align(self, module: nn.Module) -> None:
        """Copy rank 0's buffers, such as running means, to every process."""
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)


@contextmanager
def join_processes() -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, yield a world of one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    store, rank, size = next(distributed.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[attr-defined]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine, torchrun keeps its store when it restarts processes, and with it the addresses of dead ones,
        # which fast processes would try to contact. With several machines, each counts the attempts on its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield World(rank, size, local)
    finally:
        distributed.destroy_process_group()


def limit_threads() -> None:
    """Limit torch's threads to the cores that this process may use: torch ignores the CPU quota of a container."""
    if torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def was_restarted() -> bool:
    """Return whether torchrun has restarted this process after one of the processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
