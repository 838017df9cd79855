"""Tests of DALI decoding on the CPU: pixels identical to those of the CPU decoder, windows, and damaged files."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastfundus.dali.decode import MAX_THREADS, DaliDecoder
from fastfundus.kernels.reference import photos as split
from fastfundus.photo.prepare import decode_at
from fastfundus.synthetic import draw_photo
from fastfundus.training.ragged import RaggedPhotos, sound_jpeg


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    return DaliDecoder(batch_size=8, threads=2)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Photos of several sizes: one is progressive, one has 4:4:4 chroma, and one has an EXIF rotation."""
    folder = tmp_path_factory.mktemp("jpegs")
    found = []
    for number, (side, options) in enumerate([(320, {}), (257, {"progressive": True}), (401, {"subsampling": 0})]):
        image = Image.fromarray(draw_photo(seed=number, long_side=side).image)
        image.save(folder / f"{number}.jpg", quality=90, **options)
        found.append((folder / f"{number}.jpg").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", quality=90, exif=exif)
    return [*found, (folder / "turned.jpg").read_bytes()]


def separate(photos: RaggedPhotos) -> list[np.ndarray]:
    return [photo.numpy() for photo in split(photos.pixels, photos.offsets, photos.sizes)]


def test_decodes_to_the_bit_as_the_cpu(decoder: DaliDecoder, jpegs: list[bytes]) -> None:
    photos, refused = decoder.decode(jpegs)
    assert refused == []
    for got, data in zip(separate(photos), jpegs, strict=True):
        np.testing.assert_array_equal(got, decode_at(data, 0))


def test_windows_are_parts_of_the_whole(decoder: DaliDecoder, jpegs: list[bytes]) -> None:
    windows = [(10, 20, 100, 90), (0, 0, 200, 257), (37, 5, 1, 1)]
    photos, refused = decoder.decode(jpegs[:3], windows)
    assert refused == []
    for got, data, (top, left, height, width) in zip(separate(photos), jpegs, windows, strict=False):
        whole = decode_at(data, 0)[top : top + height, left : left + width]
        assert got.shape == whole.shape
        np.testing.assert_array_equal(got, whole)


def test_nothing_to_decode(decoder: DaliDecoder) -> None:
    photos, refused = decoder.decode([])
    assert (len(photos.pixels), len(photos.sizes), refused) == (0, 0, [])


def test_more_than_a_batch_is_refused(decoder: DaliDecoder, jpegs: list[bytes]) -> None:
    with pytest.raises(ValueError, match="the number of files must not exceed the batch size, 8, got 9"):
        decoder.decode(jpegs[:1] * 9)


@pytest.mark.parametrize("bad", [{0}, {3}, {0, 5}, set(range(6))], ids=["first", "middle", "two", "all"])
def test_a_bad_file_costs_no_other_anything(decoder: DaliDecoder, jpegs: list[bytes], bad: set[int]) -> None:
    files = [jpegs[0][: len(jpegs[0]) // 2] if n in bad else jpegs[n % 3] for n in range(6)]
    photos, refused = decoder.decode(files)
    assert set(refused) == bad
    good = [n for n in range(6) if n not in bad]
    for n, got in zip(good, separate(photos), strict=True):
        np.testing.assert_array_equal(got, decode_at(files[n], 0))
    # The next batch is unaffected as well.
    assert decoder.decode(jpegs[:2])[1] == []


def test_photos_follow(jpegs: list[bytes]) -> None:
    first = RaggedPhotos.concatenate([torch.ones(2, 3, 3, dtype=torch.uint8)], torch.device("cpu"))
    assert first.followed_by([]) is first
    both = first.followed_by([torch.full((1, 2, 3), 7, dtype=torch.uint8)])
    assert [photo.tolist() for photo in separate(both)] == [[[[1] * 3] * 3] * 2, [[[7] * 3] * 2]]


def middle(data: bytes, put: bytes) -> bytes:
    at = len(data) * 2 // 3
    return data[:at] + put + data[at + len(put) :]


def test_sound_means_plainly_sound(jpegs: list[bytes], broken_photos: Path) -> None:
    for data in jpegs:
        assert sound_jpeg(data) is not None
        # A black frame can produce such a run of zeros.
        assert sound_jpeg(middle(data, bytes(500))) is not None
    plain = jpegs[0]
    damaged = {
        "cut off": plain[:-100],
        "no end": plain[:-2],
        "zeros inside": middle(plain, bytes(3000)),
        "zeros at the end": plain[:-500] + bytes(500),
        "a marker inside": middle(plain, b"\xff\xe1"),
        "zeros inside a progressive file": middle(jpegs[1], bytes(3000)),
        "nothing": b"",
        "text": b"this is not a photograph",
    }
    for name, data in damaged.items():
        assert sound_jpeg(data) is None, name
    for name in ("grey.png", "cmyk.jpg", "zero.jpg"):
        assert sound_jpeg((broken_photos / name).read_bytes()) is None, name


def test_a_thumbnail_does_not_make_a_file_unsound(jpegs: list[bytes], tmp_path: Path) -> None:
    """Cameras embed a small JPEG in the header, whose scan ends long before that of the photo."""
    thumbnail = jpegs[0]
    app1 = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"thumb\0" + thumbnail
    with_thumbnail = jpegs[2][:2] + app1 + jpegs[2][2:]
    assert sound_jpeg(with_thumbnail) is not None
    np.testing.assert_array_equal(decode_at(with_thumbnail, 0), decode_at(jpegs[2], 0))


class DeferredStream:
    """A stream of a GPU whose work is done when somebody waits for it."""

    def __init__(self, device: object = None) -> None:
        self.queued: list[Callable[[], None]] = []

    def synchronize(self) -> None:
        while self.queued:
            self.queued.pop(0)()


def test_dali_keeps_its_memory_until_torch_has_copied_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, torch only queues the copies, and DALI may take its memory back as soon as its tensors are released."""
    monkeypatch.setattr(torch.cuda, "Stream", DeferredStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the caller's")
    decoder = DaliDecoder(batch_size=2, threads=1)
    decoder.device = torch.device("cuda", 0)
    memory = [np.full(12, value, np.uint8) for value in (1, 2)]

    class Lent:
        """A tensor of DALI's: its memory is used for something else when it is released."""

        def __init__(self, place: np.ndarray) -> None:
            self.place = place
            weakref.finalize(self, place.fill, 99)

    recorded = []

    def concatenate(photos: list[Lent], device: torch.device) -> types.SimpleNamespace:
        copied = np.zeros(24, np.uint8)
        places = [photo.place for photo in photos]
        stream = decoder._stream
        assert isinstance(stream, DeferredStream)
        stream.queued.append(lambda: np.concatenate(places, out=copied))
        return types.SimpleNamespace(pixels=types.SimpleNamespace(values=copied, record_stream=recorded.append))

    monkeypatch.setattr(RaggedPhotos, "concatenate", concatenate)
    monkeypatch.setattr(decoder, "_halving", lambda *arguments: ([Lent(place) for place in memory], []))
    joined, _ = decoder.decode([b"a", b"b"])
    gc.collect()
    assert [place[0] for place in memory] == [99, 99]
    np.testing.assert_array_equal(joined.pixels.values, np.repeat([1, 2], 12))  # type: ignore[attr-defined]
    assert recorded == ["the caller's"]


def test_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfundus.dali.decode.usable_cores", lambda: 192)
    assert DaliDecoder()._options["num_threads"] == MAX_THREADS
    assert DaliDecoder(threads=40)._options["num_threads"] == 40
