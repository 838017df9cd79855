"""Drawing synthetic photos. Everything else has benches of its own.

    make bench                      timed
    make test                       once each, tiny, to see that they still work

Every timed function's output is checked in the same test.
"""

from __future__ import annotations

from typing import Any

import cv2
import pytest
import torch

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
