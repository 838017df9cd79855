"""Parity tests on synthetic and real photos: each backend is compared with the reference, in grey levels and scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastfundus.spec import PreprocessSpec
from tests import tolerances
from tests.conftest import Trained

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


def check(paths: list[Path], trained: Trained) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'fastfundus[dali]'")
    from bench.evidence.parity import KERNELS, matrix
    from fastfundus.training.run import Run

    rows = matrix(paths, PreprocessSpec(size=64), Run.open(trained.run).load_model())
    assert len(rows) == len(KERNELS) + 2
    for name, row in rows.items():
        if name in KERNELS:
            # Crops extend at most 512 pixels into the photo, with boxes of 8 pixels.
            assert row["grey_levels_most"] < tolerances.sample_grey_levels(512, 8), name
            assert row["probability_most"] < tolerances.KERNEL_PROBABILITY, name
        else:
            assert row["grey_levels_worst_photo"] < tolerances.SCALED_DECODE_GREY_LEVELS, name
            assert row["probability_most"] < tolerances.PREPARE_PROBABILITY, name
    # Each row differs from the reference at least by rounding; zero would mean comparing the reference to itself.
    assert all(row["grey_levels_most"] > 0 for row in rows.values())


def test_matrix_on_drawn_photos(photo_folder: Path, trained: Trained) -> None:
    check(sorted((photo_folder / "images").glob("*.jpg"))[:6], trained)


@pytest.mark.real_data
def test_matrix_on_real_photos(real_data: Path, trained: Trained) -> None:
    """Photos are 512 pixels wide, as interpreted kernels take minutes per camera file; see `make parity` for those."""
    check(sorted((real_data / "odir").rglob("*.jpg"))[:3], trained)
