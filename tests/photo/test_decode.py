"""Headers and pixels: every format and orientation against Pillow, every broken file with its status."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from fastfundus.errors import PhotoError
from fastfundus.photo.decode import decode, read_header
from fastfundus.records import Status
from fastfundus.synthetic import draw_photo


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return draw_photo(3, lesions=("exudates",), long_side=400).image[20:380]


def encoded(rgb: np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return file.getvalue()


def test_png_and_tiff_are_exact(rgb: np.ndarray) -> None:
    for form, options in [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]:
        data = encoded(rgb, form, **options)
        got, scale = decode(data, read_header(data), least_side=32)
        assert scale == 1
        np.testing.assert_array_equal(got, rgb)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=["420", "progressive", "444"])
def test_jpeg_equals_pillow(rgb: np.ndarray, options: dict[str, object]) -> None:
    data = encoded(rgb, "JPEG", quality=90, **options)
    got, scale = decode(data, read_header(data))
    assert scale == 1
    expected = np.array(Image.open(io.BytesIO(data)))
    # Both are libjpeg-turbo; their builds may round the inverse DCT differently by one.
    assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("least", "width"), [(0, 400), (360, 400), (200, 250), (180, 200), (91, 150), (45, 50)])
def test_scaled_jpeg_never_falls_below_the_target(rgb: np.ndarray, least: int, width: int) -> None:
    data = encoded(rgb, "JPEG", quality=90)
    got, scale = decode(data, read_header(data), least)
    assert min(got.shape[:2]) >= least
    assert got.shape[1] <= width
    assert scale == pytest.approx(got.shape[1] / 400)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_orientation_equals_pillow(rgb: np.ndarray, orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(rgb, form, exif=exif)
    header = read_header(data)
    got, _ = decode(data, header)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert got.shape[1::-1] == header.upright_size
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_sixteen_bits_map_full_scale_to_full_scale(rgb: np.ndarray) -> None:
    deep = rgb.astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    got, _ = decode(data, read_header(data))
    np.testing.assert_array_equal(got, rgb)


def test_transparent_pixels_are_black(rgb: np.ndarray) -> None:
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:50] = 0
    data = encoded(np.dstack([rgb, alpha]), "PNG")
    got, _ = decode(data, read_header(data))
    assert not got[:50].any()
    np.testing.assert_array_equal(got[50:], rgb[50:])


def test_pillow_reads_what_libjpeg_turbo_warns_about(rgb: np.ndarray) -> None:
    data = encoded(rgb, "JPEG", quality=90)
    # Stray bytes between two markers: strict decoders refuse, the picture is whole.
    at = data.index(b"\xff\xda")
    odd = data[:at] + b"\x00\x00" + data[at:]
    got, _ = decode(odd, read_header(odd))
    np.testing.assert_allclose(got.astype(int), np.array(Image.open(io.BytesIO(data))).astype(int), atol=1)


BROKEN = {
    "zero.jpg": (Status.UNREADABLE, "empty"),
    "text.jpg": (Status.UNREADABLE, "not a picture"),
    "truncated.jpg": (Status.UNREADABLE, "damaged or incomplete"),
    "one_pixel.png": (Status.UNSUPPORTED, "1x1 pixels"),
    "cmyk.jpg": (Status.UNSUPPORTED, "CMYK"),
    "grey.png": (Status.UNSUPPORTED, "grey"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_why(broken_photos: Path, name: str) -> None:
    status, reason = BROKEN[name]
    data = (broken_photos / name).read_bytes()
    with pytest.raises(PhotoError, match=reason) as caught:
        decode(data, read_header(data))
    assert caught.value.status is status


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.995])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_a_cut_file_is_never_half_a_retina(rgb: np.ndarray, form: str, share: float) -> None:
    data = encoded(rgb, form)
    data = data[: int(len(data) * share)]
    with pytest.raises(PhotoError) as caught:
        decode(data, read_header(data))
    assert caught.value.status is Status.UNREADABLE


def test_other_formats_are_named(rgb: np.ndarray) -> None:
    with pytest.raises(PhotoError, match="BMP files are not read") as caught:
        read_header(encoded(rgb, "BMP"))
    assert caught.value.status is Status.UNSUPPORTED


def test_a_bomb_is_refused_by_its_header() -> None:
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "PNG")
    with pytest.raises(PhotoError) as caught:
        read_header(file.getvalue())
    assert caught.value.status is Status.UNSUPPORTED
