"""Engines on the CPU against torch, interleaved in one run: throughput, latency of one photo, overhead of our calls.

    make bench SUITES=engine        timed
    make test-long                  once with tiny inputs, without compiled variants

Every variant takes the same uint8 photos and returns probabilities. Each is compared with torch in float32 in every
round, and a difference above its gate ends the run. The baseline, which is what peers usually do, is eager torch in
float32, channels first, in batches of 16, in its own process. Weights are random, because speed does not depend on
them; the differences are therefore smaller than those of a trained model, which are in the parity report of its bundle.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray

from bench.harness.comparison import Case, Variant, compare
from bench.harness.limits import matmul_limit
from bench.harness.own_process import OwnProcess
from bench.tables.model_tables import EAGER, EAGER_KEPT
from fastfundus.engines import aoti_backend, onnxruntime_backend, openvino_backend
from fastfundus.engines.export import ScreeningModel, export_onnx
from fastfundus.engines.openvino_core import shared_core
from fastfundus.engines.parity import GATES
from fastfundus.engines.runtime import GRAPH, Blueprint, Engine
from fastfundus.models.flops import count_flops
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import write_dataset

Job = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
COMPILED, RAW = "torch.compile, bfloat16", "OpenVINO bf16, by its own queue"
BATCH = 16
SETTINGS = {
    EAGER: f"baseline, batches of {BATCH}", EAGER_KEPT: "with FastFundus's malloc settings",
    COMPILED: f"batches of {BATCH}", RAW: "same settings as FastFundus's engine",
}  # fmt: skip
CASES = (("resnet50", 224, 32, 7), ("resnet50", 512, 16, 5), ("convnext_tiny", 224, 32, 5),
         ("vit_small_patch16_224", 224, 32, 5))  # fmt: skip
"""Backbone, input size, photos per call, rounds."""
TINY = (("resnet18", 32, 2, 1),)


def drawn(size: int, count: int) -> NDArray[np.uint8]:
    """Return prepared synthetic photos, so that integer ranges are calibrated on realistic input and not on noise."""
    with tempfile.TemporaryDirectory() as name:
        write_dataset(Path(name), count, seed=5, poor_share=0.0, long_sides=(max(256, 2 * size),))
        spec = PreprocessSpec(size=size)
        made = (prepare_photo(path, spec).image for path in sorted(Path(name).rglob("*.jpg")))
        return np.stack([image for image in made if image is not None][:count])


def by_torch(model: ScreeningModel) -> Job:
    """Return a job that runs the model in batches."""

    def job(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = [model(torch.from_numpy(photos[row : row + BATCH])) for row in range(0, len(photos), BATCH)]
        return torch.cat(parts).float().numpy()

    return job


def by_own_queue(file: Path, size: int) -> Job:
    """Return a job that uses OpenVINO directly, with the settings of our engine."""
    core = shared_core()
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


def random_model(backbone: str, size: int) -> ScreeningModel:
    """Build a model whose random weights are the same in every process."""
    torch.manual_seed(0)
    sized = {"img_size": size} if backbone.startswith("vit") else {}
    network = timm.create_model(backbone, num_classes=1, **sized).eval()
    return ScreeningModel(network, PreprocessSpec(size=size), [1.0]).eval()


def flops_of(backbone: str, size: int) -> int:
    """Return the FLOPs of a forward pass for one photo."""
    return count_flops(random_model(backbone, size).network, torch.zeros(1, 3, size, size))[1]


def eager(backbone: str, size: int, photos: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
    """Return the baseline job for these photos."""
    return functools.partial(by_torch(random_model(backbone, size)), photos)


def ways(
    backbone: str, size: int, photos: NDArray[np.uint8], folder: Path, *, compiled: bool
) -> dict[str, tuple[str, Job]]:
    """Build the jobs by name, each with the precision whose gate it must pass; each compilation takes half a minute."""
    model = random_model(backbone, size)
    export_onnx(model, folder / GRAPH, ["abnormal"])
    blueprint = Blueprint(model, folder / GRAPH, size, photos)
    fast = copy.deepcopy(model)
    fast.compute_in(torch.bfloat16)
    made: dict[str, tuple[str, Job]] = {EAGER_KEPT: ("fp32", by_torch(model))}
    if compiled and "bf16" in openvino_backend.precisions():
        made[COMPILED] = ("bf16", by_torch(torch.compile(fast)))  # type: ignore[arg-type]
    backends = (("ONNX Runtime", onnxruntime_backend), ("AOTInductor", aoti_backend), ("OpenVINO", openvino_backend))
    for title, module in backends:
        for precision in module.precisions() if compiled or module is not aoti_backend else ():
            if module is aoti_backend and precision == "fp32" and "bf16" in module.precisions():
                continue
            place = folder / f"{title}_{precision}"
            place.mkdir()
            metadata = module.build(blueprint, place, precision) | {"precision": precision, "spec": {"size": size}}
            engine: Engine = module.load(place, metadata)
            made[f"{title} {precision}"] = (precision, engine.infer)
    if "OpenVINO bf16" in made:
        made[RAW] = ("bf16", by_own_queue(folder / "OpenVINO_bf16" / "engine.xml", size))
    return made


def inferring(
    backbone: str, size: int, jobs: dict[str, tuple[str, Job]], photos: NDArray[np.uint8], *, here: bool
) -> tuple[Case, list[Variant]]:
    """Build the case of one call with these photos and its variants; the baseline runs in this process if `here`."""
    flops = flops_of(backbone, size) * len(photos)
    limits = {
        precision: matmul_limit(precision, flops, quick=here) for precision in {kind for kind, _ in jobs.values()}
    }
    alone = ", one photo" if len(photos) == 1 else ""
    case = Case(
        f"{backbone}, {size} px{alone}", f"uint8 [{len(photos)}, {size}, {size}, 3] to probabilities", len(photos),
        photos.nbytes, "the photos read", flops, "two per multiply-add",
    )  # fmt: skip
    habit = OwnProcess(eager, backbone, size, photos, here=here)
    return case, [
        Variant(EAGER, habit, True, SETTINGS[EAGER], limit=limits["fp32"]),
        *(Variant(label, functools.partial(job, photos), False, SETTINGS.get(label, ""), GATES[precision].probability,
                  limit=limits[precision])
          for label, (precision, job) in jobs.items()),
    ]  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Use all networks when timing, and the tiny case otherwise."""
    cases = CASES if metafunc.config.getoption("benchmark_enable") else TINY
    metafunc.parametrize(("backbone", "size", "count", "rounds"), cases)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the exporters' own warnings
def test_engine(benchmark: Any, tmp_path: Path, backbone: str, size: int, count: int, rounds: int) -> None:
    """Measure photos/s of calls with many photos, and the time of calls with one."""
    keep_memory()
    photos = drawn(size, count)
    jobs = ways(backbone, size, photos, tmp_path, compiled=not benchmark.disabled)
    here = benchmark.disabled
    one = compare(*inferring(backbone, size, jobs, photos[:1], here=here), rounds=1 if here else 50)
    compare(*inferring(backbone, size, jobs, photos, here=here), rounds=rounds, benchmark=benchmark)
    benchmark.extra_info["one_photo"] = one
