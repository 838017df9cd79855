"""Costs are bounded before they arise: what expands a thousandfold is refused by what it declares."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fastfundus.data.labels import read_labels
from fastfundus.errors import DataError, PhotoError
from fastfundus.photo.decode import eight_bit_rgb
from fastfundus.photo.dicom import read_dicom
from fastfundus.photo.file import expansion_limit, unpacked
from fastfundus.photo.prepare import prepare_bytes
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo
from tests.photo.test_dicom import dicom

SPEC = PreprocessSpec(size=64)


def test_gzip_expands_twenty_times_at_most() -> None:
    assert unpacked(gzip.compress(bytes(60 << 20))) == bytes(60 << 20)
    with pytest.raises(PhotoError, match="unpacks to more than 64 MiB") as caught:
        unpacked(gzip.compress(bytes(70 << 20)))
    assert caught.value.status is Status.UNSUPPORTED
    # Noise does not compress: a large photo is read.
    noise = np.random.default_rng(0).integers(0, 256, 70 << 20, np.uint8).tobytes()
    assert len(unpacked(gzip.compress(noise, 1))) == 70 << 20


def test_all_members_of_a_gzip_file_are_read_within_one_limit() -> None:
    data = np.random.default_rng(1).integers(0, 256, 300_000, np.uint8).tobytes()
    parts = [data[start : start + 16_384] for start in range(0, len(data), 16_384)]
    assert unpacked(b"".join(map(gzip.compress, parts))) == data
    assert unpacked(gzip.compress(b"") + gzip.compress(data)) == data
    # gunzip ignores what follows, too.
    assert unpacked(gzip.compress(data) + b"\0" * 512) == data
    whole = gzip.compress(bytes(40 << 20))
    with pytest.raises(PhotoError, match="unpacks to more than 64 MiB"):
        unpacked(whole + whole)
    for cut in (3, 9, len(whole) - 1):
        with pytest.raises(PhotoError, match="is incomplete"):
            unpacked(gzip.compress(data) + whole[:cut])
    with pytest.raises(PhotoError, match="has more than 100000 members"):
        unpacked(gzip.compress(b"") * 100_001)


def test_a_deflated_dicom_file_expands_as_little(tmp_path: Path) -> None:
    rgb = draw_photo(3, long_side=400).image[20:380]
    dataset = pydicom.dcmread(io.BytesIO(dicom(rgb.tobytes())))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "deflated.dcm")
    data = (tmp_path / "deflated.dcm").read_bytes()
    np.testing.assert_array_equal(read_dicom(data).decode(None), rgb)
    start = data.index(b"\x02\x00\x00\x00UL")
    head = data[: start + 12 + int.from_bytes(data[start + 8 : start + 12], "little")]
    deflate = zlib.compressobj(9, wbits=-15)
    bomb = head + deflate.compress(bytes(300 << 20)) + deflate.flush()
    assert expansion_limit(len(bomb)) == 64 << 20
    with pytest.raises(PhotoError, match="unpacks to more than 64 MiB"):
        read_dicom(bomb)


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(draw_photo(3, long_side=200).image).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    result = prepare_bytes(data[:-2] + data[last:-2] * 1000 + data[-2:], SPEC)
    assert (result.status, "64 scans" in result.reason) == (Status.UNSUPPORTED, True)


def test_sixteen_bits_and_transparency_need_little_more_than_the_picture() -> None:
    """In a process of its own, because the largest memory of a process never falls."""
    code = (
        "import numpy as np, resource; from fastfundus.photo.decode import eight_bit_rgb;"
        "pixels = np.full((4000, 4000, 4), 40000, np.uint16);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; eight_bit_rgb(pixels);"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # 64 MB of 8-bit RGBA, 48 MB of RGB, and another 48 MB to reverse the channels; at once it took 800 MB.
    assert float(run.stdout) < 220


def test_rows_do_not_change_the_result() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (700, 30, 4), np.uint16)
    eight = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    expected = ((eight[..., 2::-1].astype(np.uint32) * eight[..., 3:] + 127) // 255).astype(np.uint8)
    np.testing.assert_array_equal(eight_bit_rgb(pixels), expected)


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="not a regular file"):
        read_labels(tmp_path / "labels.csv")
