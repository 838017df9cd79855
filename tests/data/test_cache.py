"""The photo cache: completeness, resume, updates, and refusal of caches that do not match."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.data import build as build_module
from fastfundus.data import rows as rows_module
from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.data.store import PhotoStore, open_photos
from fastfundus.errors import ConfigError, DataError, SpecMismatch
from fastfundus.photo import prepare_photo
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from tests.photo.test_dicom import dicom

SPEC = PreprocessSpec(size=48)


def build(folder: Path, output: Path, **options: object) -> PhotoCache:
    listing = list_photos(folder)
    return build_cache(listing.photos, output, SPEC, source=listing.root, **options)  # type: ignore[arg-type]


def watch_preparing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the names of the files prepared from now on."""
    prepared: list[str] = []
    original = rows_module._prepare_file

    def count(path: Path, spec: PreprocessSpec):  # type: ignore[no-untyped-def]
        prepared.append(path.name)
        return original(path, spec)

    monkeypatch.setattr(rows_module, "_prepare_file", count)
    return prepared


def test_a_row_for_every_input_and_its_pixels(broken_photos: Path, tmp_path: Path) -> None:
    cache = build(broken_photos, tmp_path / "cache")
    assert len(cache.manifest) == 10
    assert list(cache.manifest.columns)[: len(MANIFEST_COLUMNS)] == list(MANIFEST_COLUMNS)
    statuses = dict(cache.manifest.select("path", "status").iter_rows())
    assert statuses == {
        "black.png": "ungradable",
        "cmyk.jpg": "unsupported",
        "deep.png": "ok",
        "good.jpg": "ok",
        "grey.png": "unsupported",
        "grey_as_rgb.png": "unsupported",
        "one_pixel.png": "unsupported",
        "text.jpg": "unreadable",
        "truncated.jpg": "unreadable",
        "zero.jpg": "unreadable",
    }
    for index, row in enumerate(cache.manifest.iter_rows(named=True)):
        alone = prepare_photo(broken_photos / row["path"], SPEC)
        assert row["sha256"] == alone.sha256
        if alone.image is None:
            assert not cache.photos[index].any()
            assert row["reason"]
        else:
            np.testing.assert_array_equal(cache.photos[index], alone.image)
    assert not cache.photos[:2].flags.writeable


def test_thread_count_changes_nothing(photo_folder: Path, tmp_path: Path) -> None:
    one, four = (build(photo_folder, tmp_path / str(n), workers=n) for n in (1, 4))
    np.testing.assert_array_equal(one.photos, four.photos)
    assert one.manifest.equals(four.manifest)


def test_an_interrupted_build_goes_on(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(photo_folder, tmp_path / "whole")
    seen: list[Status] = []

    def interrupt(status: Status) -> None:
        seen.append(status)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(photo_folder, tmp_path / "cache", on_photo=interrupt)
    with pytest.raises(DataError, match="interrupted: run the same prepare command again"):
        PhotoCache.open(tmp_path / "cache")
    # A crash may leave an incomplete line.
    journal = tmp_path / "cache.partial" / "rows.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 10
    journal.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])

    prepared = watch_preparing(monkeypatch)
    resumed = build(photo_folder, tmp_path / "cache")
    assert len(prepared) == len(whole.manifest) - 9
    np.testing.assert_array_equal(resumed.photos, whole.photos)
    assert resumed.manifest.equals(whole.manifest)
    assert not (tmp_path / "cache.partial").exists()


def test_new_photos_are_added_behind_the_others(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cache"
    first = build(broken_photos, output)
    place = os.stat(output / "photos.npy").st_ino
    good = (broken_photos / "good.jpg").read_bytes()
    (broken_photos / "a_new.jpg").write_bytes(good)
    # This photo was unusable before, so its pixels may be written in place: no reader uses them.
    (broken_photos / "zero.jpg").write_bytes(good)
    prepared = watch_preparing(monkeypatch)
    second = build(broken_photos, output)
    assert sorted(prepared) == ["a_new.jpg", "zero.jpg"]
    names = [*first.manifest["path"].to_list(), "a_new.jpg"]
    assert second.manifest["path"].to_list() == names
    assert os.stat(output / "photos.npy").st_ino == place
    status = dict(second.manifest.select("path", "status").iter_rows())
    assert (status["a_new.jpg"], status["zero.jpg"], status["text.jpg"]) == ("ok", "ok", "unreadable")
    row = names.index("good.jpg")
    for name in ("a_new.jpg", "zero.jpg", "good.jpg"):
        np.testing.assert_array_equal(second.photos[names.index(name)], first.photos[row])
    assert list(second.verify(sources=True)) == []
    assert not (tmp_path / "cache.partial").exists()


def test_readers_see_the_old_cache_until_an_update_is_complete(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cache"
    first = build(broken_photos, output)
    before = np.array(first.photos)
    for number in range(4):
        (broken_photos / f"new{number}.jpg").write_bytes((broken_photos / "good.jpg").read_bytes())

    def interrupt(status: Status) -> None:
        seen.append(status)
        if len(seen) == 12:
            raise KeyboardInterrupt

    seen: list[Status] = []
    with pytest.raises(KeyboardInterrupt):
        build(broken_photos, output, on_photo=interrupt)
    still = PhotoCache.open(output)
    assert still.manifest.equals(first.manifest)
    np.testing.assert_array_equal(still.photos, before)
    # Abandon that update and add another photo instead: no trace of the first attempt may remain.
    for number in range(4):
        (broken_photos / f"new{number}.jpg").unlink()
    (broken_photos / "other.jpg").write_bytes(b"")
    second = build(broken_photos, output)
    assert second.manifest["path"].to_list()[-1] == "other.jpg"
    assert not second.photos[len(first.manifest)].any()
    # A resumed build prepares only the remaining photos.
    for number in range(4):
        (broken_photos / f"new{number}.jpg").write_bytes((broken_photos / "good.jpg").read_bytes())
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        build(broken_photos, output, on_photo=interrupt)
    prepared = watch_preparing(monkeypatch)
    third = build(broken_photos, output)
    assert len(third.manifest) == len(second.manifest) + 4
    assert 0 < len([name for name in prepared if name.startswith("new")]) < 4
    assert list(third.verify()) == []


def test_changed_or_removed_photos_cause_a_rebuild(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder / "images", folder)
    first = build(folder, tmp_path / "cache")
    names = first.manifest["path"].to_list()
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes((folder / names[2]).read_bytes())
    prepared = watch_preparing(monkeypatch)
    second = build(folder, tmp_path / "cache")
    assert prepared == [names[1]]
    assert second.manifest["path"].to_list() == names[1:]
    np.testing.assert_array_equal(second.photos[0], first.photos[2])
    np.testing.assert_array_equal(second.photos[2:], np.array(first.photos)[3:])
    assert list(second.verify(sources=True)) == []


def test_a_killed_build_goes_on(photo_folder: Path, tmp_path: Path) -> None:
    """Kill the build with SIGKILL at three moments and rerun it: the result equals that of an uninterrupted build."""
    whole = build(photo_folder, tmp_path / "whole")
    output = tmp_path / "cache"
    command = [sys.executable, "-m", "fastfundus", "prepare", str(photo_folder), "--output", str(output)]
    command += ["--size", "48", "--workers", "1"]
    for least in (5, 15, 30):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = tmp_path / "cache.partial" / "rows.jsonl"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") >= least:
                break
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (output / "spec.json").exists(), "the build finished before it was killed: use more photos"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    cache = PhotoCache.open(output)
    np.testing.assert_array_equal(cache.photos, whole.photos)
    assert cache.manifest.equals(whole.manifest)


def test_a_second_build_of_the_same_cache_waits_outside(photo_folder: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(status: Status) -> None:
        if not refused:
            # flock locks belong to the open file, so a second build in the same process is locked out too.
            with pytest.raises(DataError, match="is being prepared by another process") as caught:
                build(photo_folder, tmp_path / "cache")
            refused.append(str(caught.value))

    build(photo_folder, tmp_path / "cache", on_photo=second)
    assert refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize(
    "moment", ["before the old one is moved", "between the moves", "before the old one is deleted"]
)
def test_a_kill_while_a_new_cache_takes_the_place_of_the_old(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder / "images", folder)
    output = tmp_path / "cache"
    build(folder, output)
    sorted(folder.iterdir())[0].unlink()
    renames = {"before the old one is moved": 0, "between the moves": 1, "before the old one is deleted": 2}[moment]
    real, seen = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(seen) == renames:
            raise KeyboardInterrupt
        seen.append(self)
        return real(self, target)

    def rmtree(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if renames == 2:
            patch.setattr(build_module.shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            build(folder, output)
    prepared = watch_preparing(monkeypatch)
    cache = build(folder, output)
    assert prepared == []
    assert len(cache.manifest) == 47
    assert list(cache.verify(sources=True)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "photos"]


def test_a_full_disk_is_reported_and_the_cache_stays_valid(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a full disk by a file size limit: the kernel refuses the write in both cases."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photos = sorted((photo_folder / "images").glob("*.jpg"))
    for path in photos[:10]:
        shutil.copy2(path, folder)
    output = tmp_path / "cache"
    first = build(folder, output)
    for path in photos[10:]:
        shutil.copy2(path, folder)
    code = f"""
import resource
from pathlib import Path
from fastfundus.data import build_cache, list_photos
from fastfundus.errors import DataError
from fastfundus.spec import PreprocessSpec
resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 48 * 48 * 3, resource.RLIM_INFINITY))
listing = list_photos(Path({str(folder)!r}))
try:
    build_cache(listing.photos, Path({str(output)!r}), PreprocessSpec(size=48), source=listing.root, workers=1)
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "free up space and run the same command again: finished photos are kept" in done.stdout, done.stderr
    still = PhotoCache.open(output)
    assert still.manifest.equals(first.manifest)
    assert list(still.verify()) == []
    prepared = watch_preparing(monkeypatch)
    cache = build(folder, output)
    # There was room for nineteen photos, including the ten of the first build.
    assert len(prepared) == len(photos) - 19
    assert list(cache.verify()) == []


def test_a_disk_that_is_too_small_is_reported_before_the_work(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match=r"needs up to 0.0 GB, but only 0.0 GB are free; free up space"):
        build(photo_folder, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_photos_go_on_in_further_files(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(photo_folder, tmp_path / "whole")
    monkeypatch.setattr("fastfundus.data.cache.SHARD_BYTES", 7 * 48 * 48 * 3)
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder / "images", folder)
    for path in sorted(folder.iterdir())[30:]:
        path.rename(tmp_path / path.name)
    build(folder, tmp_path / "cache")
    for path in tmp_path.glob("*.jpg"):
        path.rename(folder / path.name)
    cache = build(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("photos*.npy"))) == 7
    assert cache.photos.shape == whole.photos.shape
    np.testing.assert_array_equal(cache.photos[:], whole.photos)
    rows = np.array([0, 47, 7, 6, 8])
    np.testing.assert_array_equal(cache.photos[rows], whole.photos[rows])
    np.testing.assert_array_equal(cache.photos[-1], whole.photos[-1])
    with pytest.raises(IndexError):
        cache.photos[48]


def test_store_files_are_numpy_files(tmp_path: Path) -> None:
    store = PhotoStore(tmp_path, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for row in (4, 0, 2):
        store.write(row, images[row])
    store.finish(5)
    first, second = np.load(tmp_path / "photos.npy"), np.load(tmp_path / "photos-00001.npy")
    np.testing.assert_array_equal(first, [images[0], np.zeros_like(images[1]), images[2]])
    np.testing.assert_array_equal(second[1], images[4])
    store.cut(2)
    store.close()
    assert not (tmp_path / "photos-00001.npy").exists()
    with pytest.raises(ValueError, match="mmap length is greater"):
        open_photos(tmp_path, 2, 32, 3)


def test_damage_is_found(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder / "images", folder)
    cache = build(folder, tmp_path / "cache")
    assert list(cache.verify(sources=True)) == []
    names = cache.manifest["path"].to_list()
    with (tmp_path / "cache" / "photos.npy").open("r+b") as file:
        file.seek(128 + 5 * 48 * 48 * 3 + 3000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    (folder / names[7]).write_bytes(b"changed")
    (folder / names[8]).unlink()
    found = list(PhotoCache.open(tmp_path / "cache").verify(sources=True))
    assert [line.split(":")[0] for line in found] == [names[5], names[7], names[8]]
    assert "pixels in the cache have changed" in found[0]
    assert "has changed since it was prepared" in found[1]
    assert "file not found" in found[2]


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"schema": 3}', "[" * 100_000])
def test_a_damaged_description_is_an_error_in_words(photo_folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "spec.json").write_text(text)
    with pytest.raises(DataError, match=r"is damaged \(spec.json: .*\); delete it and prepare it again"):
        PhotoCache.open(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "value"),
    [("spec", None), ("spec", {"size": "64"}), ("spec", {"size": 64.0}), ("spec", {"std": [1, 1, float("nan")]}),
     ("spec", {"sise": 64}), ("photos_per_file", "2"), ("photos_per_file", 0), ("photos_per_file", True),
     ("source", 3), ("salted", 7), ("origins", 3), ("notes", 3), ("schema", 2), ("schema", None)],
)  # fmt: skip
def test_wrong_values_of_a_description_are_errors_in_words(
    photo_folder: Path, tmp_path: Path, name: str, value: object
) -> None:
    cache = build(photo_folder, tmp_path / "cache").path
    stored = json.loads((cache / "spec.json").read_text())
    (cache / "spec.json").write_text(json.dumps(stored | {name: value}))
    with pytest.raises(DataError, match=name if name != "spec" else "spec") as raised:
        PhotoCache.open(cache)
    assert str(cache) in str(raised.value)
    del stored[name]
    if name not in ("origins", "notes"):
        (cache / "spec.json").write_text(json.dumps(stored))
        with pytest.raises(DataError, match=name):
            PhotoCache.open(cache)


def test_a_mount_point_is_refused_before_anything_is_prepared(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cache"
    output.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == output)
    with pytest.raises(ConfigError, match=r"is a mount point.*give a folder in it"):
        build(photo_folder, output)
    assert not any(output.iterdir())
    assert not (tmp_path / "cache.partial").exists()


def test_patients_are_hashed_with_a_salt(photo_folder: Path, tmp_path: Path) -> None:
    listing = list_photos(photo_folder)
    output = tmp_path / "cache"
    options: dict[str, Any] = {"source": listing.root, "patient_salt": b"secret"}
    cache = build_cache(listing.photos[:4], output, SPEC, **options)
    hashed = cache.manifest["patient"].to_list()
    assert all(re.fullmatch("[0-9a-f]{16}", patient) for patient in hashed)
    assert hashed[0] == hashed[1] != hashed[2] == hashed[3]
    # Hashes are unchanged for reused photos and differ with another salt.
    assert build_cache(listing.photos[:6], output, SPEC, **options).manifest["patient"].to_list()[:4] == hashed
    with pytest.raises(DataError, match="a different patient salt"):
        build_cache(listing.photos, output, SPEC, source=listing.root)
    other = build_cache(listing.photos[:4], tmp_path / "b", SPEC, source=listing.root, patient_salt=b"else")
    assert set(other.manifest["patient"]) & set(hashed) == set()
    assert b"secret" not in (output / "spec.json").read_bytes()


def test_dicom_says_whose_photo_it_is(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    folder.mkdir()
    rgb = np.array(Image.open(sorted((photo_folder / "images").glob("*.jpg"))[0]))
    for number in range(2):
        elements = {"Rows": rgb.shape[0], "Columns": rgb.shape[1], "ImageLaterality": "LR"[number]}
        (folder / f"{number}.dcm").write_bytes(dicom(rgb.tobytes(), **elements))
    cache = build(folder, tmp_path / "cache")
    columns = ["patient", "patient_known", "eye", "camera", "pixel_spacing_mm"]
    assert cache.manifest.select(columns).rows() == [
        ("P-007", True, "L", "Maker Model 1", 0.01),
        ("P-007", True, "R", "Maker Model 1", 0.01),
    ]
    labels = tmp_path / "labels.csv"
    labels.write_text("file,patient\n0.dcm,p1\n1.dcm,\n")
    listing = list_photos(folder, labels=labels)
    again = build_cache(listing.photos, tmp_path / "cache", SPEC, source=listing.root)
    assert again.manifest["patient"].to_list() == ["p1", "P-007"]


def test_a_slow_disk_holds_up_one_photo_not_all(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow reads, as on a network drive, run concurrently; otherwise the barrier would time out."""
    barrier = threading.Barrier(3, timeout=30)
    original = rows_module.read_patiently

    def slow(path: Path, **options: bool) -> bytes:
        if path.name in ("p00000_left.jpg", "p00000_right.jpg", "p00001_left.jpg"):
            barrier.wait()
        return original(path, **options)

    monkeypatch.setattr(rows_module, "read_patiently", slow)
    cache = build(photo_folder, tmp_path / "cache", workers=3)
    assert (cache.manifest["status"] == "ok").all()


def test_names_that_are_not_utf8_and_links_in_a_circle(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    good = sorted((photo_folder / "images").glob("*.jpg"))[0]
    odd = os.path.join(os.fsencode(folder), b"caf\xe9.jpg")
    with open(odd, "wb") as file:
        file.write(good.read_bytes())
    (folder / "round.jpg").symlink_to(folder / "round.jpg")
    (folder / "loop").symlink_to(folder)
    cache = build(folder, tmp_path / "cache")
    rows = cache.manifest.select("path", "status", "reason").rows()
    assert rows[0] == ("caf\\xe9.jpg", "ok", "")
    assert rows[1][:2] == ("round.jpg", "unreadable")
    assert len(rows) == 2


def test_label_columns_keep_their_types(photo_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,abnormal,site,mixed\np00000_left.jpg,1,north,3\np00000_right.jpg,,south,x\n")
    listing = list_photos(photo_folder, labels=labels)
    cache = build_cache(listing.photos[:2], tmp_path / "cache", SPEC, source=listing.root)
    assert cache.manifest.select("abnormal", "site", "mixed").rows() == [(1.0, "north", "3"), (None, "south", "x")]
    assert cache.manifest.schema["abnormal"] == pl.Float64


def test_label_columns_that_clash_with_the_manifest_are_renamed(photo_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,status,path\np00000_left.jpg,1,elsewhere\n")
    listing = list_photos(photo_folder, labels=labels)
    assert sum("is stored as 'label_" in note for note in listing.notes) == 2
    cache = build_cache(listing.photos[:1], tmp_path / "cache", SPEC, source=listing.root)
    assert cache.manifest.select("status", "label_status", "label_path").rows() == [("ok", 1.0, "elsewhere")]
    # A clash in a listing built by other means is an error.
    own = [replace(listing.photos[0], columns={"status": 1.0})]
    with pytest.raises(DataError, match="'status' clashes with a manifest column"):
        build_cache(own, tmp_path / "own", SPEC, source=listing.root)


def test_what_does_not_fit_is_refused(broken_photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    build(broken_photos, output)
    listing = list_photos(broken_photos)
    with pytest.raises(SpecMismatch, match="size 48 / 64"):
        build_cache(listing.photos, output, PreprocessSpec(size=64), source=listing.root)
    with pytest.raises(DataError, match="is not a photo cache; choose another"):
        build_cache(listing.photos, broken_photos, SPEC, source=listing.root)
    with pytest.raises(DataError, match="does not exist; write one with fastfundus prepare"):
        PhotoCache.open(tmp_path / "nowhere")

    metadata = json.loads((output / "spec.json").read_text())
    (output / "spec.json").write_text(json.dumps(metadata | {"schema": 99}))
    with pytest.raises(DataError, match="schema 99"):
        PhotoCache.open(output)
    (output / "spec.json").write_text(json.dumps(metadata))
    (output / "photos.npy").write_bytes((output / "photos.npy").read_bytes()[:5000])
    with pytest.raises(DataError, match="is damaged"):
        PhotoCache.open(output)


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in ("path", "status", "patient", "sha256", "pixels_crc32")
     for change in ("drop", "list", "text")] + [(name, "null") for name in ("path", "status", "patient")],
)  # fmt: skip
def test_a_damaged_manifest_is_an_error_in_words(photo_folder: Path, tmp_path: Path, name: str, change: str) -> None:
    cache = build(photo_folder, tmp_path / "cache").path
    file = cache / "manifest.parquet"
    table = pl.read_parquet(file)
    if change == "drop":
        table = table.drop(name)
    elif change == "null":
        table = table.with_columns(pl.lit(None, pl.String).alias(name))
    else:
        table = table.with_columns(pl.lit([1]).alias(name) if change == "list" else pl.lit(2.5).alias(name))
    table.write_parquet(file)
    with pytest.raises(DataError, match=rf"is damaged \(manifest.parquet: its column '{name}' is .*\); delete it"):
        PhotoCache.open(cache)


def test_other_damaged_files_of_a_cache_are_errors_in_words(photo_folder: Path, tmp_path: Path) -> None:
    cache = build(photo_folder, tmp_path / "cache").path
    for junk in (b"", b"junk"):
        (cache / "duplicates.parquet").write_bytes(junk)
        with pytest.raises(DataError, match="is damaged"):
            PhotoCache.open(cache).duplicates()
    pl.DataFrame({"row_a": [1]}).write_parquet(cache / "duplicates.parquet")
    with pytest.raises(DataError, match=r"duplicates.parquet: has other columns"):
        PhotoCache.open(cache).duplicates()
    photos = (cache / "photos.npy").read_bytes()
    for shape in (b"(-1,", b"(99999999999999999999999,"):
        (cache / "photos.npy").write_bytes(
            photos.replace(b"(" + str(len(PhotoCache.open(cache).photos)).encode(), shape[:-1], 1)
        )
        with pytest.raises(DataError, match="is damaged"):
            PhotoCache.open(cache)
        (cache / "photos.npy").write_bytes(photos)
    for name in ("manifest.parquet", "photos.npy"):
        (cache / name).rename(cache / "kept")
        os.mkfifo(cache / name)
        with pytest.raises(DataError, match="is damaged"):
            PhotoCache.open(cache)
        (cache / name).unlink()
        (cache / "kept").rename(cache / name)
    PhotoCache.open(cache)
