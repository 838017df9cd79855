"""The settings that come with FastFundus are sound, and a dry run says what they cost without training."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fastfundus.cli.train import RECIPES
from fastfundus.config import LoopConfig, OptimizerConfig, TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.training.estimate import training_bytes
from fastfundus.training.optimizer import AveragedModel, build_optimizer
from fastfundus.training.step import TrainStep
from tests.cli.test_cli import run


def test_every_recipe_is_offered_and_sound() -> None:
    files = {entry.name for entry in resources.files("fastfundus.recipes").iterdir() if entry.name.endswith(".toml")}
    assert files == {f"{name}.toml" for name in RECIPES}
    for name in RECIPES:
        with resources.as_file(resources.files("fastfundus.recipes") / f"{name}.toml") as file:
            config = TrainConfig.from_toml(file)
            text = file.read_text()
        assert timm.is_model(config.model.backbone)
        # Each with its reasons.
        assert text.count("#") >= 6
        assert config.model.init == "scratch", "who has an upstream run names it"


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(cache: PhotoCache, tmp_path: Path) -> None:
    command = ("train", cache.path, "--backbone", "resnet18", "--batch-size", 8, "--dry-run")
    done = run(*command, "--recipe", "finetune", "--folds", 3)
    assert done.exit_code == 0, done.output
    assert "Missing option '--output'" in run("train", cache.path).stderr
    assert 'task = "abnormality"' in done.stdout
    assert "layer_decay = 0.75" in done.stdout
    assert "[8, 3, 64, 64] -> [8, 1]" in done.stdout
    assert "11.18 million, 11.18 of them trained" in done.stdout
    assert ", 3 folds" in done.stdout
    plan = json.loads(run(*command, "--json").stdout)
    assert plan["config"]["loop"]["batch_size"] == 8
    assert plan["parameters"] == sum(p.numel() for p in timm.create_model("resnet18", num_classes=1).parameters())
    # ResNet-18 takes 1.82 GMAC at 224 px; a product and a sum are two.
    assert plan["flops"] == pytest.approx(2 * 1.82e9 * (64 / 224) ** 2, rel=0.03)
    assert plan["photos"] == {"train": 26, "val": 12, "test": 10}
    assert plan["step_s"] > 0


def test_estimated_memory_is_near_what_a_step_takes() -> None:
    """Against what the allocator of a real step counts: tensors alive at the end of the forward pass."""
    model = timm.create_model("resnet18", num_classes=1)
    config = TrainConfig.from_dict({"loop": {"batch_size": 4, "amp": False}})
    summary = training_bytes(config, model, 64, torch.device("cpu"))
    step = TrainStep(
        model, model, build_optimizer(model, OptimizerConfig()), LoopConfig(amp=False),
        nn.functional.binary_cross_entropy_with_logits, clip_norm=1.0, device=torch.device("cpu"),
    )  # fmt: skip
    batch = [(torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.zeros(4, 1))]
    step(batch, 4, 1e-3)
    averaged = AveragedModel(model, 0.9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(batch, 4, 1e-3)
    alive = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    held = sum(value.numel() * 4 for value in [*model.parameters(), *averaged.module.parameters()])
    held += sum(v.numel() * 4 for state in step.optimizer.state.values() for v in state.values() if v.numel() > 1)
    # A quarter is spare on purpose; gradients are in what the profiler sees.
    assert 0.8 < summary / (held + peak) < 1.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "finetune", "--config", "x.toml"), "give --recipe or --config, not both"),
        (("--recipe", "fintune"), "'fintune' is not one of"),
    ],
)
def test_wrong_use_is_said(cache: PhotoCache, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run("train", cache.path, "--output", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in result.stderr
