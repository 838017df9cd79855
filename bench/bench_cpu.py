"""CPU stages, each alone: drawing, inferring. Peers stand in the same group, and in the same run.

Preparing and sampling have benches of their own, `bench_prepare` and `bench_sample`.

    make bench                      timed
    make test                       once each, tiny, to see that they still work

Every timed function's output is checked in the same test.
"""

from __future__ import annotations

import os
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo


@pytest.fixture(autouse=True)
def _one_core(request: pytest.FixtureRequest) -> Any:
    """Time one core, whatever the machine has: rates per core can be compared."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def timed(request: pytest.FixtureRequest) -> bool:
    """Whether benchmarks are timed, or only run once to see that they work."""
    return bool(request.config.getoption("benchmark_enable"))


def test_draw_1024(benchmark: Any) -> None:
    """Promise: at least 10 images/s on one core."""
    benchmark.extra_info["unit"] = "1 image of 1024 x 1024"
    seeds = iter(range(10**6))
    photo = benchmark(lambda: draw_photo(next(seeds), lesions=("exudates", "haemorrhages"), long_side=1024))
    assert photo.image.shape == (1024, 1024, 3)
    assert photo.lesion_masks["exudates"].any()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory, timed: bool) -> Any:
    """An untrained classifier as torch module and as OpenVINO engine, and photos."""
    import timm

    from fastfundus.engines.build import build_bundle

    size = 512 if timed else 64
    torch.manual_seed(0)
    classifier = timm.create_model("resnet50" if timed else "resnet18", num_classes=1).eval()
    photos = np.random.default_rng(0).integers(0, 256, (16 if timed else 2, size, size, 3), dtype=np.uint8)
    labels = {"abnormal": {"temperature": 1.0, "threshold": 0.9, "finding": True}}
    spec = PreprocessSpec(size=size)
    bundle, report = build_bundle(
        classifier, spec, labels, photos, tmp_path_factory.mktemp("engine") / "bundle", provenance={}
    )
    return classifier, bundle, photos, report


@pytest.mark.benchmark(group="infer 16 photos, all cores")
def test_infer_engine(benchmark: Any, resnet: Any) -> None:
    _, bundle, photos, report = resnet
    engine = bundle.load()
    result = benchmark(engine.infer, photos)
    assert result.shape == (len(photos), 1)
    assert report.passed
    engine.close()


@pytest.mark.benchmark(group="infer 16 photos, all cores")
def test_infer_torch_float32(benchmark: Any, resnet: Any) -> None:
    from fastfundus.engines.export import ScreeningModel

    classifier, bundle, photos, _ = resnet
    torch.set_num_threads(os.cpu_count() or 1)
    model = ScreeningModel(classifier, bundle.spec, [1.0]).eval()
    tensor = torch.from_numpy(photos)

    def infer() -> torch.Tensor:
        with torch.inference_mode():
            return model(tensor)

    engine = bundle.load()
    gate = bundle.about["parity"]["gate_probability"]
    np.testing.assert_allclose(benchmark(infer).numpy(), engine.infer(photos), atol=gate)
    engine.close()
