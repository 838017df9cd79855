"""Engines on the CPU against torch, in turns in one run: throughput, latency of one photo, and what our calls add.

    python -m bench.bench_engine [--output bench/results/engine_cpu_YYYYMM.json]

Every variant takes the same uint8 photos and gives probabilities; each is compared with torch in float32 in this run,
and a variant that differs by more than its gate ends it. The peers' habit is torch, eager, float32, channels first, in
batches of 16. Weights are random: speed does not depend on them, and differences are then smaller than a trained
model's, whose figures are in the parity report of its bundle.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from bench.paired import environment
from fastfundus.engines import aoti_backend, onnxruntime_backend, openvino_backend
from fastfundus.engines.export import ScreeningModel, export_onnx
from fastfundus.engines.parity import GATES
from fastfundus.engines.runtime import GRAPH, Blueprint, Engine
from fastfundus.photo.prepare import prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset

Job = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
EAGER, COMPILED, RAW = "torch eager, float32", "torch.compile, bfloat16", "OpenVINO bf16, by its own queue"
BATCH = 16
COMPILED_AHEAD = (("AOTInductor", aoti_backend),)


def drawn(size: int, count: int) -> NDArray[np.uint8]:
    """Prepared photos: ranges of integers are learned on what a model would see, not on noise."""
    with tempfile.TemporaryDirectory() as name:
        write_dataset(Path(name), count, seed=5, poor_share=0.0, long_sides=(max(256, 2 * size),))
        spec = PreprocessSpec(size=size)
        made = (prepare_photo(path, spec).image for path in sorted(Path(name).rglob("*.jpg")))
        return np.stack([image for image in made if image is not None][:count])


def by_torch(model: ScreeningModel) -> Job:
    """The model in batches."""

    def job(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = [model(torch.from_numpy(photos[row : row + BATCH])) for row in range(0, len(photos), BATCH)]
        return torch.cat(parts).float().numpy()

    return job


def by_own_queue(file: Path, size: int) -> Job:
    """What someone would write who uses OpenVINO alone, with the settings of our engine."""
    core = openvino_backend.shared_core()
    import openvino

    model = core.read_model(file)
    model.reshape([1, size, size, 3])
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "bf16"}
    compiled = core.compile_model(model, "CPU", settings)
    outputs = compiled.output(0).shape[1]
    queue = openvino.AsyncInferQueue(compiled)
    result = np.empty((0, outputs), np.float32)

    def keep(request: Any, row: int) -> None:
        result[row] = request.get_output_tensor(0).data[0]

    queue.set_callback(keep)

    def job(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        nonlocal result
        result = np.empty((len(photos), outputs), np.float32)
        for row in range(len(photos)):
            queue.start_async({0: photos[row : row + 1]}, row)
        queue.wait_all()
        return result

    return job


def variants(backbone: str, size: int, photos: NDArray[np.uint8], folder: Path) -> dict[str, tuple[str, Job]]:
    """Jobs by name, each with the precision whose gate it must pass."""
    torch.manual_seed(0)
    sized = {"img_size": size} if backbone.startswith("vit") else {}
    network = timm.create_model(backbone, num_classes=1, **sized).eval()
    model = ScreeningModel(network, PreprocessSpec(size=size), [1.0]).eval()
    export_onnx(model, folder / GRAPH, ["abnormal"])
    blueprint = Blueprint(model, folder / GRAPH, size, photos)
    fast = copy.deepcopy(model)
    fast.compute_in(torch.bfloat16)
    made: dict[str, tuple[str, Job]] = {EAGER: ("fp32", by_torch(model))}
    if "bf16" in openvino_backend.precisions():
        made[COMPILED] = ("bf16", by_torch(torch.compile(fast)))  # type: ignore[arg-type]
    backends = (("ONNX Runtime", onnxruntime_backend), *COMPILED_AHEAD, ("OpenVINO", openvino_backend))
    for title, module in backends:
        for precision in module.precisions():
            if module is aoti_backend and precision == "fp32" and "bf16" in module.precisions():
                continue
            place = folder / f"{title}_{precision}"
            place.mkdir()
            about = module.build(blueprint, place, precision) | {"precision": precision, "spec": {"size": size}}
            engine: Engine = module.load(place, about)
            made[f"{title} {precision}"] = (precision, engine.infer)
    if "OpenVINO bf16" in made:
        made[RAW] = ("bf16", by_own_queue(folder / "OpenVINO_bf16" / "engine.xml", size))
    return made


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of 2048 x 2048 matrices, the best of some: what the processor gives at most."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best / 1e9


def gflop(backbone: str, size: int) -> float:
    """Of one photo: two for each multiplication with addition."""
    from torch.utils.flop_counter import FlopCounterMode

    sized = {"img_size": size} if backbone.startswith("vit") else {}
    model = timm.create_model(backbone, num_classes=1, **sized).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 1e9


def measure(backbone: str, size: int, *, photos: int, rounds: int, singles: int) -> dict[str, Any]:
    """Images/s of every variant in turns, ratios round by round, and milliseconds of single photos."""
    inputs = drawn(size, photos)
    with tempfile.TemporaryDirectory() as name:
        jobs = variants(backbone, size, inputs, Path(name))
        times: dict[str, list[float]] = {label: [] for label in jobs}
        differences: dict[str, float] = {}
        expected: NDArray[np.float32] | None = None
        for number in range(rounds + 1):
            for label, (precision, job) in jobs.items():
                began = time.perf_counter()
                got = job(inputs)
                seconds = time.perf_counter() - began
                expected = got if expected is None else expected
                differences[label] = float(np.abs(got - expected).max())
                if differences[label] > GATES[precision].probability:
                    raise SystemExit(f"{label}: differs by {differences[label]:.2e}; no figure is worth anything")
                if number:  # the first round compiles and warms up
                    times[label].append(seconds / len(inputs))
            print(backbone, size, number, {k: f"{1 / v[-1]:.1f}" for k, v in times.items() if v}, flush=True)
        latency = {label: _latency(job, inputs, singles) for label, (_, job) in jobs.items() if label != RAW}

    def ratio(slow: str, fast: str) -> dict[str, float] | None:
        if slow not in times or fast not in times:
            return None
        values = np.array(times[slow]) / np.array(times[fast])
        return {"median": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}

    return {
        "backbone": backbone,
        "size": size,
        "gflop": gflop(backbone, size),
        "photos": len(inputs),
        "rounds": rounds,
        "images_per_s": {label: float(1 / np.median(values)) for label, values in times.items()},
        "largest_difference": differences,
        "latency_ms": latency,
        "bf16_over_eager": ratio(EAGER, "OpenVINO bf16"),
        "bf16_over_compiled": ratio(COMPILED, "OpenVINO bf16"),
        "int8_over_bf16": ratio("OpenVINO bf16", "OpenVINO int8"),
        "int8_over_eager": ratio(EAGER, "OpenVINO int8"),
        "own_queue_over_call": ratio(RAW, "OpenVINO bf16"),
    }


def _latency(job: Job, photos: NDArray[np.uint8], count: int) -> dict[str, float]:
    times = []
    for number in range(count + 3):
        began = time.perf_counter()
        job(photos[number % len(photos)][None])
        if number >= 3:
            times.append(1000 * (time.perf_counter() - began))
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99)), "calls": count}


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser()
    default = Path(__file__).parent / "results" / f"engine_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    about = environment(("torch", "timm", "openvino", "nncf", "onnxruntime", "numpy"))
    about["matmul_gflops"] = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    print(about["matmul_gflops"], flush=True)
    parts = [
        measure("resnet50", 224, photos=32, rounds=7, singles=100),
        measure("resnet50", 512, photos=16, rounds=5, singles=50),
        measure("convnext_tiny", 224, photos=32, rounds=5, singles=50),
        measure("vit_small_patch16_224", 224, photos=32, rounds=5, singles=50),
    ]
    options.output.write_text(json.dumps({**about, "parts": parts}, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
