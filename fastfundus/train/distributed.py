"""Several processes that train one model, started by torchrun: who they are, and what they must agree on.

A batch of the config is shared out over the processes, so that the same file gives the same training on one GPU and on
eight. Decisions (stop, a loss that is no number) go through a group of their own on the host: no GPU waits for them.
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

__all__ = ["World", "joined", "restarted"]

_Value = TypeVar("_Value")
_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: one of them may be measuring the test photos meanwhile."""


class World:
    """This process among its peers; alone unless torchrun started several.

    Args:
        rank: number of this process.
        size: number of processes.
        local: number of this process on its machine: its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._host: Any = distributed.new_group(backend="gloo", timeout=_PATIENCE) if size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return torch.device(f"cuda:{self.local}" if torch.cuda.is_available() else "cpu")

    def share(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """What this process takes of a batch.

        Raises:
            ConfigError: there is not a photo for each process.
        """
        if len(batch) < self.size:
            raise ConfigError(
                f"a batch of {len(batch)} cannot be shared by {self.size} processes; raise loop.batch_size"
            )
        return np.array_split(batch, self.size)[self.rank]

    def gather(self, value: _Value) -> list[_Value]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._host)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process has raised it."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=self._host)
        return tuple(bool(value) for value in raised.tolist())

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            distributed.barrier(group=self._host)

    def spread(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`forward`, with gradients averaged over the processes; the weights of `model` become those of rank 0."""
        if self.size == 1:
            return forward
        assert isinstance(forward, nn.Module)
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(
            forward, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def align(self, module: nn.Module) -> None:
        """Give every process rank 0's buffers, such as running means."""
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started; a process that it did not start is alone."""
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
        # On one machine torchrun keeps its store when it starts processes again, and with it the addresses of those
        # that are gone: whoever is quick would call them. On several machines attempts are counted by each on its own.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield World(rank, size, local)
    finally:
        distributed.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
