"""Pictures as cameras, phones, converters and broken copies leave them: scored with their own pixels, or not at all."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastfundus.data.files import is_photo
from fastfundus.errors import PhotoError
from fastfundus.photo.field import count_fields, without_margin
from fastfundus.photo.header import read_header
from fastfundus.photo.jpeg import has_all_scans
from fastfundus.photo.lzw import lzw_length
from fastfundus.photo.prepare import PreparedPhoto, decode_at, prepare_bytes
from fastfundus.photo.resample import shrink
from fastfundus.photo.tiff import check_tiff, read_pages
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo

SPEC = PreprocessSpec(size=96)
DATA = Path(os.environ.get("FASTFUNDUS_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return draw_photo(3, lesions=("exudates",), long_side=500).image


@pytest.fixture(scope="module")
def expected(rgb: np.ndarray) -> np.ndarray:
    image = prepare_bytes(encoded(rgb, "PNG"), SPEC).image
    assert image is not None
    return image


def encoded(image: np.ndarray | Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def check_same(result: PreparedPhoto, expected: np.ndarray, tolerance: int = 0) -> None:
    assert result.status is Status.OK, result.reason
    assert result.image is not None
    assert int(np.abs(result.image.astype(int) - expected).max()) <= tolerance


def check_refused(result: PreparedPhoto, status: Status, words: str) -> None:
    assert result.status is status
    assert re.search(words, result.reason)
    assert result.image is None


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "WEBP"])
def test_alpha_of_zeros_is_padding(rgb: np.ndarray, expected: np.ndarray, form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    padded = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    check_same(prepare_bytes(encoded(padded, form, **options), SPEC), expected)


def test_a_fourth_tiff_channel_of_no_stated_meaning_is_not_transparency(rgb: np.ndarray, expected: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    infrared = np.dstack([rgb, np.full(rgb.shape[:2], 100, np.uint8)])
    tifffile.imwrite(file, infrared, photometric="rgb", extrasamples=["unspecified"])
    check_same(prepare_bytes(file.getvalue(), SPEC), expected)


def strips(data: bytes) -> list[tuple[int, int]]:
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        return list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.parametrize("damage", ["flipped", "zeroed"])
def test_a_damaged_strip_is_never_scored(rgb: np.ndarray, compression: str, damage: str) -> None:
    options = {} if compression == "jpeg" else {"strip_size": 20_000}
    data = bytearray(encoded(rgb, "TIFF", compression=compression, **options))
    offset, count = strips(bytes(data))[2]
    assert prepare_bytes(bytes(data), SPEC).status is Status.OK
    third = offset + count // 3
    data[third : offset + count] = (
        bytes(byte ^ 0x5A for byte in data[third : offset + count])
        if damage == "flipped"
        else bytes(offset + count - third)
    )
    check_refused(prepare_bytes(bytes(data), SPEC), Status.UNREADABLE, "damaged or incomplete")


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_adobe_deflate"])
def test_strips_that_lack_rows_are_never_scored(rgb: np.ndarray, compression: str) -> None:
    """Directories say how many strips there are, how large they are, and how many rows each has."""
    data = encoded(rgb, "TIFF", compression=compression, strip_size=20_000)
    page = read_pages(data)[0]
    check_tiff(data, page)
    for broken in (
        replace(page, offsets=page.offsets[:-2], counts=page.counts[:-2]),
        replace(page, counts=(*page.counts[:-1], 0)),
        replace(page, part_height=page.part_height + 3, height=page.height + 3 * len(page.offsets)),
    ):
        with pytest.raises(PhotoError, match="incomplete"):
            check_tiff(data, broken)


@pytest.mark.parametrize("kind", ["photo", "black", "noise", "one strip"])
def test_the_length_of_lzw_data_is_that_of_libtiff(rgb: np.ndarray, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3)).astype(np.uint8)
    image = {"black": np.zeros((900, 700, 3), np.uint8), "noise": noise}.get(kind, rgb)
    options = {"strip_size": image.nbytes} if kind == "one strip" else {}
    data = encoded(image, "TIFF", compression="tiff_lzw", **options)
    page = read_pages(data)[0]
    found = 0
    for offset, count in zip(page.offsets, page.counts, strict=True):
        strip = data[offset : offset + count]
        length, ended = lzw_length(strip) or (0, False)
        found += length
        assert ended
        assert lzw_length(bytes(int(f"{byte:08b}"[::-1], 2) for byte in strip), reversed_bits=True) == (length, True)
    assert found == image.nbytes


def test_damage_of_lzw_that_decoders_pass_over_is_noticed(rgb: np.ndarray) -> None:
    """libtiff stops as soon as a strip is full: of single damaged bytes, half were scored."""
    data = encoded(rgb, "TIFF", compression="tiff_lzw", strip_size=20_000)
    page = read_pages(data)[0]
    generator = np.random.default_rng(0)
    damaged = scored = 0
    for _ in range(60):
        part = int(generator.integers(len(page.offsets)))
        at = page.offsets[part] + int(generator.integers(page.counts[part]))
        broken = data[:at] + bytes([data[at] ^ int(generator.integers(1, 256))]) + data[at + 1 :]
        result = prepare_bytes(broken, replace(SPEC, size=500))
        changed = result.status is Status.OK and not np.array_equal(decode_at(broken, 0), rgb)
        damaged, scored = damaged + 1, scored + changed
    # What remains has the same length: a code was replaced by another that stands for as many bytes, which nothing in
    # the file tells.
    assert scored <= 0.35 * damaged


def test_a_padded_last_strip_and_a_missing_end_mark_are_no_damage(rgb: np.ndarray) -> None:
    data = encoded(rgb[:494], "TIFF", compression="tiff_lzw", strip_size=20_000)
    page = read_pages(data)[0]
    assert page.height % page.part_height == 0
    check_tiff(data, replace(page, height=page.height - 5))
    check_tiff(data, replace(page, counts=tuple(count - 1 for count in page.counts)))
    with pytest.raises(PhotoError, match="damaged or incomplete"):
        check_tiff(data, replace(page, width=page.width - 1, part_width=page.width - 1))


def xmp(orientation: int, element: bool = False) -> bytes:
    said = f">{ELEMENT.format(orientation)}" if element else f' tiff:Orientation="{orientation}">'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{said}</rdf:Description></rdf:RDF>'
        "</x:xmpmeta>"
    ).encode()


ELEMENT = "<tiff:Orientation>{}</tiff:Orientation>"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("element", [False, True])
def test_orientation_that_only_xmp_has(rgb: np.ndarray, form: str, element: bool) -> None:
    packet = xmp(6, element)
    if form == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        data = encoded(rgb, "PNG", pnginfo=info)
    elif form == "TIFF":
        data = encoded(rgb, "TIFF", tiffinfo={700: packet})
    else:
        data = encoded(rgb, form, xmp=packet, **({"quality": 92} if form == "JPEG" else {"lossless": True}))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    tolerance = 1 if form == "JPEG" else 0  # Pillow's libjpeg may round its inverse DCT otherwise
    assert np.abs(decode_at(data, 0).astype(int) - expected).max() <= tolerance
    assert expected.shape[:2] == rgb.shape[1::-1]


def test_exif_is_believed_over_xmp(rgb: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(rgb, "JPEG", exif=exif, xmp=xmp(6), quality=92)
    assert read_header(data).orientation == 3


def test_a_second_photo_in_the_same_file_is_not_passed_over(rgb: np.ndarray) -> None:
    first, other = encoded(rgb, "JPEG", quality=92), encoded(rgb[::-1].copy(), "JPEG", quality=80)
    stereo = encoded(rgb, "MPO", save_all=True, append_images=[Image.fromarray(rgb[:, ::-1].copy())])
    for data in (first + other, first + b"\0" * 100 + other, stereo):
        check_refused(prepare_bytes(data, SPEC), Status.UNSUPPORTED, "several images in one file")


def test_previews_and_gain_maps_are_no_second_photo(rgb: np.ndarray) -> None:
    first = encoded(rgb, "JPEG", quality=92)
    alone = prepare_bytes(first, SPEC).image
    assert alone is not None
    preview = encoded(cv2.resize(rgb, (250, 250)), "JPEG")
    grey = encoded(Image.fromarray(rgb).convert("L"), "JPEG")
    gain_map = encoded(rgb, "JPEG", xmp=b'<rdf:Description xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"/>')
    for name, second in (("preview", preview), ("depth map", grey), ("gain map", gain_map), ("film", b"ftypmp42" * 99)):
        result = prepare_bytes(first + second, SPEC)
        assert result.status is Status.OK, name
        np.testing.assert_array_equal(result.image, alone, err_msg=name)


def test_a_png_that_was_closed_early_is_never_scored(rgb: np.ndarray) -> None:
    framed = cv2.copyMakeBorder(rgb, 8, 8, 8, 8, cv2.BORDER_CONSTANT)
    side = len(framed)
    rows = b"".join(b"\0" + row.tobytes() for row in framed)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))

    def png(data: bytes) -> bytes:
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")

    assert prepare_bytes(png(rows), SPEC).status is Status.OK
    for share in (0.99, 0.9, 0.7):
        result = prepare_bytes(png(rows[: int(share * side) * (1 + 3 * side)]), SPEC)
        check_refused(result, Status.UNREADABLE, "rows are missing")


def test_pages_of_almost_one_size_are_several_photos(rgb: np.ndarray) -> None:
    other = Image.fromarray(rgb).resize((490, 490))
    data = encoded(rgb, "TIFF", save_all=True, append_images=[other])
    check_refused(prepare_bytes(data, SPEC), Status.UNSUPPORTED, "2 images in one file")


def test_a_photo_below_a_thumbnail_is_refused(rgb: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(cv2.resize(rgb, (100, 100)), photometric="rgb", subifds=1)
        writer.write(rgb, photometric="rgb")
    check_refused(prepare_bytes(file.getvalue(), SPEC), Status.UNSUPPORTED, "below a thumbnail")


def test_sixteen_bits_in_planes_are_refused(rgb: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).astype(np.uint16) * 257
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate")
    check_refused(prepare_bytes(file.getvalue(), SPEC), Status.UNSUPPORTED, "separate planes")


def test_a_thumbnail_before_the_photo_is_passed_over(rgb: np.ndarray, expected: np.ndarray) -> None:
    thumbnail = Image.fromarray(rgb).resize((120, 120))
    data = encoded(thumbnail, "TIFF", save_all=True, append_images=[Image.fromarray(rgb)])
    check_same(prepare_bytes(data, SPEC), expected)


def test_sixty_thousand_directories_cost_nothing() -> None:
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 500), (257, 500), (262, 2), (273, 8), (279, 9))
    )
    size = 2 + len(entries) + 4
    pages = b"".join(struct.pack("<H", 5) + entries + struct.pack("<I", 8 + size * (n + 1)) for n in range(60_000))
    began = time.perf_counter()
    check_refused(prepare_bytes(b"II*\0\x08\0\0\0" + pages, SPEC), Status.UNSUPPORTED, "more than 64 images")
    assert time.perf_counter() - began < 0.5  # it took 10 s to walk them all; a quarter of a millisecond for 64


def test_circular_directories_end() -> None:
    entry = struct.pack("<HHII", 256, 4, 1, 500)
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + struct.pack("<I", 8)
    check_refused(prepare_bytes(data, SPEC), Status.UNREADABLE, "circle")


@pytest.fixture(scope="module")
def jpeg(rgb: np.ndarray) -> bytes:
    return encoded(rgb, "JPEG", quality=92)


def harmless(jpeg: bytes) -> Iterator[tuple[str, bytes]]:
    yield "no end marker", jpeg[:-2]
    yield "stray bytes in the header", jpeg[:20] + b"\0\1\2" + jpeg[20:]
    yield "a broken colour profile", jpeg[:2] + b"\xff\xe2\x00\x12ICC_PROFILE\0\x05\x01\x00\x00" + jpeg[2:]
    yield "an unknown JFIF version", jpeg.replace(b"JFIF\0\x01\x01", b"JFIF\0\x09\x01", 1)
    at = jpeg.index(b"\xff\xda")
    last = at + 2 + struct.unpack_from(">H", jpeg, at + 2)[0] - 2
    yield "a sequential scan that says 0 to 0", jpeg[:last] + b"\0" + jpeg[last + 1 :]
    yield "junk behind the end", jpeg + b"\0\xff\xd8junk" * 50


def test_faults_that_touch_no_pixel_lose_no_photo(jpeg: bytes) -> None:
    whole = prepare_bytes(jpeg, SPEC)
    assert whole.image is not None
    for name, data in harmless(jpeg):
        result = prepare_bytes(data, SPEC)
        assert result.status is Status.OK, name
        np.testing.assert_array_equal(result.image, whole.image, err_msg=name)


def test_faults_that_touch_no_pixel_do_not_hide_those_that_do(jpeg: bytes) -> None:
    for name, data in harmless(jpeg):
        start = data.index(b"\xff\xda") + 600
        for cut in (data[: len(jpeg) - 9], data[:start] + data[start + 4000 :]):
            assert prepare_bytes(cut, SPEC).status is Status.UNREADABLE, name


def test_a_progressive_jpeg_needs_every_scan(rgb: np.ndarray) -> None:
    data = encoded(rgb, "JPEG", quality=92, progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", data)]
    assert has_all_scans(data)
    for end in scans[1:]:
        check_refused(prepare_bytes(data[:end] + b"\xff\xd9", SPEC), Status.UNREADABLE, "scans are missing")
    assert prepare_bytes(data[:-2], SPEC).status is Status.OK


def test_a_sequential_jpeg_needs_every_component(jpeg: bytes) -> None:
    """A grey picture would be decoded from the first of three scans."""
    at = jpeg.index(b"\xff\xda")
    one = jpeg[:at] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + jpeg[at + 14 :]
    assert not has_all_scans(one)


def chunk(kind: bytes, body: bytes, checksum: bytes | None = None) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + body)) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + crc


def test_a_png_is_read_in_spite_of_its_texts(rgb: np.ndarray, expected: np.ndarray) -> None:
    data = encoded(rgb, "PNG")
    bad_text = chunk(b"tEXt", b"Comment\0hello", b"\1\2\3\4")
    check_same(prepare_bytes(data[:33] + bad_text + data[33:], SPEC), expected)
    check_same(prepare_bytes(data[:-12], SPEC), expected)
    check_refused(prepare_bytes(data[:-40], SPEC), Status.UNREADABLE, "end is missing")
    animated = chunk(b"acTL", struct.pack(">II", 2, 0))
    check_refused(prepare_bytes(data[:33] + animated + data[33:], SPEC), Status.UNSUPPORTED, "several images")


def test_orientation_in_every_integer_type(jpeg: bytes) -> None:
    upright = prepare_bytes(jpeg, SPEC)
    assert upright.image is not None
    for kind, form in ((1, "<B3x"), (3, "<H2x"), (4, "<I"), (9, "<i")):
        entry = struct.pack("<HHI", 0x0112, kind, 1) + struct.pack(form, 3)
        tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + b"\0\0\0\0"
        segment = b"Exif\0\0" + tiff
        data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
        result = prepare_bytes(data, SPEC)
        assert result.image is not None
        # Half a pixel of the crop's window may move, so that rows are compared by their correlation.
        turned = result.image[::-1, ::-1]
        assert np.corrcoef(turned.ravel(), upright.image.ravel())[0, 1] > 0.98, kind


def test_phones_write_heic_and_avif(rgb: np.ndarray, expected: np.ndarray) -> None:
    # Lossy formats at their best quality: the photo is the same, its grey levels are not.
    result = prepare_bytes(encoded(rgb, "AVIF", quality=100, subsampling="4:4:4"), SPEC)
    check_same(result, expected, tolerance=24)
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs the extra 'phone'")
    heif.register_heif_opener()
    check_same(prepare_bytes(encoded(rgb, "HEIF", quality=100, chroma=444), SPEC), expected, tolerance=24)


def test_heic_without_its_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else found(name))
    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    check_refused(
        prepare_bytes(start + bytes(3000), SPEC), Status.UNSUPPORTED, r"HEIC photo; install fastfundus\[phone\]"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"%PDF-1.7\n", "PDF"),
        (bytes(5000), "only zero bytes"),
    ],
)
def test_files_that_are_something_else_say_what(data: bytes, words: str) -> None:
    check_refused(prepare_bytes(data, SPEC), Status.UNREADABLE, words)


def pairs() -> Iterator[tuple[str, np.ndarray, int]]:
    left, right = (draw_photo(seed, long_side=600).image for seed in (3, 4))
    gap = np.zeros((600, 40, 3), np.uint8)
    half = cv2.copyMakeBorder(cv2.resize(right, (300, 300)), 150, 150, 0, 0, cv2.BORDER_CONSTANT)
    small = cv2.copyMakeBorder(cv2.resize(right, (400, 400)), 100, 100, 0, 0, cv2.BORDER_CONSTANT)
    tight = [cv2.resize(image[40:560, 40:560], (500, 500)) for image in (left, right)]
    yield "one", left, 1
    yield "side by side", np.hstack([left, gap, right]), 2
    yield "one above the other", np.vstack([left, right]), 2
    yield "touching", np.hstack(tight), 2
    yield "of two sizes", np.hstack([left, small]), 2
    yield "the second at half its size", np.hstack([left, half]), 2
    yield "three in a row", np.hstack([left, right, left]), 3
    yield "four in a row", np.hstack([left, right, left, right]), 4
    yield "cut and stacked", np.vstack([left[90:510], right[90:510]]), 2
    yield "cut at the outer sides", np.hstack([left[60:540, 60:540], right[60:540, 60:540]]), 2
    yield "four", np.vstack([np.hstack([left, right]), np.hstack([right, left])]), 4
    yield "cut at the top and bottom", np.hstack([left[80:520], right[80:520]]), 2


@pytest.mark.parametrize(("image", "count"), [pytest.param(i, n, id=name) for name, i, n in pairs()])
def test_several_fields_in_one_picture_are_refused(image: np.ndarray, count: int) -> None:
    assert count_fields(without_margin(shrink(image)[0])) == count
    result = prepare_bytes(encoded(image, "PNG"), SPEC)
    if count == 1:
        assert result.status is Status.OK
    else:
        check_refused(result, Status.UNSUPPORTED, f"{count} retinal fields in one picture")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real photographs are absent")
def test_no_real_photo_of_one_eye_counts_as_two() -> None:
    files = sorted((DATA / "odir" / "images").glob("*.jpg"))[::16]
    files += [file for name in ("eyepacs", "hard", "dr/images") for file in sorted((DATA / name).glob("*.jp*g"))[:40]]
    counts = {file.name: count_fields(without_margin(shrink(decode_at(file.read_bytes(), 256))[0])) for file in files}
    assert len(counts) > 100
    assert {name: count for name, count in counts.items() if count > 1} == {}


@pytest.mark.parametrize("most", [100, 255, 4095, 65535])
def test_every_range_of_a_ppm(rgb: np.ndarray, most: int) -> None:
    values = np.rint(rgb.astype(float) * most / 255)
    data = b"P6\n# drawn\n500 500 %d\n" % most + values.astype(">u2" if most > 255 else np.uint8).tobytes()
    # A range of 100 has steps of 2.6 grey levels.
    assert np.abs(decode_at(data, 0).astype(int) - rgb).max() <= (2 if most == 100 else 1)


def test_channels_of_a_bmp_in_an_order_of_its_own(rgb: np.ndarray) -> None:
    height, width = rgb.shape[:2]
    samples = np.zeros((height, width), "<u4")
    for channel, shift in enumerate((24, 16, 8)):
        samples |= rgb[::-1, :, channel].astype("<u4") << shift
    masks = struct.pack("<IIII", 0xFF000000, 0xFF0000, 0xFF00, 0)
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, samples.nbytes, 0, 0, 0, 0) + masks + bytes(52)
    data = (
        struct.pack("<2sIHHI", b"BM", 14 + len(info) + samples.nbytes, 0, 0, 14 + len(info)) + info + samples.tobytes()
    )
    np.testing.assert_array_equal(decode_at(data, 0), rgb)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["exif", "APP1"])
def test_orientation_in_a_text_of_a_png(rgb: np.ndarray, compressed: bool, name: str) -> None:
    """As ImageMagick stored EXIF before PNG had a chunk for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes().hex()
    info = PngInfo()
    lines = "\n".join(raw[at : at + 72] for at in range(0, len(raw), 72))
    info.add_text(f"Raw profile type {name}", f"\nexif\n{len(raw) // 2:8d}\n{lines}\n", zip=compressed)
    decoded = decode_at(encoded(rgb, "PNG", pnginfo=info), 0)
    np.testing.assert_array_equal(decoded, np.rot90(rgb, -1))


OTHERS = {
    "JPEG XL": b"\xff\x0a" + bytes(range(80)),
    "JPEG XR": b"II\xbc\x01" + bytes(80),
    "raw camera": b"FUJIFILMCCD-RAW 0201" + bytes(80),
    "PCX": b"\x0a\x05\x01\x08" + bytes(80),
    "PAM": b"P7\nWIDTH 100\n" + bytes(80),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_pictures_of_other_kinds_have_a_row_and_a_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(OTHERS[kind])
    assert is_photo(str(tmp_path / "a.bin"))
    check_refused(prepare_bytes(OTHERS[kind], SPEC), Status.UNSUPPORTED, f"{kind} files are not supported; export as")


def test_a_png_of_an_iphone_app_is_named(rgb: np.ndarray) -> None:
    data = encoded(rgb, "PNG")
    check_refused(
        prepare_bytes(data[:8] + chunk(b"CgBI", bytes(4)) + data[8:], SPEC), Status.UNSUPPORTED, "iPhone apps"
    )


def test_reasons_are_in_words_of_our_own(jpeg: bytes) -> None:
    for data in (
        jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        jpeg[:2000] + bytes(4000) + jpeg[6000:],
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99),
    ):
        reason = prepare_bytes(data, SPEC).reason
        assert re.fullmatch(
            r"the (image|header) is damaged[a-z, ]*; copy it again(, or export it anew)?|the file is not.*", reason
        )


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_samples_of_cameras_in_words_of_16_bits(rgb: np.ndarray, form: str, bits: int) -> None:
    """A camera's 12 bits are an almost black picture to programs that take them for 16."""
    samples = (rgb.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    done, file = cv2.imencode({"PNG": ".png", "TIFF": ".tif"}[form], samples[..., ::-1])
    assert done
    assert np.abs(decode_at(file.tobytes(), 0).astype(int) - rgb).max() <= 1
