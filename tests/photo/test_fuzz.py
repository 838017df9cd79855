"""Fuzz tests: any file content gets a status, in bounded time and memory, and the process survives.

make fuzz        runs them for a quarter of an hour; FASTFUNDUS_FUZZ_EXAMPLES sets the number of examples per test
"""

from __future__ import annotations

import functools
import io
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastfundus.photo.prepare import prepare_bytes
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo
from tests.photo.test_dicom import dicom, picture

SPEC = PreprocessSpec(size=64)
EXAMPLES = int(os.environ.get("FASTFUNDUS_FUZZ_EXAMPLES", "150"))
MAX_SECONDS = 5.0
"""Time limit for one photo of at most a few megapixels, which normally takes milliseconds; exceeding it is a hang."""
DATA = Path(os.environ.get("FASTFUNDUS_DATA", Path(__file__).parents[3] / "shared" / "data"))


@functools.cache
def seeds() -> dict[str, bytes]:
    """Return valid files of every kind, including real camera JPEGs where available."""
    rgb = draw_photo(3, lesions=("exudates",), long_side=320).image[10:290]
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Maker"
    files = {
        "jpeg": picture(rgb, "JPEG", quality=85, exif=exif),
        "progressive": picture(rgb, "JPEG", quality=85, progressive=True),
        "png": picture(rgb, "PNG"),
        "tiff": picture(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-deep": cv2.imencode(".tiff", rgb.astype(np.uint16) * 257)[1].tobytes(),
        "webp": picture(rgb, "WEBP"),
        "jpeg2000": picture(rgb, "JPEG2000"),
        "bmp": picture(rgb, "BMP"),
        "dicom": dicom(rgb.tobytes(), Rows=280, Columns=320),
        "dicom-jpeg": dicom(
            picture(rgb, "JPEG", quality=85), "1.2.840.10008.1.2.4.50", Rows=280, Columns=320,
            PhotometricInterpretation="YBR_FULL_422",
        ),
    }  # fmt: skip
    for number, path in enumerate(sorted((DATA / "odir" / "images").glob("*.jpg"))[:3]):
        files[f"real-{number}"] = path.read_bytes()
    return files


BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"RIFF", b"BM", b"\x1f\x8b", b"")


def judge(data: bytes) -> None:
    began = time.perf_counter()
    result = prepare_bytes(data, SPEC)
    assert time.perf_counter() - began < MAX_SECONDS
    assert isinstance(result.status, Status)
    assert (result.reason == "") == (result.status is Status.OK)
    assert (result.image is not None) == (
        result.status in (Status.OK, Status.UNGRADABLE) and result.quality is not None
    )
    if result.image is not None:
        assert result.image.shape == (64, 64, 3)
        assert result.image.dtype == np.uint8
    # Reasons are shown to users and must fit into a table.
    assert len(result.reason) < 1000


examples: Callable[..., Callable[..., object]] = settings(
    max_examples=EXAMPLES,
    derandomize="FASTFUNDUS_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)


@examples
@given(data=st.data())
def test_changed_bytes(data: st.DataObject) -> None:
    """Change some bytes anywhere, most of them in the first kilobyte, where headers are."""
    whole = bytearray(seeds()[data.draw(st.sampled_from(sorted(seeds())), label="file")])
    for _ in range(data.draw(st.integers(1, 12), label="changes")):
        last = data.draw(st.sampled_from([64, 1024, len(whole)]), label="within") - 1
        whole[data.draw(st.integers(0, min(last, len(whole) - 1)), label="place")] = data.draw(st.integers(0, 255))
    judge(bytes(whole))


@examples
@given(data=st.data())
def test_cut_doubled_and_spliced(data: st.DataObject) -> None:
    """Remove pieces, repeat them, or insert pieces of another file."""
    names = st.sampled_from(sorted(seeds()))
    whole, other = seeds()[data.draw(names, label="file")], seeds()[data.draw(names, label="other")]
    a, b = sorted(data.draw(st.integers(0, len(whole))) for _ in range(2))
    c = data.draw(st.integers(0, len(other)))
    pieces = {"cut": b"", "doubled": whole[a:b] * 2, "spliced": other[c : c + 4096], "zeros": bytes(min(b - a, 65536))}
    judge(whole[:a] + pieces[data.draw(st.sampled_from(sorted(pieces)), label="how")] + whole[b:])


@examples
@given(start=st.sampled_from(BEGINNINGS), rest=st.binary(max_size=2000))
def test_anything_after_a_known_beginning(start: bytes, rest: bytes) -> None:
    judge(start + rest)
    judge(bytes(128) + b"DICM" + start + rest)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000"])
def test_headers_that_promise_much_cost_little(form: str, tmp_path: Path) -> None:
    """Declare huge widths and heights in the header; a process limited to 2 GB must survive each."""
    rgb = draw_photo(1, long_side=128).image
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form)
    data = file.getvalue()
    size = (128).to_bytes(2, "big"), (128).to_bytes(4, "big"), (128).to_bytes(2, "little"), (128).to_bytes(4, "little")
    for number, pattern in enumerate(size):
        order = "big" if number < 2 else "little"
        for value in (2 ** (8 * len(pattern)) - 1, 2 ** (8 * len(pattern) - 1) - 1, 60000):
            blown = data.replace(pattern, (value % 2 ** (8 * len(pattern))).to_bytes(len(pattern), order))
            (tmp_path / f"{number}-{value}.bin").write_bytes(blown)
    code = """
import sys
from pathlib import Path
from fastfundus.photo import prepare_photo
from fastfundus.spec import PreprocessSpec
spec = PreprocessSpec(size=64)
paths = sorted(Path(sys.argv[1]).glob("*.bin"))
prepare_photo(paths[0], spec)
for path in paths:
    print(path.name, prepare_photo(path, spec).status)
# ru_maxrss also covers the process that this one was forked from.
print("peak", next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, preexec_fn=limit, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, peak = done.stdout.splitlines()
    assert len(lines) == 12
    # An image of the maximum pixel count takes 450 MB; none of these is that large.
    assert int(peak.split()[1]) < 700_000
