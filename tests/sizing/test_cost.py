"""The cost model: recovery of known costs, predictions checked by hand, and the bench command."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.errors import ConfigError
from fastfundus.records import SourcePhoto
from fastfundus.sizing.cost import Machine, PhotoCost, PhotoKind, fit_photo_cost, kind_of, predict
from fastfundus.sizing.throughput import prepare_rate
from fastfundus.spec import PreprocessSpec
from tests.cli.test_cli import run
from tests.conftest import Trained


def kinds(count: int = 20) -> list[PhotoKind]:
    rng = np.random.default_rng(0)
    return [
        PhotoKind(size, size / divisor**2, size * quality)
        for size, divisor, quality in zip(
            rng.uniform(1, 20, count), rng.choice([1, 2, 4], count), rng.uniform(0.05, 0.4, count), strict=True
        )
    ]


def test_known_costs_are_recovered() -> None:
    true = PhotoCost(0.002, 0.0003, 0.004, 0.01)
    seconds = [true.seconds(kind) for kind in kinds()]
    found = fit_photo_cost(kinds(), seconds)
    for name in ("fixed_s", "per_megapixel_s", "per_decoded_megapixel_s", "per_megabyte_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    noisy = np.array(seconds) * np.random.default_rng(1).uniform(0.95, 1.05, 20)
    again = fit_photo_cost(kinds(), noisy.tolist())
    unseen = PhotoKind(10.0, 0.6, 0.8)
    assert again.seconds(unseen) == pytest.approx(true.seconds(unseen), rel=0.05)


def test_no_cost_is_negative() -> None:
    """A cost that a fit would make negative is set to zero, and the remaining ones explain the data."""
    found = fit_photo_cost(kinds(), [0.01 + 0.001 * kind.megapixels - 0.002 * kind.megabytes for kind in kinds()])
    assert found.per_megabyte_s == 0
    assert min(found.fixed_s, found.per_megapixel_s, found.per_decoded_megapixel_s) >= 0
    with pytest.raises(ConfigError, match="four kinds or more, got 3"):
        fit_photo_cost(kinds()[:3] * 4, [0.1] * 12)


def test_predictions_by_hand() -> None:
    # 4 cores, 20 ms to prepare and 60 ms in the engine: 50 photos/s in total.
    prediction = predict(Machine(4), prepare_s=0.02, megabytes=1.0, engine_s=0.06)
    assert prediction.photos_per_s == pytest.approx(50)
    assert prediction.stages == pytest.approx({"preparing": 200, "engine": 4 / 0.06})
    assert prediction.limit == "engine"
    # Storage of 30 MB/s and photos of 1 MB.
    slow = predict(Machine(4, storage_mb_per_s=30), prepare_s=0.02, megabytes=1.0, engine_s=0.06)
    assert (slow.photos_per_s, slow.limit) == (30, "storage")
    # Two GPUs with 900 photos/s each run in parallel with 16 cores that prepare 800 photos/s.
    gpus = predict(Machine(16, gpus=2), prepare_s=0.02, megabytes=1.0, gpu_images_per_s=900)
    assert gpus.photos_per_s == pytest.approx(800)
    assert gpus.limit == "preparing"
    assert predict(Machine(64, gpus=2), prepare_s=0.02, megabytes=1.0, gpu_images_per_s=900).limit == "engine"


@pytest.mark.parametrize(
    ("machine", "given", "said"),
    [
        (Machine(0), {"prepare_s": 0.1, "megabytes": 1.0, "engine_s": 0.1}, "must be above 0"),
        (Machine(2), {"prepare_s": 0.1, "megabytes": 1.0}, "without GPUs the engine's core-seconds"),
        (Machine(2, gpus=1), {"prepare_s": 0.1, "megabytes": 1.0, "engine_s": 0.1}, "--gpu-rate"),
    ],
)
def test_missing_values_are_named(machine: Machine, given: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        predict(machine, **given)


def test_kinds_are_read_from_headers(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    cv2.imwrite(str(path), np.full((1600, 2400, 3), 90, np.uint8))
    kind = kind_of(path.read_bytes(), PreprocessSpec(size=512))
    assert kind == PhotoKind(3.84, 0.96, path.stat().st_size / 1e6), "decoded at half size: a quarter of the pixels"


def test_measuring_unreadable_photos_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8 no photo")
    from fastfundus.errors import DataError

    with pytest.raises(DataError, match="none of the 1 photos can be prepared"):
        prepare_rate([SourcePhoto(path, "broken.jpg", "p")], PreprocessSpec(size=64), 0.1)


def test_the_command_skips_inputs_that_are_not_photos(broken_photos: Path, tmp_path: Path) -> None:
    result = run("bench", "prepare", "--photos", broken_photos, "--seconds", "0.1")
    assert result.exit_code == 0, result.output
    assert "inputs that are not photos were left out" in result.output
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "junk.jpg").write_bytes(b"junk")
    refused = run("bench", "prepare", "--photos", tmp_path / "none")
    assert refused.exit_code == 1
    assert "inputs is a readable photo; the first is " in refused.output


def test_flops_of_a_known_network_and_of_a_bundle(trained: Trained) -> None:
    import timm
    import torch

    from fastfundus.models.flops import count_flops

    def gflop(backbone: str, size: int) -> float:
        return count_flops(timm.create_model(backbone, num_classes=1).eval(), torch.zeros(1, 3, size, size))[1] / 1e9

    assert gflop("resnet18", 224) == pytest.approx(2 * 1.82, rel=0.02), "1.82 GMAC, two FLOPs each"
    assert trained.bundle.metadata["gflop"] == pytest.approx(gflop("test_resnet", 64), rel=0.02)


def test_the_command_measures_and_predicts(trained: Trained, photo_folder: Path) -> None:
    common = ("bench", "--bundle", trained.bundle.path, "--photos", photo_folder / "images", "--seconds", "0.2")
    result = run(*common, "--predict", "--cores", "64", "--storage", "500", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    prediction, cores = found["prediction"], found["cores"]
    expected = 64 / (cores / found["prepare"]["photos_per_s"] + cores / found["engine"]["photos_per_s"])
    assert prediction["photos_per_s"] == pytest.approx(min(expected, 500 / found["megabytes"]))
    assert prediction["photos_per_hour"] == pytest.approx(3600 * prediction["photos_per_s"])
    assert set(prediction["stages"]) == {"preparing", "engine", "storage"}
    spoken = run(*common, "--predict")
    for said in ("reading, decoding, cropping", "GFLOP/s", "of both in sequence", "photos per hour"):
        assert said in spoken.output
    for arguments, said in (
        (("bench", "--predict"), "--predict needs an engine; add --bundle"),
        (("bench", "engine"), "engine needs an engine; add --bundle"),
        (("bench", "--cores", "4"), "apply to --predict only; add it"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert said in refused.output
