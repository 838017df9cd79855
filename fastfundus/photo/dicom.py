"""Fundus photographs in DICOM files: Ophthalmic Photography objects and comparable camera exports.

An image compressed as baseline JPEG is extracted and decoded like any other JPEG, including scaled decoding. pydicom
decodes everything else. Sources: DICOM PS3.3 A.41 (Ophthalmic Photography), PS3.6 (identifiers), PS3.5 A.4
(encapsulation).
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.photo.decode import decode, eight_bit_rgb
from fastfundus.photo.decode_plan import DecodePlan
from fastfundus.photo.header import PhotoHeader, check_size, read_header
from fastfundus.records import PhotoFacts, Status

__all__ = ["DicomPhoto", "is_dicom", "read_dicom"]

_WIDE_FIELD = {"1.2.840.10008.5.1.4.1.1.77.1.5.5", "1.2.840.10008.5.1.4.1.1.77.1.5.6"}
_OCT = {
    "1.2.840.10008.5.1.4.1.1.77.1.5.4",
    "1.2.840.10008.5.1.4.1.1.77.1.5.7",
    "1.2.840.10008.5.1.4.1.1.77.1.5.8",
    "1.2.840.10008.5.1.4.1.1.81.1",
    "1.2.840.10008.5.1.4.1.1.82.1",
}
_JPEG_8_BIT = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}
_WIDEST_DEGREES = 75.0
"""Largest accepted field of view; standard fundus cameras show 30 to 60 degrees."""
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe segment with transform 0, which declares the components as plain R, G, B."""


@dataclass(frozen=True, slots=True, eq=False)
class DicomPhoto:
    """A DICOM file whose header identifies it as a fundus photograph."""

    facts: PhotoFacts
    header: PhotoHeader
    """Header of the embedded JPEG, or one with the format "DICOM"."""
    _frame: bytes | None
    _dataset: Any

    def decode(self, plan: DecodePlan | None) -> NDArray[np.uint8]:
        """Decode to uint8 [H, W, 3] RGB.

        Args:
            plan: The result of `plan_decode` for `header`; None decodes at full size. Only embedded JPEGs are scaled.

        Raises:
            PhotoError: The pixel data is damaged, or cannot be decoded.
        """
        if self._frame is not None:
            return decode(self._frame, self.header, plan)
        return _pixels(self._dataset)


def is_dicom(data: bytes) -> bool:
    """Return whether the data starts like a DICOM file, with the preamble or, as in old exports, without it."""
    return data[128:132] == b"DICM" or (data[:2] == b"\x08\x00" and data[4:6].isalpha() and data[4:6].isupper())


def read_dicom(data: bytes) -> DicomPhoto:
    """Read everything except the pixels.

    Raises:
        PhotoError: The file is damaged (`unreadable`), a wide-field image (`not_fundus`), or `unsupported`: several
            frames, OCT, greyscale, or without pixel data.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            # Nonstandard values are common in exports; the relevant ones are checked below.
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            _judge_kind(dataset)
            facts = _facts(dataset)
            if "TransferSyntaxUID" not in dataset.file_meta:
                # Files without a preamble do not name their syntax; since pydicom could parse this one, it is one of
                # these two.
                implicit = dataset.original_encoding[0]
                dataset.file_meta.TransferSyntaxUID = (
                    pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
                )
            syntax = str(dataset.file_meta.TransferSyntaxUID)
            frame = _first_frame(dataset) if syntax in _JPEG_8_BIT else None
            photometric = str(dataset.PhotometricInterpretation)
            width, height = int(dataset.Columns), int(dataset.Rows)
    except PhotoError:
        raise
    except Exception as error:
        # pydicom raises many types of errors on damaged files.
        raise PhotoError(Status.UNREADABLE, f"the DICOM header is damaged ({error}); export it again") from None
    if frame is not None:
        frame = _with_colours_said(frame, photometric)
        # DICOM defines the orientation; ignore EXIF data that a converter left in the JPEG.
        return DicomPhoto(facts, replace(read_header(frame), orientation=1), frame, None)
    check_size(width, height)
    return DicomPhoto(facts, PhotoHeader("DICOM", width, height, 1), None, dataset)


def _judge_kind(dataset: Any) -> None:
    sop = str(dataset.get("SOPClassUID", ""))
    if sop in _WIDE_FIELD:
        raise PhotoError(Status.NOT_FUNDUS, "wide-field image; a standard fundus photograph is required")
    if sop in _OCT or dataset.get("Modality") in ("OPT", "OPTENF", "OPTBSV"):
        raise PhotoError(Status.UNSUPPORTED, "OCT scan, not a photograph")
    field = dataset.get("HorizontalFieldOfView")
    if field is not None and float(field) > _WIDEST_DEGREES:
        raise PhotoError(Status.NOT_FUNDUS, f"wide-field image ({float(field):g} degrees); 30 to 60 are standard")
    if "PixelData" not in dataset:
        raise PhotoError(Status.UNSUPPORTED, "DICOM file without an image")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise PhotoError(
            Status.UNSUPPORTED, f"{frames} frames (angiography, or a stereo pair); export one colour photo per file"
        )
    if int(dataset.get("SamplesPerPixel") or 1) != 3 and dataset.get("PhotometricInterpretation") != "PALETTE COLOR":
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")


def _facts(dataset: Any) -> PhotoFacts:
    eye = str(dataset.get("ImageLaterality") or dataset.get("Laterality") or "").strip().upper()
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    names = [str(dataset.get(name) or "").strip() for name in ("Manufacturer", "ManufacturerModelName")]
    return PhotoFacts(
        patient=str(dataset.get("PatientID") or "").strip() or None,
        eye=eye if eye in ("L", "R") else None,
        camera=" ".join(name for name in names if name) or None,
        # The standard puts row spacing first; fundus cameras have square pixels.
        pixel_spacing_mm=float(spacing[0]) if spacing else None,
    )


def _first_frame(dataset: Any) -> bytes:
    from pydicom.encaps import get_frame

    return bytes(get_frame(dataset.PixelData, 0, number_of_frames=1))


def _with_colours_said(frame: bytes, photometric: str) -> bytes:
    """Declare the colour space inside a JPEG where only the DICOM header names it.

    Decoders assume YCbCr for a JPEG without a JFIF or Adobe segment. If DICOM states RGB, insert an Adobe segment that
    declares it. A JPEG with such a segment is left unchanged, because some exports label YCbCr images as RGB in the
    DICOM header.
    """
    start = frame[: frame.find(b"\xff\xda")]
    if photometric == "RGB" and b"JFIF\0" not in start and b"Adobe" not in start:
        return frame[:2] + _ADOBE_RGB + frame[2:]
    return frame


def _pixels(dataset: Any) -> NDArray[np.uint8]:
    from pydicom.pixels import apply_color_lut, pixel_array

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = pixel_array(dataset)
            if dataset.PhotometricInterpretation == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, dataset)
            bits = int(dataset.BitsStored)
    except (NotImplementedError, RuntimeError) as error:
        # pydicom raises these when no installed decoder supports the compression, or when one fails.
        text = str(error).splitlines()[0]
        if "missing" in str(error) or isinstance(error, NotImplementedError):
            raise PhotoError(Status.UNSUPPORTED, f"unsupported compression ({text})") from None
        raise PhotoError(Status.UNREADABLE, f"the image is damaged or incomplete ({text}); export it again") from None
    except Exception as error:
        raise PhotoError(Status.UNREADABLE, f"the image is damaged or incomplete ({error}); export it again") from None
    if pixels.dtype == np.uint16 and bits < 16 and dataset.PhotometricInterpretation != "PALETTE COLOR":
        # Map the stored full scale to 65535, so that 12-bit samples in 16 bits do not become a dark image.
        pixels = np.minimum(pixels.astype(np.uint32) * 65535 // (2**bits - 1), 65535).astype(np.uint16)
    return eight_bit_rgb(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
