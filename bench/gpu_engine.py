"""AOTInductor engines on a GPU against torch, in turns; `gpu_suite.sh` calls it.

    python -m bench.gpu_engine --output FOLDER [--dry-run]

One batch of uint8 photos on the GPU to probabilities: eager bfloat16, torch.compile at its best setting, and the
engine's package; and the engine from photos in the host's memory, as `screen` calls it. Each is compared with eager
float32 in the run. Needs torch, timm, onnx and NumPy.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu_train import run_cases, seconds_of
from fastfundus.engines import aoti_backend
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.parity import GATES
from fastfundus.engines.runtime import Blueprint
from fastfundus.spec import PreprocessSpec

EAGER, COMPILED, PACKAGE, CALL = (
    "eager, bfloat16",
    "torch.compile, bfloat16",
    "AOTInductor",
    "AOTInductor, from the host",
)


def measure(
    backbone: str, size: int, batch: int, device: torch.device, *, peak: float, dry_run: bool
) -> dict[str, Any]:
    """Images/s of every variant, medians over rounds in turns."""
    torch.manual_seed(0)
    sized = {"img_size": size} if "vit" in backbone else {}
    network = timm.create_model(backbone, num_classes=1, **sized).eval()
    exact = ScreeningModel(network, PreprocessSpec(size=size), [1.0]).eval()
    photos = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    resident = torch.from_numpy(photos).to(device)
    fast = copy.deepcopy(exact).to(device)
    fast.compute_in(torch.bfloat16)
    how: dict[str, str] = {"backend": "aot_eager"} if dry_run else {"mode": "max-autotune"}
    compiled: Any = torch.compile(fast, dynamic=False, **how)  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = aoti_backend.build(Blueprint(exact, folder / "none.onnx", size, photos), folder, "bf16")
        engine = aoti_backend.load(folder, {**about, "spec": {"size": size}, "precision": "bf16"})
        jobs: dict[str, Callable[[], Tensor]] = {
            EAGER: lambda: fast(resident),
            COMPILED: lambda: compiled(resident),
            PACKAGE: lambda: engine.run_on_device(resident),
            CALL: lambda: torch.from_numpy(engine.infer(photos)),
        }
        with torch.inference_mode():
            expected = copy.deepcopy(exact).to(device)(resident).cpu()
            differences = {label: float((job().float().cpu() - expected).abs().max()) for label, job in jobs.items()}
            worst = max(differences, key=lambda label: differences[label])
            assert differences[worst] <= GATES["bf16"].probability, f"{worst} differs by {differences[worst]:.2e}"
            times: dict[str, list[float]] = {label: [] for label in jobs}
            for number in range(2 if dry_run else 12):
                for label, job in jobs.items():
                    seconds = seconds_of(job, device)
                    if number:
                        times[label].append(seconds / batch)
        engine.close()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, size, size))
    rates = {label: 1 / statistics.median(values) for label, values in times.items()}
    flops = counter.get_total_flops()
    return {
        "backbone": backbone, "size": size, "batch": batch, "images_per_s": rates, "largest_difference": differences,
        "share_of_peak": {label: rate * flops / 1e12 / peak for label, rate in rates.items()},
        "package_over_compiled": statistics.median(
            slow / fast for slow, fast in zip(times[COMPILED], times[PACKAGE], strict=True)
        ),
    }  # fmt: skip


def main() -> None:
    """Measure engines."""
    cases = [
        ("resnet50", 224, 256),
        ("resnet50", 512, 64),
        ("convnext_tiny", 224, 256),
        ("vit_small_patch16_224", 224, 256),
    ]
    run_cases("engine", measure, cases, ("test_resnet", 32, 4))


if __name__ == "__main__":
    main()
