"""AOTInductor engines on a GPU against torch, interleaved in one run; called by `gpu_suite.sh`.

    python -m bench.gpu.engine --output FOLDER [--dry-run]

One batch of uint8 photos in GPU memory becomes probabilities by eager bfloat16, by torch.compile with CUDA graphs, and
by the engine's package. The engine is also timed with photos in host memory, as `screen` calls it. Each result is
compared with eager float32 in the same run. Needs torch, timm, onnx and NumPy.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from bench.gpu.train import run_cases
from bench.harness.comparison import Case, Variant, compare
from bench.harness.limits import matmul_limit
from fastfundus.engines import aoti_backend
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.parity import GATES
from fastfundus.engines.runtime import Blueprint
from fastfundus.models.flops import count_flops
from fastfundus.spec import PreprocessSpec

EAGER, COMPILED, PACKAGE, CALL = (
    "eager, bfloat16",
    "torch.compile, bfloat16",
    "AOTInductor",
    "AOTInductor, photos in host memory",
)


def measure(backbone: str, size: int, batch: int, device: torch.device, *, dry_run: bool) -> dict[str, Any]:
    """Measure and compare all variants on one batch."""
    torch.manual_seed(0)
    sized = {"img_size": size} if "vit" in backbone else {}
    network = timm.create_model(backbone, num_classes=1, **sized).eval()
    exact = ScreeningModel(network, PreprocessSpec(size=size), [1.0]).eval()
    photos = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    resident = torch.from_numpy(photos).to(device)
    fast = copy.deepcopy(exact).to(device)
    fast.compute_in(torch.bfloat16)
    how: dict[str, str] = {"backend": "aot_eager"} if dry_run else {"mode": "reduce-overhead"}
    compiled: Any = torch.compile(fast, dynamic=False, **how)  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metadata = aoti_backend.build(Blueprint(exact, folder / "none.onnx", size, photos), folder, "bf16")
        engine = aoti_backend.load(folder, {**metadata, "spec": {"size": size}, "precision": "bf16"})
        jobs: dict[str, Callable[[], Tensor]] = {
            EAGER: lambda: fast(resident),
            COMPILED: lambda: compiled(resident),
            PACKAGE: lambda: engine.run_on_device(resident),
            CALL: lambda: torch.from_numpy(engine.infer(photos)),
        }
        with torch.inference_mode():
            expected = copy.deepcopy(exact).to(device)(resident).cpu()
            flops = count_flops(network, torch.zeros(1, 3, size, size))[1] * batch
            case = Case(
                f"engine: {backbone}, {size} px, batch {batch}", "uint8 photos to probabilities", batch, photos.nbytes,
                "the photos read", flops, "two per multiply-add",
                matmul_limit("bf16", flops, device=device.type, side=64 if dry_run else 8192),
            )  # fmt: skip
            gate = GATES["bf16"].probability
            variants = [
                Variant(
                    name, job, name == EAGER, "", gate, lambda got, _: float((got.float().cpu() - expected).abs().max())
                )
                for name, job in jobs.items()
            ]
            found = compare(case, variants, rounds=2 if dry_run else 11, device=device.type)
        engine.close()
    return found


def main() -> None:
    """Measure the engines."""
    cases = [
        ("resnet50", 512, 64),
        ("resnet50", 224, 256),
        ("convnext_tiny", 224, 256),
        ("vit_small_patch16_224", 224, 256),
    ]
    run_cases("engine", measure, cases, ("test_resnet", 32, 4))


if __name__ == "__main__":
    main()
