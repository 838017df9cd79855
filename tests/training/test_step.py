"""Training steps: losses compared with other libraries, accumulation, float16, running loss, order and loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from fastfundus.config import LoopConfig, ModelConfig, OptimizerConfig
from fastfundus.data import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.models.classifier import create_model
from fastfundus.models.segmenter import create_segmenter
from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import fixed_transforms
from fastfundus.training.compilation import compile_mode, compile_model
from fastfundus.training.distributed import World
from fastfundus.training.loader import PhotoLoader, balanced_order, split_batch
from fastfundus.training.metrics import RunningLoss
from fastfundus.training.optimizer import build_optimizer
from fastfundus.training.schedule import training_size
from fastfundus.training.step import TrainStep
from fastfundus.training.tasks.losses import binary_loss, vessel_loss

RATES = OptimizerConfig(learning_rate=1e-3, layer_decay=1.0)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 2, generator=generator)
    return logits, (torch.rand(40, 2, generator=generator) < 0.3).float()


def test_plain_loss_matches_torch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(binary_loss(*batch), nn.functional.binary_cross_entropy_with_logits(*batch))


def test_weighted_loss_matches_torch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    want = nn.functional.binary_cross_entropy_with_logits(*batch, pos_weight=torch.tensor(2.5))
    torch.testing.assert_close(binary_loss(*batch, weight=2.5), want)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_focal_loss_matches_torchvision(batch: tuple[torch.Tensor, torch.Tensor], gamma: float) -> None:
    want = sigmoid_focal_loss(*batch, alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(binary_loss(*batch, gamma=gamma), want)


def test_smoothing_by_hand() -> None:
    # With 0.2 the targets are 0.9 and 0.1; the loss of a logit of 0 is log 2 for any target.
    logits, targets = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.0]])
    sure = 0.1 * math.log(1 + math.exp(-2)) + 0.9 * math.log(1 + math.exp(2))
    assert float(binary_loss(logits, targets, smoothing=0.2)) == pytest.approx((math.log(2) + sure) / 2, rel=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[200.0], [-200.0], [200.0], [-200.0]], requires_grad=True)
    loss = binary_loss(logits, torch.tensor([[0.0], [1.0], [1.0], [0.0]]), smoothing=0.1, gamma=2.0, weight=3.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


class Small(nn.Module):
    """Network without batch statistics, so that the parts of a batch give the gradients of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def stepped(accumulate: int, *, count: int = 10, **loop: object) -> tuple[dict[str, torch.Tensor], float]:
    """Return the weights after one step on a batch in parts, and the loss."""
    torch.manual_seed(0)
    model, inputs = Small(), torch.randn(count, 3, 8, 8)
    targets = (torch.rand(count, 1) < 0.5).float()
    optimizer = build_optimizer(model, RATES)
    config = LoopConfig(**{"amp": False, **loop})
    step = TrainStep(model, model, optimizer, config, binary_loss, clip_norm=1.0, device=torch.device("cpu"))
    parts = [(inputs[part], targets[part]) for part in split_batch(np.arange(count), accumulate)]
    loss = step(iter(parts), count, 1e-2)
    return dict(model.state_dict()), float(loss)


@pytest.mark.parametrize("accumulate", [2, 3, 10, 16], ids=["even", "uneven", "one-by-one", "more-parts-than-photos"])
def test_accumulation_equals_the_whole_batch(accumulate: int) -> None:
    whole, parts = stepped(1), stepped(accumulate)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    for name, value in whole[0].items():
        # Adam divides a gradient by its own magnitude, so rounding matters most where the gradient is smallest.
        torch.testing.assert_close(parts[0][name], value, rtol=0, atol=1e-4)


def test_float16_matches_float32_and_skips_overflows() -> None:
    half, single = stepped(1, amp=True, amp_dtype="float16"), stepped(1)
    assert half[1] == pytest.approx(single[1], rel=5e-3)
    torch.manual_seed(0)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoopConfig(amp=True, amp_dtype="float16")
    step = TrainStep(
        model, model, build_optimizer(model, RATES), config,
        lambda logits, targets: 1e30 * logits.mean(), clip_norm=1.0, device=torch.device("cpu"),
    )  # fmt: skip
    scale = step.scaler.get_scale()
    step([(torch.randn(4, 3, 8, 8), torch.zeros(4, 1))], 4, 1e-2)
    assert step.scaler.get_scale() < scale
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_running_loss_detects_non_finite_losses() -> None:
    running_loss = RunningLoss(torch.device("cpu"), 1.5)
    running_loss.add(torch.tensor(0.25))
    assert running_loss.total() == 1.75
    assert not running_loss.failed()
    running_loss.add(torch.tensor(math.inf))
    assert running_loss.failed()
    running_loss.add(torch.tensor(0.0))
    assert running_loss.failed()


@pytest.mark.gpu
def test_running_loss_does_not_wait_for_a_gpu() -> None:
    running_loss = RunningLoss(torch.device("cuda"))
    running_loss.add(torch.tensor(math.nan, device="cuda"))
    for _ in range(100):
        running_loss.add(torch.tensor(1.0, device="cuda"))
        torch.cuda.synchronize()
        if running_loss.failed():
            return
    pytest.fail("a non-finite loss was not detected within 100 steps")


def test_balanced_epochs_show_classes_equally_often() -> None:
    labels = np.array([1] * 5 + [0] * 26)
    seen = np.zeros(31, int)
    for epoch in range(40):
        order = balanced_order(labels, 4, seed=1, epoch=epoch)
        assert [len(batch) for batch in order] == [4] * 7
        flat = np.concatenate(order)
        # 15 of the 31 drawn photos are positive; the last three do not fill a batch.
        assert 12 <= labels[flat].sum() <= 15
        # Within an epoch, the photos of a class are shown about equally often.
        counts = np.bincount(flat, minlength=31)
        assert counts[:5].max() <= 3
        assert counts[5:].max() <= 1
        seen += counts
    assert seen.min() > 0
    again = balanced_order(labels, 4, seed=1, epoch=3)
    assert all(np.array_equal(left, right) for left, right in zip(again, balanced_order(labels, 4, seed=1, epoch=3)))  # noqa: B905
    assert not np.array_equal(np.concatenate(again), np.concatenate(balanced_order(labels, 4, seed=1, epoch=4)))


def test_sizes_grow_in_four_steps() -> None:
    sizes = [training_size(epoch, epochs=9, size=224, first=0.5) for epoch in range(9)]
    assert sizes == [128, 128, 128, 160, 160, 192, 224, 224, 224]
    assert [training_size(epoch, epochs=3, size=64, first=1.0) for epoch in range(3)] == [64] * 3
    assert training_size(0, epochs=1, size=48, first=0.25) == 32


def test_smaller_inputs_are_area_averages(cache: PhotoCache) -> None:
    rows = np.array([2, 0, 1])
    transforms = fixed_transforms(PreprocessSpec(size=64, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255)), 3)
    loader = PhotoLoader(cache.photos, rows, torch.device("cpu"))
    inputs = loader.begin(rows, transforms.scaled(2), 32)()
    want = cache.photos[rows].astype(np.float32).reshape(3, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(inputs.numpy(), want, atol=1e-3)


def test_resident_photos_give_the_same_batches(cache: PhotoCache) -> None:
    """Keep the photos in the memory of the device, as on a GPU that has room for them; here the device is the CPU."""
    rows = np.array([5, 2, 9])
    transforms = fixed_transforms(cache.spec, 2)
    loaders = [PhotoLoader(cache.photos, rows, torch.device("cpu"), free_bytes=free) for free in (0, 3 * 64 * 64 * 3)]
    assert [loader.resident for loader in loaders] == [False, True]
    batches = [loader.begin(np.array([9, 5]), transforms, 48)() for loader in loaders]
    assert torch.equal(*batches)
    assert not PhotoLoader(cache.photos, rows, torch.device("cpu"), free_bytes=3 * 64 * 64 * 3 - 1).resident


def test_pinned_buffers_are_not_overwritten_during_copies(cache: PhotoCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the events and streams of a GPU; check the order of waits and the batches."""
    did: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.name = ""

        def record(self, stream: object) -> None:
            self.name = f"copy {sum(entry.startswith('record') for entry in did)}"
            did.append(f"record {self.name}")

        def synchronize(self) -> None:
            did.append(f"host waits for {self.name}")

    class Stream:
        def wait_event(self, event: Event) -> None:
            did.append(f"model waits for {event.name}")

    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real_empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: did.append("kept until used"))
    rows = np.arange(8)
    loader, plain = (PhotoLoader(cache.photos, rows, torch.device("cpu")) for _ in range(2))
    loader._stream = Stream()  # type: ignore[assignment]
    batches = [rows[:3], rows[3:5], rows[2:7], rows[:2]]
    matrices = [fixed_transforms(cache.spec, len(batch)) for batch in batches]
    want = [plain.begin(batch, fixed, 64)() for batch, fixed in zip(batches, matrices, strict=True)]
    # Prefetch one batch, as the trainer does.
    following = loader.begin(batches[0], matrices[0], 64)
    for number in range(4):
        finish = following
        if number < 3:
            following = loader.begin(batches[number + 1], matrices[number + 1], 64)
        assert torch.equal(finish(), want[number])
    assert [entry for entry in did if entry != "kept until used"] == [
        "record copy 0", "record copy 1", "model waits for copy 0",
        "host waits for copy 0", "record copy 2", "model waits for copy 1",
        "host waits for copy 1", "record copy 3", "model waits for copy 2", "model waits for copy 3",
    ]  # fmt: skip
    assert did.count("kept until used") == 4


@pytest.mark.parametrize(
    ("backbone", "maps"),
    [
        ("test_resnet", False),
        pytest.param("test_convnext", False, marks=pytest.mark.long),
        pytest.param("vit_tiny_patch16_224", False, marks=pytest.mark.long),
        ("test_resnet", True),
    ],
)
def test_step_compiles_once_to_one_graph(backbone: str, maps: bool) -> None:
    """For each kind of network, torch.compile finds no graph break and does not recompile after the first step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    size = 224 if backbone.startswith("vit") else 64
    create = create_segmenter if maps else create_model
    model, _ = create(ModelConfig(backbone=backbone), 1)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss = partial(vessel_loss, dice=0.5) if maps else binary_loss
    step = TrainStep(
        model, forward, build_optimizer(model, RATES), LoopConfig(amp=True, amp_dtype="bfloat16"), loss,
        clip_norm=1.0, device=torch.device("cpu"),
    )  # fmt: skip
    graphs = []
    for number in range(3):
        inputs = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
        truth = torch.zeros(2, 1, size, size) if maps else torch.tensor([[0.0], [1.0]])
        step([(inputs, truth)], 2, 1e-3 / (number + 1))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_cuda_graphs_are_refused_where_they_would_overwrite_gradients() -> None:
    gpu, several = torch.device("cuda"), World()
    several.size = 2
    for loop, world, why in (
        (LoopConfig(compile="graphs", accumulate=2), World(), "loop.accumulate is 2"),
        (LoopConfig(compile="graphs"), several, "2 processes train together"),
        (LoopConfig(compile="graphs"), World(), None),
    ):
        if why is None:
            assert compile_mode(loop, gpu, world, lambda text: None) == "graphs"
            continue
        with pytest.raises(ConfigError, match=f'loop.compile is "graphs", but {why}'):
            compile_mode(loop, gpu, world, lambda text: None)
    assert compile_mode(LoopConfig(accumulate=2), gpu, World(), lambda text: None) == "on"


def test_more_sizes_than_torchs_limit_do_not_end_the_training() -> None:
    torch._dynamo.reset()
    network = torch.nn.Conv2d(3, 4, 3)
    with patched(torch._dynamo.config, "recompile_limit", 8):
        model = torch.compile(network, fullgraph=True, dynamic=False, backend="eager")
        compile_model(network, "on")
        for size in range(8, 20):
            model(torch.zeros(1, 3, size, size))


@contextmanager
def patched(where: object, name: str, value: object) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)
