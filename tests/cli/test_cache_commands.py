"""Tests of `fastfundus cache`, and of adapters, salts and previews of `prepare`, as users see them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import polars as pl
import pytest

from fastfundus.data.adapters import ADAPTERS
from tests.cli.test_cli import run


@pytest.fixture(scope="module")
def folder(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of 24 patients, with copies of three photos under other names."""
    work = tmp_path_factory.mktemp("cache-cli")
    shutil.copytree(photo_folder, work / "photos")
    images = work / "photos" / "images"
    shutil.copy(images / "p00000_left.jpg", images / "copy0.jpg")
    for number, patient in enumerate(("p00003", "p00005"), start=1):
        picture = cv2.imread(str(images / f"{patient}_left.jpg"))
        cv2.imwrite(str(images / f"copy{number}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 60])
    labels = work / "photos" / "labels.csv"
    rows = labels.read_text().splitlines()
    header = rows[0].split(",")
    for number in range(3):
        rows.append(",".join([f"images/copy{number}.jpg", *[""] * (len(header) - 1)]))
    labels.write_text("\n".join(rows) + "\n")
    result = run("prepare", work / "photos", "--labels", labels, "--output", work / "cache", "--size", 64, "--preview")
    assert result.exit_code == 0, result.output
    assert "pairs of duplicates or near duplicates across patients: 3" in result.stderr
    assert (work / "cache" / "preview.html").is_file()
    return work / "cache"


def test_info(folder: Path) -> None:
    result = run("cache", "info", folder)
    assert result.exit_code == 0
    for text in ("51 photos at 64 px", "status: 51 ok", "label abnormal: known for 48", "across patients: 3"):
        assert text in result.stdout
    metadata = json.loads(run("cache", "info", folder, "--json").stdout)
    assert metadata["duplicate_pairs"] == 3
    assert metadata["labels"]["abnormal"]["distinct"] == 2
    assert metadata["patients_unknown"] == 3
    assert "not a photo cache" in run("cache", "info", folder.parent).stderr
    assert "nowhere: does not exist" in run("cache", "info", folder.parent / "nowhere").stderr


def test_verify(folder: Path, tmp_path: Path) -> None:
    assert "51 photos match their checksums" in run("cache", "verify", folder, "--sources").stdout
    spoilt = tmp_path / "cache"
    shutil.copytree(folder, spoilt)
    data = bytearray((spoilt / "photos.npy").read_bytes())
    data[128 + 64 * 64 * 3 + 6000] ^= 255
    (spoilt / "photos.npy").write_bytes(data)
    result = run("cache", "verify", spoilt, "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["faults"]) == 1
    assert "1 faults" in result.stderr


def test_audit_and_split(folder: Path, tmp_path: Path) -> None:
    result = run("cache", "audit", folder, "--label", "abnormal", "--output", tmp_path / "pairs.csv")
    assert result.exit_code == 0, result.output
    assert "51 photos of 27 patients; pairs across patients: 2 looks the same, 1 same bytes" in result.stdout
    assert "the patient of 3 photos is unknown" in result.stderr
    assert len(pl.read_csv(tmp_path / "pairs.csv")) == 3
    assert "did you mean 'abnormal'" in run("cache", "audit", folder, "--label", "abnrmal").stderr

    split = run("cache", "split", folder, "--holdout", "0.3", "0.2", "--output", tmp_path / "split.csv")
    assert split.exit_code == 0, split.output
    assert "48 photos with a label" in split.stdout
    assert run("cache", "audit", folder, "--splits", tmp_path / "split.csv").exit_code == 0
    # A copy that was moved to another side by hand.
    table = pl.read_csv(tmp_path / "split.csv")
    original = table.filter(pl.col("path") == "images/p00000_left.jpg")
    other = "test" if original["split"][0] == "train" else "train"
    copy = original.with_columns(path=pl.lit("images/copy0.jpg"), split=pl.lit(other), patient=pl.lit("x"))
    pl.concat([table, copy]).write_csv(tmp_path / "leaking.csv")
    leaking = run("cache", "audit", folder, "--splits", tmp_path / "leaking.csv")
    assert leaking.exit_code == 1
    assert "pairs on different sides of the split: 1" in leaking.stdout
    assert "photos leak" in leaking.stderr
    against = run("cache", "audit", folder, "--against", folder, "--json")
    assert against.exit_code == 1
    assert len(json.loads(against.stdout)["shared"][str(folder)]) >= 51
    assert run("cache", "split", folder, "--folds", 5, "--holdout", "0.3", "0.2", "--output", "x").exit_code == 2


def test_adapters_are_listed_and_named(tmp_path: Path) -> None:
    result = run("prepare", "--list-adapters")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(ADAPTERS)
    (tmp_path / "a.jpg").write_bytes(b"x")
    wrong = run("prepare", tmp_path, "--adapter", "mesidor2", "--output", tmp_path / "cache")
    assert wrong.exit_code == 1
    assert "did you mean 'messidor2'" in wrong.stderr


def test_a_salt_must_keep_a_secret(photo_folder: Path, tmp_path: Path) -> None:
    salt = tmp_path / "salt"
    salt.write_text("short")
    arguments = ("prepare", photo_folder, "--output", tmp_path / "cache", "--size", 64, "--patient-salt", salt)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "a patient salt of 5 bytes is too easy to guess" in result.stderr
    salt.write_text("0123456789abcdef0123456789abcdef\n")
    assert run(*arguments).exit_code == 0
    manifest = pl.read_parquet(tmp_path / "cache" / "manifest.parquet")
    assert not manifest["patient"].str.contains("p000").any()
    assert "patients: 24 known, hashed" in run("cache", "info", tmp_path / "cache").stdout


def test_augment_draws_a_sheet(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[augment]\nrotate_degrees = 90.0\n")
    command = ("cache", "augment", folder, "--photos", 3, "--draws", 2)
    result = run(*command, "--config", config, "--output", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'sheet.png'}: 3 photos, 2 draws each, 592 x 592 pixels\n"
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (592, 592, 3)
    cells = [sheet[4:196, 4 + 196 * n : 196 + 196 * n].astype(float) for n in range(3)]
    # The original, then two draws that differ from it and from each other.
    assert min(abs(cells[a] - cells[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))) > 3
    again = run(*command, "--config", config, "--output", tmp_path / "again.png")
    assert again.exit_code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    refused = run(*command, "--output", tmp_path / "sheet.gif")
    assert refused.exit_code == 2
    assert "--output must end in .png, .jpg or .jpeg, got sheet.gif" in refused.stderr
