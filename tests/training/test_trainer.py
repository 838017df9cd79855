"""The trainer: convergence, bit-for-bit resume, weight averaging, crash safety and error messages."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from fastfundus.config import TrainConfig, to_toml
from fastfundus.data import PhotoCache
from fastfundus.data.split import write_split_file
from fastfundus.errors import CheckpointError, ConfigError, FastFundusError
from fastfundus.files import atomic_write
from fastfundus.training.checkpoint import device_rng, save_checkpoint, set_device_rng
from fastfundus.training.observer import EpochResult, Observer
from fastfundus.training.optimizer import AveragedModel
from fastfundus.training.run import Run, save_best
from fastfundus.training.schedule import learning_rate
from fastfundus.training.settings import resolve_settings
from fastfundus.training.tasks import losses as loss
from fastfundus.training.trainer import Interrupted, Trainer
from fastfundus.workflow.train import ThresholdTargets, train_run
from tests.conftest import Trained


def settings(**loop: object) -> TrainConfig:
    plain = {"model": {"backbone": "test_resnet", "drop_rate": 0.2}, "data": {"folds": 3}}
    return TrainConfig.from_dict({**plain, "loop": {"epochs": 3, "batch_size": 4, **loop}})


class StopAt(Observer):
    """Observer that sends this process a signal at a step, as Ctrl-C does; step 0 is the last step of the epoch."""

    def __init__(self, epoch: int, step: int, number: int = signal.SIGINT) -> None:
        self.when, self.number = (epoch, step), number

    def step(self, epoch: int, step: int, steps: int) -> None:
        if self.when in ((epoch, step), (epoch, step - steps)):
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole_run(cache: PhotoCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    Trainer(cache, output, settings()).fit()
    return output


@pytest.mark.parametrize(
    ("stop", "number"),
    [((1, 1), signal.SIGINT), ((2, 2), signal.SIGTERM), ((2, 0), signal.SIGINT)],
    ids=["sigint-first-step", "sigterm-within-epoch", "sigint-end-of-epoch"],
)
def test_resume_is_bit_for_bit(
    cache: PhotoCache, whole_run: Path, tmp_path: Path, stop: tuple[int, int], number: int
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped"):
        Trainer(cache, tmp_path / "parts", settings(), observer=StopAt(*stop, number)).fit()
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(99)  # a resumed run does not depend on the process's random state
    Trainer(cache, tmp_path / "parts", settings(), resume=True).fit()
    for name in ("model", "averaged", "optimizer"):
        whole, parts = (
            torch.load(run / "last.ckpt", weights_only=True)[name] for run in (whole_run, tmp_path / "parts")
        )
        flat_whole, flat_parts = (torch.utils._pytree.tree_leaves(value) for value in (whole, parts))
        assert len(flat_whole) == len(flat_parts)
        for left, right in zip(flat_whole, flat_parts, strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    metrics = [
        pl.read_csv(run / "metrics.csv").drop("seconds", "images_per_s") for run in (whole_run, tmp_path / "parts")
    ]
    assert metrics[0].equals(metrics[1])


@pytest.mark.long
def test_resume_is_bit_for_bit_with_all_options(cache: PhotoCache, tmp_path: Path) -> None:
    """Resume keeps the state of accumulation, float16 gradient scaling, class weights, mixup and layer-wise rates."""
    plain = settings(epochs=2, accumulate=2, amp=True, amp_dtype="float16").to_dict()
    config = TrainConfig.from_dict(
        {
            **plain,
            "loss": {"label_smoothing": 0.1, "focal_gamma": 1.0, "positive_weight": 0, "mixup": 0.4},
            "optimizer": {"layer_decay": 0.7},
        }
    )
    Trainer(cache, tmp_path / "whole", config).fit()
    with pytest.raises(Interrupted):
        Trainer(cache, tmp_path / "parts", config, observer=StopAt(2, 1)).fit()
    Trainer(cache, tmp_path / "parts", config, resume=True).fit()
    whole, parts = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "parts"))
    assert whole["state"]["scaler"] == parts["state"]["scaler"] != {}
    assert whole["state"]["history"][1]["train_loss"] == parts["state"]["history"][1]["train_loss"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_resume_after_sigkill_is_bit_for_bit(cache: PhotoCache, whole_run: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time to save, so the run resumes from the end of the last epoch."""
    config = tmp_path / "run.toml"
    config.write_text(to_toml(settings().to_dict()))
    command = [sys.executable, "-m", "fastfundus", "train", str(cache.path), "--output"]
    begun = [*command, str(tmp_path / "parts"), "--config", str(config)]
    with subprocess.Popen(begun, stderr=subprocess.PIPE, text=True) as killed:
        assert killed.stderr is not None
        # Kill it within the second epoch, after the line of the first.
        next(line for line in killed.stderr if line.startswith("epoch 1/3"))
        killed.kill()
    assert not (tmp_path / "parts" / "operating_point.json").exists()
    Trainer(cache, tmp_path / "parts", TrainConfig.from_run(tmp_path / "parts"), resume=True).fit()
    states = [torch.load(run / "last.ckpt", weights_only=True) for run in (whole_run, tmp_path / "parts")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert states[0]["state"]["history"][2]["train_loss"] == states[1]["state"]["history"][2]["train_loss"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    """Thresholds that were chosen again after the test results were seen would be fitted to the test patients."""
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    seen: list[str] = []

    class Listener(Observer):
        def say(self, text: str) -> None:
            seen.append(text)

    document = train_run(
        cache,
        run,
        TrainConfig.from_run(run),
        resume=True,
        observer=Listener(),
        targets=ThresholdTargets(sensitivity=0.5),
    )
    assert document == json.loads((run / "operating_point.json").read_text())
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert "its thresholds are locked and its test patients measured; nothing was changed" in seen[-1]


def test_metrics_are_replaced_atomically(cache: PhotoCache, tmp_path: Path) -> None:
    """An open file keeps its content, because the next epoch's metrics replace it by an atomic rename."""

    class Reader(Observer):
        def epoch(self, result: EpochResult) -> None:
            opened.append((tmp_path / "run" / "metrics.csv").open())

    opened: list[TextIO] = []
    Trainer(cache, tmp_path / "run", settings(epochs=2), observer=Reader()).fit()
    lines = []
    for file in opened:
        with file:
            lines.append(len(file.readlines()))
    assert lines == [1 + 1, 1 + 2]


def test_failed_write_keeps_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("before")

    def fails() -> None:
        with atomic_write(file) as partial:
            partial.write_text("aft")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert file.read_text() == "before"
    with atomic_write(file) as partial:
        partial.write_text("after")
        assert file.read_text() == "before"
    assert file.read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Simulate a full disk by limiting the file size to one megabyte."""
    file = tmp_path / "last.ckpt"
    save_checkpoint({"weights": torch.ones(10)}, file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last.ckpt: cannot be written .*MiB are free.*previous file is"):
            save_checkpoint({"weights": torch.ones(1 << 20)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(torch.load(file, weights_only=True)["weights"], torch.ones(10))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_keeps_the_best_weights(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    before = (run.path / "best.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    metadata = {"config": run.config, "spec": run.spec, "labels": run.labels, "caches": run.caches, "provenance": {}}
    try:
        with pytest.raises(CheckpointError, match=r"best.safetensors: cannot be written .*free disk space"):
            save_best(run.path, run.load_model().state_dict(), **metadata, epoch=9, score=("auroc", 0.9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run.path / "best.safetensors").read_bytes() == before


def test_resume_with_first_size_and_balanced_sampler(cache: PhotoCache, tmp_path: Path) -> None:
    config = settings(first_size=0.5, sampler="balanced")
    Trainer(cache, tmp_path / "whole", config).fit()
    with pytest.raises(Interrupted):
        Trainer(cache, tmp_path / "parts", config, observer=StopAt(2, 1)).fit()
    Trainer(cache, tmp_path / "parts", config, resume=True).fit()
    whole, parts = (torch.load(tmp_path / run / "last.ckpt", weights_only=True)["model"] for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_fixed_size_backbones_refuse_first_size(cache: PhotoCache, tmp_path: Path) -> None:
    plain = settings(first_size=0.5).to_dict()
    config = TrainConfig.from_dict({**plain, "model": {"backbone": "vit_tiny_patch16_224"}})
    with pytest.raises(ConfigError, match=r"loop.first_size is 0.5, but vit_tiny_patch16_224 accepts only one"):
        Trainer(cache, tmp_path / "run", config).fit()


def test_patience_ends_a_run_that_no_longer_improves(cache: PhotoCache, tmp_path: Path) -> None:
    class Lines(Observer):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    plain = settings(epochs=50, patience=2).to_dict()
    # The learning rate is too small to change anything, so the first epoch remains the best.
    config = TrainConfig.from_dict({**plain, "optimizer": {"learning_rate": 1e-8, "ema_decay": 0.0}})
    heard = Lines()
    Trainer(cache, tmp_path / "run", config, observer=heard).fit()
    history = pl.read_csv(tmp_path / "run" / "metrics.csv")
    best = int(history["epoch"][int(history["val_auroc"].arg_max())])
    assert len(history) == best + 2 < 50
    assert any(
        f"validation auroc has not improved since epoch {best} (loop.patience is 2)" in line for line in heard.lines
    )
    # The last line of every run compares the throughput with and without data loading.
    assert re.fullmatch(r"[\d.]+ images/s with data loading, [\d.]+ without: \d+% of .*", heard.lines[-1])
    # Resuming a run that has ended changes nothing.
    Trainer(cache, tmp_path / "run", config, resume=True).fit()
    assert pl.read_csv(tmp_path / "run" / "metrics.csv").equals(history)


def test_non_finite_loss_stops_the_run(cache: PhotoCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def spoilt(logits: torch.Tensor, truth: torch.Tensor, **options: float) -> torch.Tensor:
        if logits.requires_grad:
            taken.append(len(logits))
        return logits.mean() * (math.nan if len(taken) == 3 else 0.0)

    monkeypatch.setitem(loss.LOSSES, "sigmoid", spoilt)
    with pytest.raises(FastFundusError, match=r"loss of epoch 2 is nan, detected after step 1 of 2.*last.ckpt is from"):
        Trainer(cache, tmp_path / "run", settings(batch_size=6)).fit()
    # No further step was taken, and the last good checkpoint still exists.
    assert len(taken) == 3
    good, failed = (torch.load(tmp_path / "run" / f"{name}.ckpt", weights_only=True) for name in ("last", "failed"))
    assert good["state"]["epoch"] == failed["state"]["epoch"] == 1
    assert all(value.isfinite().all() for value in good["model"].values())
    assert math.isnan(failed["state"]["loss_sum"])


def test_seed_determines_the_weights(cache: PhotoCache, tmp_path: Path) -> None:
    runs = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        Trainer(cache, tmp_path / name, settings(epochs=1, seed=seed)).fit()
        runs.append(load_file(tmp_path / name / "best.safetensors"))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not all(torch.equal(runs[0][key], runs[2][key]) for key in runs[0])


def test_overfits_a_small_set(cache: PhotoCache, tmp_path: Path) -> None:
    class Keep(Observer):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def epoch(self, result: EpochResult) -> None:
            self.losses.append(result.train_loss)

    plain = {
        "model": {"backbone": "test_resnet"},
        "data": {"folds": 3},
        "augment": {"scale": 1.0, "rotate_degrees": 0.0, "flip_horizontal": False, "brightness": 0.0, "contrast": 0.0},
        "optimizer": {"learning_rate": 4e-3, "weight_decay": 0.0, "warmup_epochs": 2.0},
        "loop": {"epochs": 40, "batch_size": 16},
    }
    keep = Keep()
    Trainer(cache, tmp_path / "run", TrainConfig.from_dict(plain), observer=keep).fit()
    # At most two thirds of the photos are of one class, so predicting the prior gives a loss of at least 0.6.
    assert keep.losses[-1] < 0.15


def test_a_run_folder_is_complete(cache: PhotoCache, tmp_path: Path) -> None:
    said: list[str] = []

    class Hear(Observer):
        def say(self, text: str) -> None:
            said.append(text)

    Trainer(cache, tmp_path / "run", settings(epochs=2), observer=Hear()).fit()
    assert any("torch.compile is off: on a CPU" in text for text in said)
    names = {path.name.split(".")[0] for path in (tmp_path / "run").iterdir()}
    assert names == {"config", "splits", "metrics", "best", "last", "environment", "events"}
    run = Run.open(tmp_path / "run")
    assert TrainConfig.from_toml(tmp_path / "run" / "config.toml") == run.config
    asked = settings(epochs=2)
    assert run.config == resolve_settings(asked, torch.device("cpu"))[0]
    assert run.config.model.init == "scratch"
    assert any("no ImageNet weights of test_resnet on this machine: training from scratch" in text for text in said)
    assert run.provenance == {"source": "scratch"}
    assert run.spec == cache.spec
    assert run.labels == ("abnormal",)
    splits = pl.read_parquet(tmp_path / "run" / "splits.parquet")
    assert splits.group_by("patient").agg(pl.col("split").n_unique())["split"].max() == 1
    versions = json.loads((tmp_path / "run" / "environment.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__.split("+")[0]
    model = run.load_model()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1)


def test_split_file_determines_the_split(cache: PhotoCache, tmp_path: Path) -> None:
    names = ["test" if row % 6 < 2 else "val" if row % 6 < 4 else "train" for row in range(len(cache.manifest))]
    part = cache.manifest[:42]
    write_split_file(tmp_path / "split.csv", part, names[:42])
    plain = settings(epochs=1).to_dict()
    Trainer(
        cache, tmp_path / "run", TrainConfig.from_dict(plain | {"data": {"split_file": str(tmp_path / "split.csv")}})
    ).fit()
    splits = pl.read_parquet(tmp_path / "run" / "splits.parquet")
    assert splits["split"].to_list() == [*names[:42], *["excluded"] * 6]


def test_start_and_resume_errors(cache: PhotoCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"no last.ckpt to resume"):
        Trainer(cache, run, settings(), resume=True).fit()
    Trainer(cache, run, settings(epochs=1)).fit()
    with pytest.raises(CheckpointError, match="already contains a run; add --resume"):
        Trainer(cache, run, settings(epochs=1)).fit()
    with pytest.raises(ConfigError, match="started with different settings"):
        Trainer(cache, run, settings(epochs=2), resume=True).fit()
    (run / "last.ckpt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Trainer(cache, run, settings(epochs=1), resume=True).fit()
    with pytest.raises(CheckpointError, match="run fastfundus train first"):
        Run.open(tmp_path / "nowhere")


def test_schedule_by_hand() -> None:
    rates = [learning_rate(step, peak=1.0, warmup=4, total=12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
    assert learning_rate(0, peak=0.5, warmup=0, total=1) == 0.5


def test_averaged_model_by_hand() -> None:
    model = torch.nn.BatchNorm1d(1)
    averaged = AveragedModel(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(11.0)
    model.num_batches_tracked.fill_(7)
    averaged.update(model)
    # The decay of the first step is (1 + 1) / (10 + 1), which gives 1 * 2/11 + 11 * 9/11.
    assert averaged.module.weight.item() == pytest.approx(2 / 11 + 9)
    assert averaged.module.num_batches_tracked.item() == 7
    for _ in range(200):
        averaged.update(model)
    assert averaged.module.weight.item() == pytest.approx(11.0, abs=1e-3)


def test_a_resumed_run_keeps_its_split(cache: PhotoCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patients were dealt by another version: the stored split counts, also for a share of the labels."""
    from fastfundus.data import split

    deal = split.deal_groups
    config = TrainConfig.from_dict({**settings().to_dict(), "data": {"folds": 3, "label_fraction": 0.6}})
    with monkeypatch.context() as other:
        other.setattr(split, "deal_groups", lambda groups, strata, parts, seed: deal(groups, strata, parts, seed + 5))
        with pytest.raises(Interrupted):
            Trainer(cache, tmp_path / "run", config, observer=StopAt(1, 1)).fit()
    stored = pl.read_parquet(tmp_path / "run" / "splits.parquet")
    trainer = Trainer(cache, tmp_path / "run", config, resume=True)
    assert trainer.task.splits.equals(stored)
    fresh = Trainer(cache, tmp_path / "other", config)
    assert not fresh.task.splits.equals(stored)
    trainer.fit()


def test_the_random_numbers_of_a_gpu_are_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws its numbers on the GPU."""
    states: dict[str, torch.Tensor] = {"cuda:1": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    gpu, host = torch.device("cuda", 1), torch.device("cpu")
    saved = device_rng(gpu)
    states["cuda:1"] = torch.zeros(16, dtype=torch.uint8)
    set_device_rng(gpu, None)
    set_device_rng(host, saved)
    assert not states["cuda:1"].any()
    set_device_rng(gpu, saved)
    assert states["cuda:1"].tolist() == list(range(16))
    assert device_rng(host) is None
