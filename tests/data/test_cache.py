"""The cache: complete, resumable, brought up to date, refused when it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.data import cache as cache_module
from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.errors import DataError, SpecMismatch
from fastfundus.photo import prepare_photo
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

SPEC = PreprocessSpec(size=48)


def build(folder: Path, output: Path, **options: object) -> PhotoCache:
    listing = list_photos(folder)
    return build_cache(listing.photos, output, SPEC, source=listing.root, **options)  # type: ignore[arg-type]


def watch_preparing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are prepared from now on."""
    prepared: list[str] = []
    original = cache_module.prepare_photo

    def count(path: Path, spec: PreprocessSpec):  # type: ignore[no-untyped-def]
        prepared.append(path.name)
        return original(path, spec)

    monkeypatch.setattr(cache_module, "prepare_photo", count)
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
    assert not cache.photos.flags.writeable


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
    with pytest.raises(DataError, match="interrupted: run the same prepare again"):
        PhotoCache.open(tmp_path / "cache")
    # A kill may leave half a line.
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


def test_new_and_changed_photos_are_prepared_and_the_rest_taken_over(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(broken_photos, tmp_path / "cache")
    (broken_photos / "new.jpg").write_bytes((broken_photos / "good.jpg").read_bytes())
    (broken_photos / "zero.jpg").write_bytes((broken_photos / "good.jpg").read_bytes())
    prepared = watch_preparing(monkeypatch)
    second = build(broken_photos, tmp_path / "cache")
    assert sorted(prepared) == ["new.jpg", "zero.jpg"]
    status = dict(second.manifest.select("path", "status").iter_rows())
    assert (status["new.jpg"], status["zero.jpg"]) == ("ok", "ok")
    place = second.manifest["path"].to_list().index("good.jpg")
    np.testing.assert_array_equal(
        second.photos[place], first.photos[first.manifest["path"].to_list().index("good.jpg")]
    )


def test_label_columns_keep_their_types(photo_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,abnormal,site,mixed\np00000_left.jpg,1,north,3\np00000_right.jpg,,south,x\n")
    listing = list_photos(photo_folder, labels=labels)
    cache = build_cache(listing.photos[:2], tmp_path / "cache", SPEC, source=listing.root)
    assert cache.manifest.select("abnormal", "site", "mixed").rows() == [(1.0, "north", "3"), (None, "south", "x")]
    assert cache.manifest.schema["abnormal"] == pl.Float64


def test_a_label_column_may_not_take_a_manifest_name(photo_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,status\np00000_left.jpg,1\n")
    listing = list_photos(photo_folder, labels=labels)
    with pytest.raises(DataError, match="'status' has a name that the manifest uses"):
        build_cache(listing.photos, tmp_path / "cache", SPEC, source=listing.root)


def test_what_does_not_fit_is_refused(broken_photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    build(broken_photos, output)
    listing = list_photos(broken_photos)
    with pytest.raises(SpecMismatch, match="size 48 / 64"):
        build_cache(listing.photos, output, PreprocessSpec(size=64), source=listing.root)
    with pytest.raises(DataError, match="is no photo cache; choose another"):
        build_cache(listing.photos, broken_photos, SPEC, source=listing.root)
    with pytest.raises(DataError, match="run fastfundus prepare"):
        PhotoCache.open(tmp_path / "nowhere")

    about = json.loads((output / "spec.json").read_text())
    (output / "spec.json").write_text(json.dumps(about | {"schema": 99}))
    with pytest.raises(DataError, match="schema 99"):
        PhotoCache.open(output)
    (output / "spec.json").write_text(json.dumps(about))
    (output / "photos.npy").write_bytes((output / "photos.npy").read_bytes()[:5000])
    with pytest.raises(DataError, match="is damaged"):
        PhotoCache.open(output)
