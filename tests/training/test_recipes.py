"""The bundled recipes are valid, and a dry run estimates their cost without training."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fastfundus.config import LoopConfig, OptimizerConfig, TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.recipes import RECIPES
from fastfundus.training.estimate import training_bytes
from fastfundus.training.optimizer import AveragedModel, build_optimizer
from fastfundus.training.step import TrainStep
from tests.cli.test_cli import run

RATES = OptimizerConfig(learning_rate=1e-3, layer_decay=1.0)


def test_every_recipe_is_listed_and_valid() -> None:
    files = {entry.name for entry in resources.files("fastfundus.recipes").iterdir() if entry.name.endswith(".toml")}
    assert files == {f"{name}.toml" for name in RECIPES}
    for name in RECIPES:
        with resources.as_file(resources.files("fastfundus.recipes") / f"{name}.toml") as file:
            config = TrainConfig.from_toml(file)
            text = file.read_text()
        assert timm.is_model(config.model.backbone)
        # Comments give the reasons for the settings.
        assert text.count("#") >= 6
        assert config.model.init == "auto", "a recipe cannot know the path of an upstream run"


def test_dry_run_estimates_the_cost_and_writes_nothing(cache: PhotoCache, tmp_path: Path) -> None:
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
    # ResNet-18 takes 1.82 GMAC at 224 px; a multiply-add counts as two FLOPs.
    assert plan["flops"] == pytest.approx(2 * 1.82e9 * (64 / 224) ** 2, rel=0.03)
    assert plan["photos"] == {"train": 28, "val": 10, "test": 10}
    assert plan["step_s"] > 0


def test_estimated_memory_is_close_to_a_real_step() -> None:
    """Compare with the peak that the allocator counts in a real step, plus the parameters and the optimizer's state."""
    model = timm.create_model("resnet18", num_classes=1)
    config = TrainConfig.from_dict({"loop": {"batch_size": 4, "amp": False}})
    estimate = training_bytes(config, model, 64, torch.device("cpu"))
    step = TrainStep(
        model, model, build_optimizer(model, RATES), LoopConfig(amp=False),
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
    # The estimate has a margin of a quarter; the gradients are in the profiler's peak.
    assert 0.8 < estimate / (held + peak) < 1.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "finetune", "--config", "x.toml"), "give --recipe or --config, not both"),
        (("--recipe", "fintune"), "'fintune' is not one of"),
    ],
)
def test_usage_errors(cache: PhotoCache, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run("train", cache.path, "--output", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in result.stderr
