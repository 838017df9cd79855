"""The preview page: self-contained, doubtful photos first, field circles drawn in the right place."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import cv2
import numpy as np

from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.data.preview import write_preview
from fastfundus.spec import PreprocessSpec


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR) for text in found]


def test_every_status_is_shown_the_odd_ones_first(broken_photos: Path, tmp_path: Path) -> None:
    listing = list_photos(broken_photos)
    cache = build_cache(listing.photos, tmp_path / "cache", PreprocessSpec(size=64), source=listing.root)
    assert write_preview(cache, tmp_path / "preview.html") == 10
    page = (tmp_path / "preview.html").read_text()
    names = re.findall(r"<b>(.+?)</b>", page)
    assert sorted(names) == sorted(cache.manifest["path"])
    assert set(names[-2:]) == {"good.jpg", "deep.png"}
    for status, count in cache.manifest["status"].value_counts().iter_rows():
        assert f"{status} ({count})" in page
    assert "the file is empty; copy it again" in page
    # No external resources, and no partial file left behind.
    assert "http" not in page.replace("http-equiv", "")
    assert not list(tmp_path.glob("*.partial"))


def test_names_are_text_not_markup(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "<script>alert(1)</script>.jpg".replace("/", "_")).write_bytes(b"x")
    listing = list_photos(folder)
    cache = build_cache(listing.photos, tmp_path / "cache", PreprocessSpec(size=64), source=listing.root)
    write_preview(cache, tmp_path / "preview.html")
    assert "<script>alert" not in (tmp_path / "preview.html").read_text()


def test_the_circle_is_drawn_on_the_rim(cache: PhotoCache, tmp_path: Path) -> None:
    write_preview(cache, tmp_path / "preview.html", limit=1)
    shown = pictures((tmp_path / "preview.html").read_text())
    assert len(shown) == 2
    photo, crop = shown
    assert crop.shape == (64, 64, 3)
    blue, green, red = (photo[..., channel].astype(int) for channel in range(3))
    rows, columns = np.nonzero((green > red + 60) & (green > blue + 60))
    assert len(rows) > 100
    distance = np.hypot(rows + 0.5 - rows.mean(), columns + 0.5 - columns.mean())
    assert distance.std() < 0.06 * distance.mean()


def test_many_photos_are_a_choice(cache: PhotoCache, tmp_path: Path) -> None:
    assert write_preview(cache, tmp_path / "preview.html", limit=12) == 12
    page = (tmp_path / "preview.html").read_text()
    assert "12 of them are shown" in page
    assert len(re.findall("<figure", page)) == 12
    again = tmp_path / "again.html"
    write_preview(cache, again, limit=12)
    assert again.read_text() == page
