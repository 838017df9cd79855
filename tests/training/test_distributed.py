"""Training by two processes: the results of one process, and a restart after one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from fastfundus.config import TrainConfig, to_toml
from fastfundus.data import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.training.distributed import World
from fastfundus.training.trainer import Trainer
from tests.conftest import Trained

# A network without batch statistics, because each process would compute those of its own share; float32, so that only
# the order of summation differs; a small learning rate, because AdamW divides gradients by their own magnitude.
SETTINGS = {
    "model": {"backbone": "test_convnext"},
    "data": {"folds": 3},
    "loss": {"positive_weight": 0},
    "optimizer": {"learning_rate": 1e-4},
    "loop": {"epochs": 4, "batch_size": 4, "accumulate": 2, "amp": False, "sampler": "balanced"},
}


def torchrun(*arguments: object, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "--max-restarts", str(restarts), "-m", "fastfundus", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(to_toml(TrainConfig.from_dict(SETTINGS).to_dict()))
    return path


@pytest.fixture(scope="module")
def two(cache: PhotoCache, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, not interrupted."""
    output = tmp_path_factory.mktemp("two") / "two"
    command = torchrun("train", cache.path, "--output", output, "--config", config)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # Only one process prints.
    assert done.stdout.count("best epoch") == 1
    assert done.stderr.count("epoch 1/4") == 1
    return output


@pytest.mark.long
def test_two_processes_train_as_one(cache: PhotoCache, two: Path, config: Path, tmp_path: Path) -> None:
    """Accumulate two parts per step; each part is divided between the processes."""
    Trainer(cache, tmp_path / "one", TrainConfig.from_toml(config)).fit()
    paths = tmp_path / "one", two
    one, two_state = (torch.load(path / "last.ckpt", weights_only=True) for path in paths)
    for name, value in one["model"].items():
        # Gradients are summed in another order, which AdamW's first steps amplify to at most 1e-4, their learning rate.
        torch.testing.assert_close(two_state["model"][name], value, rtol=0, atol=2e-5, msg=name)
    metrics = [pl.read_csv(path / "metrics.csv").drop("images_per_s", "seconds") for path in paths]
    for left, right in zip(*(table.rows() for table in metrics), strict=True):
        # Each validation photo counts once: a duplicate among 16 photos would change the AUROC.
        assert left == pytest.approx(right, rel=1e-4)
    assert len(two_state["state"]["rng"]) == 2


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Compare the averaged gradients before the optimizer step, for uneven shares with some unknown labels."""
    script = tmp_path / "gradients.py"
    script.write_text(
        """
import sys, warnings
import numpy as np, torch
from torch import nn
from fastfundus.config import LoopConfig
from fastfundus.training.distributed import World, join_processes
from fastfundus.training.loader import split_batch
from fastfundus.training.tasks.losses import binary_loss
from fastfundus.training.step import TrainStep

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 2))
inputs, truth = torch.randn(11, 3, 8, 8), (torch.rand(11, 2) < 0.5).float()
truth[::3, 0] = torch.nan
known = float(truth.isfinite().sum() / 11)
with join_processes() as world:
    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept.extend(value.grad.clone() for value in model.parameters())
    kept = []
    step = TrainStep(model, world.spread(model, model), Keep(model.parameters(), lr=1.0), LoopConfig(amp=False),
                     lambda logits, wanted: binary_loss(logits, wanted, known=known), clip_norm=1e6,
                     device=torch.device("cpu"), world=world)
    parts = split_batch(world.share(np.arange(11)), 2)
    loss = step([(inputs[part], truth[part]) for part in parts], 11, 1.0, pieces=len(parts))
    total = sum(world.gather(float(loss)))
    same = world.gather([float(value.sum()) for value in kept])
    assert all(values == same[0] for values in same)
    assert world.any(world.rank == world.size - 1, False) == (True, False)
    if world.leads:
        torch.save({"grads": kept, "loss": total}, sys.argv[1])
"""
    )
    alone = [sys.executable, str(script), str(tmp_path / "one.pt")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in (alone, [*launcher, str(script), str(tmp_path / "two.pt")]):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for left, right in zip(one["grads"], two["grads"], strict=True):
        # Eleven float32 terms are summed in another order.
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_elastic_restart_after_a_killed_process(cache: PhotoCache, config: Path, two: Path, tmp_path: Path) -> None:
    """torchrun restarts both processes, and they resume from the last checkpoint."""
    output = tmp_path / "run"
    # Four epochs are long enough that it is still training when one process is killed after the first.
    command = torchrun("train", cache.path, "--output", output, "--config", config, restarts=1)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (output / "last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "resuming after epoch" in err
    assert f"{output}: best epoch" in out
    history = pl.read_csv(output / "metrics.csv")
    assert history["epoch"].to_list() == list(range(1, 5))
    # No step is lost or repeated: the weights equal those of an uninterrupted run.
    killed, never = (torch.load(path / "last.ckpt", weights_only=True) for path in (output, two))
    assert all(torch.equal(value, killed["model"][name]) for name, value in never["model"].items())


def test_single_process_world(trained: Trained) -> None:
    import numpy as np

    world = World()
    assert world.leads
    assert world.gather("a") == ["a"]
    assert world.any(True, False) == (True, False)
    np.testing.assert_array_equal(world.share(np.arange(3)), [0, 1, 2])
    crowd = World()
    crowd.size, crowd.rank = 4, 3
    np.testing.assert_array_equal(crowd.share(np.arange(6)), [5])
    with pytest.raises(ConfigError, match=r"a batch of 3 photos cannot be divided among 4 processes; raise loop"):
        crowd.share(np.arange(3))
