"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastfundus.config import LoopConfig
from fastfundus.training.distributed import World
from fastfundus.training.precision import autocast_dtype

__all__ = ["TrainStep"]


class TrainStep:
    """One step on a batch, given in one or several parts: forward, loss, backward, clip, update.

    Args:
        model: the model to train.
        forward: the model, or the result of torch.compile and `World.spread` for it.
        optimizer: optimizer of its weights.
        config: settings with a resolved precision, see `precision.resolve_precision`.
        loss: returns a scalar from logits and ground truth, both float32.
        clip_norm: largest gradient norm; longer gradients are scaled down.
        device: device of the model.
        world: the processes that share each batch.
        graphs: True if the forward pass is replayed as a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        clip_norm: float,
        device: torch.device,
        world: World | None = None,
        graphs: bool = False,
    ) -> None:
        self.world, self.graphs = world or World(), graphs
        self.forward, self.optimizer, self.loss = forward, optimizer, loss
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.dtype, self.clip_norm = autocast_dtype(config), clip_norm
        # float16 underflows below 6e-8: the loss is scaled up before backward, and gradients down after it.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, parts: Iterable[tuple[Tensor, Tensor]], count: int, rate: float, *, pieces: int = 1) -> Tensor:
        """Take a step.

        Args:
            parts: this process's share of the batch: inputs [N, 3, S, S] float32, and ground truth float32.
            count: number of photos of all parts of all processes.
            rate: learning rate.
            pieces: number of parts; only needed with several processes.

        Returns:
            This process's share of the mean loss, a scalar on the device, without synchronising it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for number, (inputs, truth) in enumerate(parts, start=1):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            # Gradients are exchanged once per step, not once per part.
            alone = number == pieces or self.world.size == 1
            with nullcontext() if alone else self.forward.no_sync():  # type: ignore[attr-defined]
                with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype is not None):
                    logits = self.forward(inputs)
                share = self.loss(logits.float(), truth) * (len(inputs) / count)
                # DDP averages gradients over processes, but the shares of the loss must add up.
                self.scaler.scale(share * self.world.size).backward()  # type: ignore[no-untyped-call]
            total = share.detach() if total is None else total + share.detach()
        assert total is not None
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total
