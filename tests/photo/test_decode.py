"""Tests of headers, decode plans and pixels: all formats and orientations against Pillow, broken files by status."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from fastfundus.errors import PhotoError
from fastfundus.photo.decode import decode
from fastfundus.photo.decode_plan import DecodePlan, plan_decode
from fastfundus.photo.header import MAX_PIXELS, JpegFrame, PhotoHeader, read_header
from fastfundus.photo.prepare import prepare_bytes
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return draw_photo(3, lesions=("exudates",), long_side=400).image[20:380]


def encoded(rgb: np.ndarray, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return file.getvalue()


LOSSLESS = {
    "png": ("PNG", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "webp": ("WEBP", {"lossless": True}),
    "jpeg2000": ("JPEG2000", {"irreversible": False}),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_are_exact(rgb: np.ndarray, name: str) -> None:
    form, options = LOSSLESS[name]
    data = encoded(rgb, form, **options)
    header = read_header(data)
    assert (header.format, header.width, header.height) == (form, 400, 360)
    np.testing.assert_array_equal(decode(data, header, plan_decode(header, 32)), rgb)


def test_tiff_in_tiles_and_in_planes(rgb: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile writes TIFF layouts that Pillow cannot")
    for options in ({"tile": (64, 64)}, {"tile": (64, 64), "compression": "zlib"}, {"planarconfig": "separate"}):
        file = io.BytesIO()
        pixels = rgb.transpose(2, 0, 1) if "planarconfig" in options else rgb
        tifffile.imwrite(file, np.ascontiguousarray(pixels), photometric="rgb", **options)
        np.testing.assert_array_equal(decode(file.getvalue(), read_header(file.getvalue())), rgb)


def test_tiff_with_several_photos_is_refused_but_not_a_thumbnail(rgb: np.ndarray) -> None:
    page = Image.fromarray(rgb)
    data = encoded(rgb, "TIFF", save_all=True, append_images=[page, page])
    with pytest.raises(PhotoError, match="3 images in one file"):
        read_header(data)
    data = encoded(rgb, "TIFF", save_all=True, append_images=[page.resize((100, 90))])
    np.testing.assert_array_equal(decode(data, read_header(data)), rgb)


SUBSAMPLINGS = {"444": 0, "422": 1, "420": 2}


@pytest.mark.parametrize("sampling", SUBSAMPLINGS)
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_jpeg_equals_pillow(rgb: np.ndarray, sampling: str, progressive: bool) -> None:
    data = encoded(rgb, "JPEG", quality=90, subsampling=SUBSAMPLINGS[sampling], progressive=progressive)
    header = read_header(data)
    assert header.jpeg is not None
    assert (header.jpeg.coding, header.jpeg.subsampling) == ("progressive" if progressive else "baseline", sampling)
    # A Huffman table follows, as these encoders write it.
    assert data[header.jpeg.end : header.jpeg.end + 2] == b"\xff\xc4"
    expected = np.array(Image.open(io.BytesIO(data)))
    # Both use libjpeg-turbo; their builds may round the inverse DCT differently by one.
    assert np.abs(decode(data, header).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("size", "least", "divisor"),
    [
        ((3872, 2592), 512, 4),
        ((3872, 2592), 649, 2),
        ((3872, 2592), 648, 4),
        ((2592, 3872), 324, 8),
        ((3872, 2592), 1296, 2),
        ((3872, 2592), 1297, 1),
        ((511, 4096), 64, 8),
        ((511, 4096), 65, 4),
        ((513, 4096), 65, 8),
        ((400, 300), 512, 1),
        ((400, 300), 0, 1),
    ],
)
def test_the_plan_never_falls_below_the_target(size: tuple[int, int], least: int, divisor: int) -> None:
    plan = plan_decode(PhotoHeader("JPEG", *size, 1, JpegFrame("baseline", "420", 0)), least)
    assert plan.divisor == divisor
    assert (plan.width, plan.height) == tuple(-(-side // divisor) for side in size)
    assert divisor == 1 or min(plan.width, plan.height) >= least
    # The next smaller size would be below the target.
    assert divisor == 8 or least == 0 or min(-(-side // (2 * divisor)) for side in size) < least


def test_only_jpegs_are_scaled() -> None:
    assert plan_decode(PhotoHeader("PNG", 4000, 3000, 1), 512) == DecodePlan("opencv", 1, 4000, 3000)
    assert plan_decode(PhotoHeader("JPEG2000", 4000, 3000, 1), 512).decoder == "pillow"


@pytest.mark.parametrize("least", [0, 181, 180, 90, 45])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_planned_size_is_the_decoded_size(rgb: np.ndarray, least: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(rgb, "JPEG", quality=90, exif=exif)
    header = read_header(data)
    plan = plan_decode(header, least)
    got = decode(data, header, plan)
    assert got.shape[:2] == ((plan.width, plan.height) if orientation == 6 else (plan.height, plan.width))
    # For a smooth image, a scaled DCT is nearly the area average.
    whole = decode(data, header)
    small = cv2.resize(whole, got.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(got.astype(int) - small).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_orientation_equals_pillow(rgb: np.ndarray, orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(rgb, form, exif=exif)
    header = read_header(data)
    got = decode(data, header)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert got.shape[1::-1] == header.upright_size
    assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("Canon", "Canon EOS 5D", "Canon EOS 5D"),
        ("TOPCON", "TRC-NW8", "TOPCON TRC-NW8"),
        ("NIDEK", None, "NIDEK"),
        (None, "AFC", "AFC"),
        ("x" * 300, "m\n", f"{'x' * 64} m"),
        ("", "", None),
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_camera_is_read_from_exif(
    rgb: np.ndarray, form: str, make: str | None, model: str | None, camera: str | None
) -> None:
    exif = Image.Exif()
    for tag, value in ((0x010F, make), (0x0110, model), (0x0112, 1)):
        if value is not None:
            exif[tag] = value
    data = encoded(rgb, form, exif=exif)
    assert read_header(data).camera == camera
    assert prepare_bytes(data, PreprocessSpec(size=64)).facts.camera == camera


def test_sixteen_bits_map_full_scale_to_full_scale(rgb: np.ndarray) -> None:
    deep = rgb.astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    got = decode(data, read_header(data))
    np.testing.assert_array_equal(got, rgb)


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})]
)
def test_transparent_pixels_are_black(rgb: np.ndarray, form: str, options: dict[str, object]) -> None:
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:50] = 0
    data = encoded(np.dstack([rgb, alpha]), form, **options)
    got = decode(data, read_header(data))
    assert not got[:50].any()
    np.testing.assert_array_equal(got[50:], rgb[50:])


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_pillow_reads_what_libjpeg_turbo_warns_about(rgb: np.ndarray, divisor: int) -> None:
    # Sides that no divisor divides: the decoded size must match the plan.
    rgb = rgb[:357, :395]
    data = encoded(rgb, "JPEG", quality=90)
    # Stray bytes between two markers: strict decoders reject the file, although the image is complete.
    at = data.index(b"\xff\xda")
    odd = data[:at] + b"\x00\x00" + data[at:]
    header = read_header(odd)
    plan = plan_decode(header, -(-357 // divisor))
    assert plan.divisor == divisor
    # Both use the same library underneath, but may round colours differently.
    got = decode(odd, header, plan).astype(int)
    np.testing.assert_allclose(got, decode(data, header, plan).astype(int), atol=1)
    if divisor == 1:
        np.testing.assert_allclose(got, np.array(Image.open(io.BytesIO(data))).astype(int), atol=1)


BROKEN = {
    "zero.jpg": (Status.UNREADABLE, "empty"),
    "text.jpg": (Status.UNREADABLE, "not an image"),
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


def test_damage_is_never_passed_on(rgb: np.ndarray) -> None:
    """Pillow and OpenCV decode these silently, with invented pixels."""
    data = encoded(rgb, "JPEG", quality=90)
    start = data.index(b"\xff\xda") + 14
    middle = data.index(b"\xff", start + (len(data) - start) // 2)
    hole = data[:middle] + data[middle + 400 :]
    assert np.array(Image.open(io.BytesIO(hole))).shape == rgb.shape
    with pytest.raises(PhotoError, match="damaged or incomplete") as caught:
        decode(hole, read_header(hole))
    assert caught.value.status is Status.UNREADABLE

    png = bytearray(encoded(rgb, "PNG"))
    png[len(png) // 2] ^= 1
    with pytest.raises(PhotoError, match="IDAT checksum mismatch"):
        decode(bytes(png), read_header(bytes(png)))


@pytest.mark.parametrize("filling", [b"\0" * 7, b"\xff" * 7], ids=["zeros", "ones"])
def test_filling_before_the_end_is_no_damage(rgb: np.ndarray, filling: bytes) -> None:
    data = encoded(rgb, "JPEG", quality=90)
    filled = data[:-2] + filling + data[-2:]
    np.testing.assert_array_equal(decode(filled, read_header(filled)), decode(data, read_header(data)))
    junk = data[:-2] + b"\x12\x34\x56\x78" * 8 + data[-2:]
    with pytest.raises(PhotoError, match="the image is damaged or incomplete; copy it again"):
        decode(junk, read_header(junk))


# A synthetic photo of 128 px, saved with `Image.save(..., "JPEG", quality=40)`, then `jpegtran -arithmetic -copy none`;
# base 85.
ARITHMETIC = """
|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-
gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBplmUDiAeE-`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-
e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-
e0=}O01*fPfB=940U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#0G|ZV!l4^jY!+>H!1et@V51E+4^=BBPWLf6dE3yPu?K`r0t}3V
?-LP=qU|kI=X_-GC+1fAp`V6ZJB*WtFr&o;nK>&6bjQQnTds}Abp!|fQzFuK{lt27a+R^C+?bh`p32qaLMMW&HxOpob>2}&uL2m#fgF+Yl@`=V
>guFDHY}q0Rl|x1G8Ji8h6TE7+JF_%d;kC~sz8w2s|Pz>Pw67EN9DMf3bnOLrTpT7Vs01T>W~>X8!n%NdYCzRoWv{Lq!Oe*B9q&#-
UfD89HI%Q406h&bKUJO=21B;fKG4jG)<UDG}WTapN3}es2MqUCsu6y-
%R&G0cMF7sQ3!Q$daDU2|7$`v^+vL8$u8*d)hP|iSAHJ7&8FNym937jTxK<6Ry4bYs$OK69$wG$ai+Dm}IUKbHuXL9zEKUej7VP!rda4m#IkTh
s)Le9Bn(0w_zkzsqv89P2$GGI*RMOxR-G(1y5we17vNaIZ)_6KS&WWKW#-5XWw#d)6;_F23CR0&0J2A%>wju_`EF-
7d;y_s4(QN!vM>#anU;@sD54fm+cDksqfn=2@`5{Juy6L{gBmFA=Gx^<S!=TmIUj79x!~ru$^&L+TFOew9DKw-bgS8X0b7?pu~4q6TE(ne4t4P
MT*GWJ=X%6Bm2HkkQlqx$(Fb4)sif6q$J)~z(Ez_f+rX^IQm2(pOm^42L14$CuNAMdBN@mNHhaNx}*26q;`(Bfu@|j_M7Zw&ANwJss5)4?a(ri
XANiS>?SWXDJJ4W_1xFV7<6}V5Enr%!n%UNlYx_s;`imsptueumA3`*@`Rw7HSh*fys|6Etc*GSHDu%ZV*9HV<QOh!48GIL5aFek6KPWyv~b0;
%9X-TK0ow-P}@-K-$yO}@}-ExHe6N-aE%D(HbKO1h0W2lCjz)8wzvSCUKT2B;j#G3XUC(Gg9kK-LpBXe$T<UNe^W%K@_espV#{OLa2i7*sFtvX
u1k_@Jexg?F1M!ozh_csUISdv`ftMQ+w02EvtncMRgu1yO}oTO??uj^i0brAi3iPIQYY#%LkH3yyNs>3TQt!kzgV`Yvj&8inJ!#xQJI(1IjXl!
s5ab`W398qaYR@pcg6WB-Z5XMfdAP
"""


def test_arithmetic_coding() -> None:
    data = base64.b85decode("".join(ARITHMETIC.split()))
    header = read_header(data)
    assert header.jpeg is not None
    assert (header.jpeg.coding, header.jpeg.subsampling) == ("arithmetic", "420")
    got = decode(data, header, plan_decode(header, 64))
    assert got.shape == (64, 64, 3)
    # A retina on a black frame.
    assert got[32, 32, 0] > 100
    assert got[0, 0].max() < 16


def test_motion_jpeg_without_tables(rgb: np.ndarray) -> None:
    """Motion-JPEG frames omit the Huffman tables; decoders must use the standard ones (ITU-T T.81, annex K)."""
    data = encoded(rgb, "JPEG", quality=90)
    bare = without_segments(data, 0xC4)
    assert len(bare) < len(data) - 300
    np.testing.assert_array_equal(decode(bare, read_header(bare)), decode(data, read_header(data)))


def without_segments(jpeg: bytes, marker: int) -> bytes:
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        kept += b"" if jpeg[at + 1] == marker else jpeg[at:end]
        at = end
    return kept + jpeg[at:]


def with_frame(jpeg: bytes, *, marker: int = 0xC0, bits: int = 8) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 1] + bytes([marker]) + jpeg[at + 2 : at + 4] + bytes([bits]) + jpeg[at + 5 :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marker": 0xC1, "bits": 12}, "12 bits per sample"),
        ({"marker": 0xC3}, "lossless"),
        ({"marker": 0xC5}, "lossless"),
    ],
)
def test_jpegs_that_no_camera_writes_are_named(rgb: np.ndarray, changes: dict[str, int], message: str) -> None:
    with pytest.raises(PhotoError, match=message) as caught:
        read_header(with_frame(encoded(rgb, "JPEG"), **changes))
    assert caught.value.status is Status.UNSUPPORTED


def test_mpo_with_a_preview_shows_the_photo(rgb: np.ndarray) -> None:
    data = encoded(rgb, "MPO", save_all=True, append_images=[Image.new("RGB", (160, 144))], quality=90)
    header = read_header(data)
    assert (header.format, header.width) == ("JPEG", 400)
    assert np.abs(decode(data, header).astype(int) - np.array(Image.open(io.BytesIO(data)))).max() <= 1


def test_an_animated_gif_and_other_formats_are_named(rgb: np.ndarray) -> None:
    frames = [Image.fromarray(np.roll(rgb, shift, axis=0)) for shift in (0, 20)]
    data = encoded(rgb, "GIF", save_all=True, append_images=frames)
    for form, content in [("GIF", data), ("ICO", encoded(rgb, "ICO"))]:
        with pytest.raises(PhotoError, match=f"{form} files are not supported") as caught:
            read_header(content)
        assert caught.value.status is Status.UNSUPPORTED


def test_a_colour_profile_is_not_applied(rgb: np.ndarray) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain, tagged = encoded(rgb, "JPEG"), encoded(rgb, "JPEG", icc_profile=profile)
    assert len(tagged) > len(plain) + 300
    np.testing.assert_array_equal(decode(tagged, read_header(tagged)), decode(plain, read_header(plain)))


def test_tiff_of_sixteen_bits_and_of_floats(rgb: np.ndarray) -> None:
    data = cv2.imencode(".tiff", rgb[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode(data, read_header(data)), rgb)
    floats = cv2.imencode(".tiff", rgb.astype(np.float32))[1].tobytes()
    with pytest.raises(PhotoError, match="32 bits per channel"):
        read_header(floats)


def test_bombs_are_refused_by_their_header(rgb: np.ndarray) -> None:
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "PNG")
    jpeg = encoded(rgb, "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:at] + (30000).to_bytes(2, "big") * 2 + jpeg[at + 4 : at + 200]
    for data in (file.getvalue(), jpeg):
        with pytest.raises(PhotoError, match=f"{MAX_PIXELS:,}") as caught:
            read_header(data)
        assert caught.value.status is Status.UNSUPPORTED
