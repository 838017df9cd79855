"""The arithmetic of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]


def count_flops(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    """Run a network forward and count: a product and a sum are two.

    Args:
        model: in evaluation mode.
        inputs: a batch, of one photo where what one takes is asked for; any type and layout that the model takes.

    Returns:
        What the model gives, and the operations of its matrix products and convolutions.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(inputs)
    return output, int(counter.get_total_flops())
