"""Power failures, errors of the operating system and changed pixels: a cache is right or refused."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.data.joined_cache import open_caches
from fastfundus.data.journal import locked
from fastfundus.errors import DataError, FastFundusError
from fastfundus.spec import PreprocessSpec
from tests.conftest import copy_photos
from tests.power import ERRORS, Disk, Faults

SPEC = PreprocessSpec(size=48)


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path) -> Path:
    return copy_photos(photo_folder, tmp_path / "photos", 12)


def build(photos: Path, output: Path) -> PhotoCache:
    listing = list_photos(photos)
    return build_cache(listing.photos, output, SPEC, source=listing.root, workers=2)


def same(one: PhotoCache, other: PhotoCache) -> None:
    np.testing.assert_array_equal(one.photos, other.photos)
    assert one.manifest.equals(other.manifest)
    assert list(other.verify()) == []


def test_a_power_failure_at_any_point_costs_only_time(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    with monkeypatch.context() as patch:
        disk.watch(patch)
        whole = build(photos, root / "cache")
        shutil.copy(photos / "p00000_left.jpg", photos / "a_new.jpg")
        grown = build(photos, root / "cache")
    assert len(disk.states) > 10
    for state in range(len(disk.states) - 1, -1, -1):
        copy = tmp_path / f"copy{state}"
        disk.after_power_failure(state, copy)
        if (copy / "cache" / "spec.json").is_file():
            now = PhotoCache.open(copy / "cache")
            assert list(now.verify()) == []
            assert len(now.manifest) in (len(whole.manifest), len(grown.manifest))
        again = build(photos, copy / "cache")
        assert set(again.manifest["path"]) == set(grown.manifest["path"])
        assert list(again.verify()) == []
        shutil.rmtree(copy)


def test_an_error_at_any_call_costs_only_time(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Faults(-1, 0)
    with monkeypatch.context() as patch:
        count.inject(patch)
        whole = build(photos, tmp_path / "whole")
    assert count.calls > 20
    for at in range(count.calls):
        output, faults = tmp_path / f"out{at}", Faults(at, ERRORS[at % len(ERRORS)])
        with monkeypatch.context() as patch:
            faults.inject(patch)
            with suppress(FastFundusError):
                same(whole, build(photos, output))
        same(whole, build(photos, output))
        shutil.rmtree(output)


def test_journaled_photos_without_pixels_are_prepared_again(photos: Path, tmp_path: Path) -> None:
    """A power failure may keep the line of the journal and lose the pixels."""
    whole = build(photos, tmp_path / "whole")

    def stop(status: object, seen: list[object] = []) -> None:  # noqa: B006
        seen.append(status)
        if len(seen) == 8:
            raise KeyboardInterrupt

    listing = list_photos(photos)
    with pytest.raises(KeyboardInterrupt):
        build_cache(listing.photos, tmp_path / "cache", SPEC, source=listing.root, on_photo=stop)
    with (tmp_path / "cache.partial" / "photos.npy").open("rb+") as file:
        file.seek(128 + 5 * 48 * 48 * 3)
        file.write(bytes(48 * 48 * 3))
    same(whole, build(photos, tmp_path / "cache"))


@pytest.mark.parametrize("joined", [False, True])
def test_changed_pixels_are_noticed_when_they_are_first_read(photos: Path, tmp_path: Path, joined: bool) -> None:
    build(photos, tmp_path / "cache")
    with (tmp_path / "cache" / "photos.npy").open("rb+") as file:
        file.seek(128 + 5 * 48 * 48 * 3 + 1000)
        file.write(b"\xff\x00\xff")
    build(photos, tmp_path / "other")
    cache = open_caches(tmp_path / "cache", tmp_path / "other") if joined else PhotoCache.open(tmp_path / "cache")
    assert cache.photos[4].any()
    name = PhotoCache.open(tmp_path / "cache").manifest["path"][5]
    for rows in (5, -7 if not joined else 5, slice(2, 8), np.array([0, 5]), [5, 6]):
        with pytest.raises(DataError, match=f"the pixels of {name} have changed since they were prepared"):
            cache.photos[rows]
    assert cache.photos[np.array([0, 1])].shape == (2, 48, 48, 3)
    assert [fault.split(":")[0] for fault in PhotoCache.open(tmp_path / "cache").verify()] == [name]


def test_a_lock_that_was_deleted_while_waiting_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder deletes the file between opening and locking it here: the lock must be on the new file."""
    path, real, opened = tmp_path / "lock", fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not opened:
            opened.append(descriptor)
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, path, "prepared"):
        with pytest.raises(DataError, match="is being prepared by another process"), locked(tmp_path, path, "prepared"):
            pass
        assert os.path.samestat(path.stat(), path.stat())


def test_only_one_of_many_holds_a_lock(tmp_path: Path) -> None:
    inside, most, counted = 0, [], threading.Lock()

    def work() -> None:
        nonlocal inside
        for _ in range(200):
            with suppress(DataError), locked(tmp_path, tmp_path / "lock", "prepared"):
                with counted:
                    inside += 1
                    most.append(inside)
                with counted:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 100
    assert max(most) == 1


def test_a_cache_may_be_a_link_and_a_torn_note_costs_only_time(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere.partial").mkdir()
    (tmp_path / "elsewhere.partial" / "build.json").touch()
    whole = build(photos, tmp_path / "whole")
    same(whole, build(photos, tmp_path / "cache"))
    assert (tmp_path / "cache").is_symlink()
    (photos / "p00000_left.jpg").write_bytes((photos / "p00001_left.jpg").read_bytes())
    assert len(build(photos, tmp_path / "cache").manifest) == 12
