"""The pixels of a DICOM file, in 8-bit RGB.

libjpeg-turbo decodes lossless JPEG of 8 bits, as strictly as other JPEGs; pydicom decodes everything else, with GDCM
(BSD licence) for other lossless JPEG and JPEG-LS. What the pixel data says of itself is believed over the header, which
exports often fill by template. Sources: DICOM PS3.3 C.7.6.3 (Image Pixel), PS3.5 A.4 (encapsulation).
"""

from __future__ import annotations

import warnings
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.photo.decode import eight_bit_rgb, is_damage
from fastfundus.records import Status

__all__ = ["decode_pixels", "first_frame", "with_colours_said"]

_JPEG_2000 = {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"}
_HIGH_THROUGHPUT = {f"1.2.840.10008.1.2.4.{number}" for number in (201, 202, 203)}
_LOSSLESS_JPEG = {"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"}
_RLE = "1.2.840.10008.1.2.5"
_DAMAGED = "the image is damaged or incomplete; export it again"
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe segment with transform 0, which declares the components as plain R, G, B."""
_DARK, _NEAR_ZERO, _NEAR_HALF = 16, 48, (96, 160)
_MIN_SHARE_OF_DARK = 0.005


def decode_pixels(dataset: Any) -> NDArray[np.uint8]:
    """Decode the image of a dataset whose header `photo.dicom` has checked and completed; the header may be corrected.

    Returns:
        uint8 [H, W, 3] RGB.

    Raises:
        PhotoError: the pixel data is damaged (`unreadable`), or of a kind that no installed decoder supports
            (`unsupported`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, bits = _samples(dataset)
    except PhotoError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        # pydicom raises these when no installed decoder supports the compression, or when one fails.
        if "missing" in str(error) or isinstance(error, NotImplementedError):
            syntax = dataset.file_meta.TransferSyntaxUID
            raise PhotoError(
                Status.UNSUPPORTED, f"unsupported compression ({syntax.name}); export it uncompressed"
            ) from None
        raise PhotoError(Status.UNREADABLE, _DAMAGED) from None
    except Exception:
        raise PhotoError(Status.UNREADABLE, _DAMAGED) from None
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind not in "ui" or pixels.dtype.itemsize > 2:
        raise PhotoError(Status.UNSUPPORTED, "pixels that are not 8-bit or 16-bit RGB; export as RGB with 8 bits")
    if pixels.dtype.kind == "i":
        # Colours have no sign; headers that claim one are filled by template.
        pixels = pixels.view(f"u{pixels.dtype.itemsize}")
    return eight_bit_rgb(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), bits)


def _samples(dataset: Any) -> tuple[NDArray[Any], int]:
    """Return the samples in RGB, and how many bits of them are used according to the header."""
    from pydicom.pixels import apply_color_lut, pixel_array
    from pydicom.uid import JPEG2000

    syntax, said = dataset.file_meta.TransferSyntaxUID, str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    if "NumberOfFrames" in dataset:
        # It is 1, or not a number.
        dataset.NumberOfFrames = 1
    if str(syntax) in _LOSSLESS_JPEG and (strict := _lossless_jpeg(first_frame(dataset))) is not None:
        return _in_rgb(strict, said), bits
    if str(syntax) in _HIGH_THROUGHPUT:
        # pydicom knows no decoder for it, but OpenJPEG is one, and the codestream says by itself how it is coded.
        dataset.file_meta.TransferSyntaxUID = JPEG2000
    if not syntax.is_compressed or str(syntax) == _RLE:
        # All bits are read, because samples may use more of them than the header says.
        dataset.BitsStored, dataset.HighBit = dataset.BitsAllocated, dataset.BitsAllocated - 1
        if said == "YBR_FULL_422" and len(dataset.PixelData) >= 3 * int(dataset.Rows) * int(dataset.Columns):
            dataset.PhotometricInterpretation = said = "YBR_FULL"
        if said in ("RGB", "YBR_FULL") and dataset.BitsAllocated == 8:
            return _in_rgb(pixel_array(dataset, raw=True).view(np.uint8), said), bits
    if _transforms_itself(dataset):
        dataset.PhotometricInterpretation = "RGB"
    pixels = pixel_array(dataset)
    if said == "PALETTE COLOR":
        # The entries of the table have a size of their own; those of 8 bits may stand in words of 16.
        return apply_color_lut(pixels, dataset), 16
    return pixels, bits


def first_frame(dataset: Any) -> bytes:
    """Return the encoded image of a dataset with compressed pixels."""
    from pydicom.encaps import get_frame

    return bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))


def with_colours_said(frame: bytes, photometric: str) -> bytes:
    """Declare the colour space inside a JPEG where only the DICOM header names it.

    Decoders assume YCbCr for a JPEG without a JFIF or Adobe segment. If DICOM states RGB, insert an Adobe segment that
    declares it. A JPEG with such a segment is left unchanged, because some exports label YCbCr images as RGB in the
    DICOM header; so is one with subsampled components, which are never R, G and B.
    """
    start = frame[: frame.find(b"\xff\xda")]
    if photometric == "RGB" and b"JFIF\0" not in start and b"Adobe" not in start and not _is_subsampled(start):
        return frame[:2] + _ADOBE_RGB + frame[2:]
    return frame


def _is_subsampled(start: bytes) -> bool:
    """Return whether the components of a baseline or extended JPEG have different sampling factors."""
    at = max(start.find(b"\xff\xc0"), start.find(b"\xff\xc1"))
    return at >= 0 and len({start[at + 11 + 3 * index : at + 12 + 3 * index] for index in range(3)}) > 1


def _lossless_jpeg(frame: bytes) -> NDArray[np.uint8] | None:
    """Decode lossless JPEG of 8 bits to its samples as they are stored; None for rare kinds of it.

    GDCM's libjpeg only prints a warning about damage, and continues with invented pixels.
    """
    start = frame[: max(0, frame.find(b"\xff\xda"))]
    at = start.find(b"\xff\xc3")
    bits, components = start[at + 4 : at + 5], start[at + 9 : at + 10]
    transformed = b"JFIF\0" in start or (b"Adobe" in start and _ADOBE_RGB not in start)
    if at < 0 or bits != b"\x08" or components != b"\x03" or transformed:
        return None
    try:
        samples: NDArray[np.uint8] = simplejpeg.decode_jpeg(with_colours_said(frame, "RGB"), "RGB")
    except ValueError as error:
        if not is_damage(str(error)):
            return None
        raise PhotoError(Status.UNREADABLE, _DAMAGED) from None
    return samples


def _in_rgb(samples: NDArray[np.uint8], said: str) -> NDArray[np.uint8]:
    """Convert stored samples to RGB where they are YCbCr, whatever the header says: the surroundings of a field tell.

    Black is (0, 0, 0) in RGB and (0, 128, 128) in YCbCr. A photo without black surroundings is what the header says.
    """
    from pydicom.pixels import convert_color_space

    if samples.ndim != 3 or samples.shape[2] != 3:
        return samples
    ybr = said.startswith("YBR_FULL")
    dark = samples[samples[..., 0] < _DARK]
    if len(dark) >= _MIN_SHARE_OF_DARK * samples[..., 0].size:
        low, high = sorted(np.median(dark[:, 1:], axis=0))
        ybr = (ybr and high >= _NEAR_ZERO) or (_NEAR_HALF[0] <= low and high <= _NEAR_HALF[1])
    return convert_color_space(samples, "YBR_FULL", "RGB") if ybr else samples


def _transforms_itself(dataset: Any) -> bool:
    """Return whether a JPEG 2000 codestream contains a colour transform, so that it decodes to RGB.

    Source: ITU-T T.800, annex A.6.1: the fifth byte of the COD segment.
    """
    if str(dataset.file_meta.TransferSyntaxUID) not in _JPEG_2000:
        return False
    frame = first_frame(dataset)
    at = frame.find(b"\xff\x52")
    return 0 <= at < len(frame) - 8 and frame[at + 8] == 1
