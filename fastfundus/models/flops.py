"""Number of floating-point operations of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]


def count_flops(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    """Run a forward pass and count its operations; a multiplication and an addition count as two.

    Args:
        model: a model in evaluation mode.
        inputs: a batch of any dtype and layout that the model accepts; one photo gives the operations per photo.

    Returns:
        The output of the model, and the number of operations in its matrix products and convolutions.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(inputs)
    return output, int(counter.get_total_flops())
