"""Tests of `prepare --backend dali`: same statuses as on the CPU, and crops within the tolerance of scaled decodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastfundus.dali.decode import DaliDecoder
from fastfundus.dali.prepare import DaliPreparer
from fastfundus.data import PhotoCache
from fastfundus.photo.prepare import PreparedPhoto, prepare_photo
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from tests.cli.test_cli import run
from tests.conftest import write_rgb
from tests.tolerances import CIRCLE_SHIFT, SCALED_DECODE_GREY_LEVELS


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    return DaliDecoder(batch_size=32, threads=2)


def compare(paths: list[Path], spec: PreprocessSpec, decoder: DaliDecoder) -> list[PreparedPhoto]:
    """Prepare photos with DALI and compare each result with that of the CPU."""
    results = DaliPreparer(spec, decoder, threads=2)(paths)
    for path, got in zip(paths, results, strict=True):
        want = prepare_photo(path, spec)
        assert (got.status, got.reason) == (want.status, want.reason), path
        assert (got.sha256, got.bytes, got.facts) == (want.sha256, want.bytes, want.facts), path
        assert (got.width_px, got.height_px, got.field_shape) == (want.width_px, want.height_px, want.field_shape), path
        assert (got.image is None) == (want.image is None)
        if want.field is not None:
            shift = np.hypot(got.field.x_px - want.field.x_px, got.field.y_px - want.field.y_px)
            assert shift + abs(got.field.radius_px - want.field.radius_px) < CIRCLE_SHIFT * want.field.radius_px, path
        if want.image is not None:
            assert got.image.shape == (spec.size, spec.size, 3)
            assert got.image.flags.c_contiguous
            assert np.abs(got.image.astype(float) - want.image).mean() < SCALED_DECODE_GREY_LEVELS, path
            assert abs(got.quality - want.quality) < 0.1, path
    return results


@pytest.mark.parametrize("size", [64, 320])
@pytest.mark.parametrize("field", ["circle", "frame"])
def test_equals_the_cpu_on_drawn_photos(photo_folder: Path, decoder: DaliDecoder, size: int, field: str) -> None:
    paths = sorted((photo_folder / "images").glob("*.jpg"))[:12]
    results = compare(paths, PreprocessSpec(size=size, field=field), decoder)
    assert {result.status for result in results} == {Status.OK}


def test_every_broken_file_has_its_row(broken_photos: Path, decoder: DaliDecoder) -> None:
    (broken_photos / "folder.jpg").mkdir()
    paths = sorted(broken_photos.iterdir())
    results = dict(zip((path.name for path in paths), compare(paths, PreprocessSpec(size=64), decoder), strict=True))
    assert results["good.jpg"].status == Status.OK
    assert results["truncated.jpg"].status == Status.UNREADABLE
    assert results["folder.jpg"].reason == "cannot be read: it is a folder"


def test_a_file_that_only_dali_refuses_goes_to_the_cpu(
    photo_folder: Path, decoder: DaliDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((photo_folder / "images").glob("*.jpg"))[:4]
    decode = decoder.decode

    def refusing(files: list[bytes]):  # type: ignore[no-untyped-def]
        photos, refused = decode([data for n, data in enumerate(files) if n != 1])
        return photos, [*refused, 1]

    monkeypatch.setattr(decoder, "decode", refusing)
    spec = PreprocessSpec(size=64)
    got = DaliPreparer(spec, decoder)(paths)
    np.testing.assert_array_equal(got[1].image, prepare_photo(paths[1], spec).image)
    assert [result.status for result in got] == [Status.OK] * 4


def test_a_strip_is_no_burden_to_its_group(photo_folder: Path, decoder: DaliDecoder, tmp_path: Path) -> None:
    """With DALI, the squares of all photos in the group would have 17,000 x 17,000 pixels."""
    strip = write_rgb(tmp_path / "strip.jpg", np.full((300, 17000, 3), 90, np.uint8))
    results = compare([strip, *sorted((photo_folder / "images").glob("*.jpg"))[:2]], PreprocessSpec(size=64), decoder)
    assert [result.status for result in results] == [Status.NOT_FUNDUS, Status.OK, Status.OK]


@pytest.mark.real_data
def test_equals_the_cpu_on_camera_files(real_data: Path, decoder: DaliDecoder) -> None:
    folders = ("fullres_dr", "hrf/images", "idrid/images", "eyepacs", "hard", "exif", "dicom", "dme")
    paths = [path for folder in folders for path in sorted((real_data / folder).glob("*.*")) if path.is_file()][:32]
    results = compare(paths, PreprocessSpec(size=512), decoder)
    assert sum(result.status == Status.OK for result in results) > 15


def test_the_command_makes_the_same_cache(photo_folder: Path, broken_photos: Path, tmp_path: Path) -> None:
    for path in sorted((photo_folder / "images").glob("*.jpg"))[:21]:
        (broken_photos / path.name).write_bytes(path.read_bytes())
    caches = {}
    for backend in ("cpu", "dali"):
        command = ("prepare", broken_photos, "--output", tmp_path / backend, "--size", 64, "--backend", backend)
        result = run(*command)
        assert result.exit_code == 0, result.output
        caches[backend] = PhotoCache.open(tmp_path / backend)
    columns = ["path", "status", "reason", "sha256", "width_px", "height_px", "bytes"]
    cpu, dali = (cache.manifest.select(columns) for cache in caches.values())
    assert cpu.equals(dali)
    used = caches["cpu"].manifest.with_row_index().filter(pl.col("pixels_crc32").is_not_null())["index"].to_list()
    assert len(used) >= 21
    for row in used:
        difference = np.abs(caches["cpu"].photos[row].astype(float) - caches["dali"].photos[row])
        assert difference.mean() < SCALED_DECODE_GREY_LEVELS
    # Either backend can add photos to the cache.
    (broken_photos / "another.jpg").write_bytes((broken_photos / "good.jpg").read_bytes())
    again = run("prepare", broken_photos, "--output", tmp_path / "dali", "--size", 64, "--backend", "dali")
    assert again.exit_code == 0, again.output
    assert len(PhotoCache.open(tmp_path / "dali").manifest) == len(dali) + 1
