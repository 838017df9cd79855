"""Detection of copied, re-encoded, resized or flipped photos, without false positives."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.data.duplicates import MAX_BITS, near_pairs
from fastfundus.data.leakage import check_leakage, overlap, pair_positions
from fastfundus.photo import prepare_photo
from fastfundus.photo.perceptual_hash import flipped_hashes, local_contrast, perceptual_hash
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo

SPEC = PreprocessSpec(size=128)


def cached(folder: Path, output: Path, labels: str | None = None) -> PhotoCache:
    table = None
    if labels is not None:
        table = folder.parent / "labels.csv"
        table.write_text(labels)
    listing = list_photos(folder, labels=table)
    return build_cache(listing.photos, output, SPEC, source=listing.root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with photos of six patients, and copies of five of them under other names."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        lesions = ("exudates",) if seed % 2 else ("haemorrhages",)
        photo = draw_photo(seed, lesions=lesions, eye="LR"[seed % 2], long_side=600)
        cv2.imwrite(str(folder / f"p{seed}_left.jpg"), photo.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    shutil.copy(folder / "p0_left.jpg", folder / "copy0.jpg")
    for seed, change in [(1, encoded), (2, smaller), (3, mirrored), (4, framed)]:
        change(cv2.imread(str(folder / f"p{seed}_left.jpg")), folder / f"copy{seed}.jpg")
    return folder


def encoded(bgr: np.ndarray, path: Path) -> None:
    brighter = cv2.convertScaleAbs(bgr, alpha=1.15, beta=4)
    cv2.imwrite(str(path), brighter, [cv2.IMWRITE_JPEG_QUALITY, 50])


def smaller(bgr: np.ndarray, path: Path) -> None:
    cv2.imwrite(str(path), cv2.resize(bgr, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA))


def mirrored(bgr: np.ndarray, path: Path) -> None:
    cv2.imwrite(str(path), bgr[:, ::-1])


def framed(bgr: np.ndarray, path: Path) -> None:
    cv2.imwrite(str(path), cv2.copyMakeBorder(bgr[15:-15], 0, 0, 90, 90, cv2.BORDER_CONSTANT))


def test_copies_are_found_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    cache = cached(folder, tmp_path / "cache")
    pairs = check_leakage(cache).pairs
    assert set(pairs.select("path_a", "path_b", "kind").rows()) == {
        ("copy0.jpg", "p0_left.jpg", "same bytes"),
        ("copy1.jpg", "p1_left.jpg", "looks the same"),
        ("copy2.jpg", "p2_left.jpg", "looks the same"),
        ("copy3.jpg", "p3_left.jpg", "mirrored"),
        ("copy4.jpg", "p4_left.jpg", "looks the same"),
    }
    assert pairs["likeness"].min() >= 0.93
    assert pair_positions(cache, np.arange(len(cache.manifest))) == cache.duplicates().select("row_a", "row_b").rows()
    # Positions within a subset of the rows.
    names = cache.manifest["path"].to_list()
    part = np.array([names.index("p1_left.jpg"), names.index("copy1.jpg"), names.index("copy2.jpg")])
    assert pair_positions(cache, part) == [(1, 0)]


def test_copies_of_one_patient_are_no_leak(folder: Path, tmp_path: Path) -> None:
    labels = "file,patient\n" + "".join(f"copy{n}.jpg,p{n}\np{n}_left.jpg,p{n}\n" for n in range(5))
    assert len(check_leakage(cached(folder, tmp_path / "cache", labels)).pairs) == 0


def test_an_audit_knows_sides_and_labels(folder: Path, tmp_path: Path) -> None:
    labels = "file,abnormal\ncopy1.jpg,1\np1_left.jpg,0\ncopy2.jpg,1\np2_left.jpg,1\n"
    cache = cached(folder, tmp_path / "cache", labels)
    names = ["test" if path.startswith("copy") else "train" for path in cache.manifest["path"]]
    names[cache.manifest["path"].to_list().index("copy4.jpg")] = "excluded"
    audit = check_leakage(cache, names, ["abnormal"])
    assert audit.leaks["path_a"].to_list() == ["copy0.jpg", "copy1.jpg", "copy2.jpg", "copy3.jpg"]
    differ = dict(audit.pairs.select("path_a", "labels_differ").iter_rows())
    assert differ == {"copy0.jpg": False, "copy1.jpg": True, "copy2.jpg": False, "copy3.jpg": False, "copy4.jpg": False}
    assert audit.unknown_patients == 5
    assert len(check_leakage(cache).leaks) == 0


def test_two_caches_are_compared(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in list(folder.glob("copy*.jpg")):
        path.rename(other / path.name)
    mine, theirs = cached(folder, tmp_path / "a"), cached(other, tmp_path / "b")
    assert overlap(mine, theirs).select("path_a", "path_b", "kind").rows() == [
        ("p0_left.jpg", "copy0.jpg", "same bytes"),
        ("p1_left.jpg", "copy1.jpg", "looks the same"),
        ("p2_left.jpg", "copy2.jpg", "looks the same"),
        ("p3_left.jpg", "copy3.jpg", "mirrored"),
        ("p4_left.jpg", "copy4.jpg", "looks the same"),
    ]


def test_new_photos_are_compared_with_old_ones(folder: Path, tmp_path: Path) -> None:
    aside = tmp_path / "copy2.jpg"
    (folder / "copy2.jpg").rename(aside)
    assert len(cached(folder, tmp_path / "cache").duplicates()) == 4
    aside.rename(folder / "copy2.jpg")
    assert len(cached(folder, tmp_path / "cache").duplicates()) == 5


def test_looks_by_hand() -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8), (0, 0), 4)
    detail = local_contrast(image)
    assert detail.shape == (64, 64)
    assert detail.mean() == pytest.approx(0, abs=1e-5)
    assert detail.std() == pytest.approx(1, abs=1e-5)
    # Brightness and illumination have little influence.
    ramp = np.linspace(0.8, 1, 200)[None, :, None]
    assert np.mean(local_contrast((image * ramp).astype(np.uint8)) * detail) > 0.95
    packed = np.frombuffer(perceptual_hash(image), np.uint8)[None]
    turned = np.frombuffer(perceptual_hash(np.ascontiguousarray(image[:, ::-1])), np.uint8)[None]
    assert np.unpackbits(flipped_hashes(packed) ^ turned).sum() <= 4
    np.testing.assert_array_equal(flipped_hashes(flipped_hashes(packed)), packed)
    assert not local_contrast(np.zeros((200, 200, 3), np.uint8)).any()


def test_near_pairs_equal_all_pairs() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (300, 32), dtype=np.uint8)
    for row in range(100):
        flips = rng.choice(256, int(rng.integers(0, 40)), replace=False)
        bits = np.unpackbits(hashes[row])
        bits[flips] ^= 1
        hashes[200 + row] = np.packbits(bits)
    bits = np.unpackbits(hashes, axis=1).astype(int)
    distance = (bits[:, None] != bits[None]).sum(axis=2)
    every = {tuple(pair) for pair in np.argwhere(distance <= MAX_BITS).tolist()}
    sure = {tuple(pair) for pair in np.argwhere(distance <= 15).tolist()}
    found = {tuple(pair) for pair in near_pairs(hashes, hashes).tolist()}
    assert sure <= found <= every
    assert len(found) >= 0.95 * len(every)


@pytest.mark.slow
def test_near_pairs_of_many_photos_in_bounded_time() -> None:
    """Guard against quadratic search; the time limit itself is not a performance claim."""
    hashes = np.random.default_rng(0).integers(0, 256, (250_000, 32), dtype=np.uint8)
    hashes[-5:] = hashes[:5]
    began = time.perf_counter()
    pairs = near_pairs(hashes, hashes)
    assert len(pairs) == 250_000 + 10
    assert time.perf_counter() - began < 60


@pytest.mark.real_data
def test_real_photos_are_distinguished(real_data: Path, tmp_path: Path) -> None:
    """Re-encoded photos of ODIR are recognised as copies; different eyes are not."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = sorted((real_data / "odir" / "images").glob("*.jpg"))[:300]
    for path in paths:
        shutil.copy(path, folder)
    fit = [path for path in paths if prepare_photo(path, SPEC).status == "ok"][:40]
    for path in fit:
        encoded(cv2.imread(str(path)), folder / f"copy-{path.stem}.jpg")
    pairs = check_leakage(cached(folder, tmp_path / "cache")).pairs
    found = {(a.removeprefix("copy-"), b) for a, b in pairs.select("path_a", "path_b").iter_rows() if "copy" in a}
    found |= {(b.removeprefix("copy-"), a) for a, b in pairs.select("path_a", "path_b").iter_rows() if "copy" in b}
    assert all(a == b for a, b in found)
    # At 128 px, and with highlights clipped by the change in brightness, most but not all copies are recognised.
    assert len(found) >= 36
    assert len(pairs) == len(found)
