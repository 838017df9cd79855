"""One training step, the averaged weights, and batched prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from fastfundus.config import LoopConfig, OptimiserConfig
from fastfundus.kernels.ops import sample
from fastfundus.spec import PreprocessSpec
from fastfundus.train.augment import fixed_matrices
from fastfundus.train.distributed import World
from fastfundus.train.precision import autocast_dtype

if TYPE_CHECKING:
    # Benches on bare GPU machines go without what the rest of `data` imports.
    from fastfundus.data.store import PhotoArray

__all__ = ["AveragedModel", "TrainStep", "build_optimiser", "forward_batches", "predict_logits"]


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW; biases and normalisation layers (tensors of one dimension) are not decayed, frozen weights not held."""
    if config.layer_decay < 1:
        # timm knows in which order the layers of its backbones come.
        groups = param_groups_layer_decay(model, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


class AveragedModel:
    """An exponential average of a model's weights, validated and saved in its place.

    The decay starts low and rises to its setting, so that the first random weights are forgotten in a short run too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights by one step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine, theirs = self.module.state_dict(), model.state_dict()
        floats = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name, value in mine.items():
            if not value.is_floating_point():
                value.copy_(theirs[name])


class TrainStep:
    """Forward, loss, backward, clip, update: one step, from one batch or several.

    Args:
        model: what is trained.
        forward: the model, or what torch.compile and `World.spread` made of it.
        optimiser: of its weights.
        config: with its precision resolved, see `precision.resolve_precision`.
        loss: a scalar from logits and truth, both float32.
        clip_norm: largest gradient norm.
        device: where the model is.
        world: the processes that share each batch.
        graphs: whether the forward pass is replayed as a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        optimiser: torch.optim.Optimizer,
        config: LoopConfig,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        clip_norm: float,
        device: torch.device,
        world: World | None = None,
        graphs: bool = False,
    ) -> None:
        self.world, self.graphs = world or World(), graphs
        self.forward, self.optimiser, self.loss = forward, optimiser, loss
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.dtype, self.clip_norm = autocast_dtype(config), clip_norm
        # float16 underflows below 6e-8: the loss is scaled up before backward, and gradients down after it.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, parts: Iterable[tuple[Tensor, Tensor]], count: int, rate: float, *, pieces: int = 1) -> Tensor:
        """Learn from a batch that comes in parts.

        Args:
            parts: inputs [N, 3, S, S] float32, channels-last where that pays, and truth float32: this process's own.
            count: photos of all parts of all processes together.
            rate: learning rate.
            pieces: how many parts there are; alone, a process need not know.

        Returns:
            This process's share of the mean loss, a scalar that has not been waited for.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimiser.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for number, (inputs, truth) in enumerate(parts, start=1):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            # Processes add up their gradients once a step, not once a part.
            alone = number == pieces or self.world.size == 1
            with nullcontext() if alone else self.forward.no_sync():  # type: ignore[attr-defined]
                with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype is not None):
                    logits = self.forward(inputs)
                share = self.loss(logits.float(), truth) * (len(inputs) / count)
                # Gradients are averaged over the processes, but their shares of the loss are to be added.
                self.scaler.scale(share * self.world.size).backward()  # type: ignore[no-untyped-call]
            total = share.detach() if total is None else total + share.detach()
        assert total is not None
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return total


@torch.inference_mode()
def forward_batches(
    model: nn.Module,
    photos: PhotoArray,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    *,
    size: int,
    batch_size: int,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Yield the model's float32 output, on the device, of one batch of photos after the other.

    Args:
        model: from [N, 3, size, size]; put into evaluation mode.
        photos: uint8 [*, S, S, 3], the cache.
        rows: which photos.
        spec: of the cache.
        size: side of the inputs in pixels; black is added at the right and below where it is larger than S.
        batch_size: photos a forward pass.
        dtype: type to autocast to; None computes in float32.
        device: where the model is.
    """
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        geometry, colour = map(torch.from_numpy, fixed_matrices(spec, len(batch)))
        images = torch.from_numpy(np.ascontiguousarray(photos[batch])).to(device)
        inputs = sample(images, geometry, colour, size)
        with torch.autocast(inputs.device.type, dtype, enabled=dtype is not None):
            output = model(inputs)
        yield output.float()


def predict_logits(
    model: nn.Module,
    photos: PhotoArray,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Logits of photos of a cache.

    Args:
        model: from [N, 3, S, S] to [N, L]; put into evaluation mode.
        photos: uint8 [*, S, S, 3], the cache.
        rows: [N] which photos.
        spec: of the cache.
        dtype: type to autocast to; None computes in float32.
        batch_size: photos a forward pass.
        device: where the model is.

    Returns:
        float32 [N, L].
    """
    outputs = forward_batches(
        model, photos, rows, spec, size=spec.size, batch_size=batch_size, dtype=dtype, device=device
    )  # fmt: skip
    parts = [logits.cpu().numpy() for logits in outputs]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
