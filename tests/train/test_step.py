"""One step: losses against other libraries, parts of a batch against the whole, float16, and the watch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from fastfundus.config import LoopConfig, OptimiserConfig
from fastfundus.train.feed import parts_of
from fastfundus.train.loss import binary_loss
from fastfundus.train.step import TrainStep, build_optimiser
from fastfundus.train.watch import LossWatch


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 2, generator=generator)
    return logits, (torch.rand(40, 2, generator=generator) < 0.3).float()


def test_plain_loss_is_torchs(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(binary_loss(*batch), nn.functional.binary_cross_entropy_with_logits(*batch))


def test_weights_are_torchs(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    want = nn.functional.binary_cross_entropy_with_logits(*batch, pos_weight=torch.tensor(2.5))
    torch.testing.assert_close(binary_loss(*batch, positive_weight=2.5), want)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_focal_loss_is_torchvisions(batch: tuple[torch.Tensor, torch.Tensor], gamma: float) -> None:
    want = sigmoid_focal_loss(*batch, alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(binary_loss(*batch, gamma=gamma), want)


def test_smoothing_by_hand() -> None:
    # At 0.2 the targets are 0.9 and 0.1; a logit of 0 costs log 2 whatever the target.
    logits, targets = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.0]])
    sure = 0.1 * math.log(1 + math.exp(-2)) + 0.9 * math.log(1 + math.exp(2))
    assert float(binary_loss(logits, targets, smoothing=0.2)) == pytest.approx((math.log(2) + sure) / 2, rel=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[200.0], [-200.0], [200.0], [-200.0]], requires_grad=True)
    loss = binary_loss(
        logits, torch.tensor([[0.0], [1.0], [1.0], [0.0]]), smoothing=0.1, gamma=2.0, positive_weight=3.0
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


class Small(nn.Module):
    """No batch statistics: parts of a batch and the whole then give the same gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def stepped(accumulate: int, *, count: int = 10, **loop: object) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after one step on a batch in parts, and its loss."""
    torch.manual_seed(0)
    model, inputs = Small(), torch.randn(count, 3, 8, 8)
    targets = (torch.rand(count, 1) < 0.5).float()
    optimiser = build_optimiser(model, OptimiserConfig())
    config = LoopConfig(**{"amp": False, **loop})
    step = TrainStep(model, model, optimiser, config, binary_loss, clip_norm=1.0, device=torch.device("cpu"))
    parts = [(inputs[part], targets[part]) for part in parts_of(np.arange(count), accumulate)]
    loss = step(iter(parts), count, 1e-2)
    return dict(model.state_dict()), float(loss)


@pytest.mark.parametrize("accumulate", [2, 3, 10, 16], ids=["even", "uneven", "one-by-one", "more-parts-than-photos"])
def test_parts_of_a_batch_are_the_batch(accumulate: int) -> None:
    whole, parts = stepped(1), stepped(accumulate)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    for name, value in whole[0].items():
        # Adam divides a gradient by its own size: rounding in the sum counts most where the gradient is smallest.
        torch.testing.assert_close(parts[0][name], value, rtol=0, atol=1e-4)


def test_float16_learns_like_float32_and_skips_what_overflows() -> None:
    half, single = stepped(1, amp=True, amp_dtype="float16"), stepped(1)
    assert half[1] == pytest.approx(single[1], rel=5e-3)
    torch.manual_seed(0)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoopConfig(amp=True, amp_dtype="float16")
    step = TrainStep(
        model, model, build_optimiser(model, OptimiserConfig()), config,
        lambda logits, targets: 1e30 * logits.mean(), clip_norm=1.0, device=torch.device("cpu"),
    )  # fmt: skip
    scale = step.scaler.get_scale()
    step([(torch.randn(4, 3, 8, 8), torch.zeros(4, 1))], 4, 1e-2)
    assert step.scaler.get_scale() < scale
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_watch_sums_and_sees() -> None:
    watch = LossWatch(torch.device("cpu"), 1.5)
    watch.add(torch.tensor(0.25))
    assert watch.total() == 1.75
    assert not watch.failed()
    watch.add(torch.tensor(math.inf))
    assert watch.failed()
    watch.add(torch.tensor(0.0))
    assert watch.failed()


@pytest.mark.gpu
def test_watch_does_not_wait_for_a_gpu() -> None:
    watch = LossWatch(torch.device("cuda"))
    watch.add(torch.tensor(math.nan, device="cuda"))
    for _ in range(100):
        watch.add(torch.tensor(1.0, device="cuda"))
        torch.cuda.synchronize()
        if watch.failed():
            return
    pytest.fail("a loss that is no number went unnoticed for 100 steps")
