"""Fundus photographs in DICOM files: Ophthalmic Photography objects and comparable camera exports.

An image compressed as baseline JPEG is extracted and decoded like any other JPEG, including scaled decoding.
`photo.dicom_pixels` decodes everything else. Sources: DICOM PS3.3 A.41 (Ophthalmic Photography), PS3.6 (identifiers).
"""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.identifiers import is_placeholder, normal_eye
from fastfundus.photo.decode import decode
from fastfundus.photo.decode_plan import DecodePlan
from fastfundus.photo.dicom_pixels import decode_pixels, first_frame, with_colours_said
from fastfundus.photo.file import expansion_limit
from fastfundus.photo.header import PhotoHeader, check_size, read_header
from fastfundus.photo.inflate import inflated_length
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
_ITEM = b"\xfe\xff\x00\xe0"
"""Tag of a fragment of encapsulated pixels."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_FIRST_ELEMENTS = {bytes((element, 0)) for element in (0x00, 0x01, 0x05, 0x08, 0x12, 0x16, 0x18)}
"""Numbers of elements of group 8 that may be the first of a dataset."""
_WIDEST_DEGREES = 75.0
"""Largest accepted field of view; standard fundus cameras show 30 to 60 degrees."""
_EYE_CODES = {"G-A100": "R", "24028007": "R", "G-A101": "L", "7771000": "L"}
"""Codes of "right" and "left" in SNOMED, as modifiers of the anatomic region."""
_REGION_CODES = {"1290041000": "R", "1290032005": "R", "1290043002": "L", "1290031003": "L"}
"""Codes of the right and left eye as regions: entire eye, structure of the eye proper."""
_DAMAGED = "the DICOM header is damaged; export it again"
# pydicom logs tracebacks of its decoders; every fault becomes the row of its photo instead.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


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
        return decode_pixels(self._dataset)


def is_dicom(data: bytes) -> bool:
    """Return whether the data starts like a DICOM file, with the preamble or, as in old exports, without it."""
    if data[128:132] == b"DICM" or (data[:2] == b"\x08\x00" and data[4:6].isalpha() and data[4:6].isupper()):
        return True
    # Without the preamble, but with file meta information: its first element is the length of the group.
    if data[:8] == b"\x02\x00\x00\x00UL\x04\x00":
        return True
    # Without either, and without types of values: an element of group 8, with a short even length.
    length = int.from_bytes(data[4:8], "little")
    return data[:2] == b"\x08\x00" and data[2:4] in _FIRST_ELEMENTS and 0 < length <= 64 and length % 2 == 0


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
            _check_deflated(data)
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
            _correct_syntax(dataset)
            syntax = str(dataset.file_meta.TransferSyntaxUID)
            frame = first_frame(dataset) if syntax in _JPEG_8_BIT else None
            photometric = str(dataset.PhotometricInterpretation)
            width, height = int(dataset.Columns), int(dataset.Rows)
    except PhotoError:
        raise
    except Exception:
        # pydicom raises many types of errors on damaged files.
        raise PhotoError(Status.UNREADABLE, _DAMAGED) from None
    if frame is not None:
        frame = with_colours_said(frame, photometric)
        # DICOM defines the orientation; ignore EXIF data that a converter left in the JPEG.
        return DicomPhoto(facts, replace(read_header(frame), orientation=1), frame, None)
    check_size(width, height)
    return DicomPhoto(facts, PhotoHeader("DICOM", width, height, 1), None, dataset)


def _correct_syntax(dataset: Any) -> None:
    """Correct the syntax of an object that is called uncompressed, but contains a JPEG, or JPEG 2000 in a fragment."""
    from pydicom.encaps import encapsulate

    if dataset.file_meta.TransferSyntaxUID.is_compressed or not dataset.PixelData.startswith((_ITEM, b"\xff\xd8\xff")):
        return
    if not dataset.PixelData.startswith(_ITEM):
        dataset.PixelData = encapsulate([dataset.PixelData])
    start = first_frame(dataset)[:4]
    if start.startswith(b"\xff\xd8\xff"):
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
    elif start == b"\xff\x4f\xff\x51":
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90"
    dataset["PixelData"].is_undefined_length = True


def _check_deflated(data: bytes) -> None:
    """Raise if a deflated object expands beyond the limits of gzipped files: pydicom would expand it whole."""
    at = data.find(_DEFLATED, 132, 2048)
    length = data.find(b"\x02\x00\x00\x00UL", 132, 256)
    if at < 0 or length < 0:
        return
    # The group length of the file meta information says where the deflated dataset begins.
    start = length + 12 + int.from_bytes(data[length + 8 : length + 12], "little")
    limit = expansion_limit(len(data))
    size, _ = inflated_length([data[start:]], wbits=-zlib.MAX_WBITS, limit=limit)
    if size > limit:
        raise PhotoError(Status.UNSUPPORTED, f"the file unpacks to more than {limit >> 20} MiB")


def _value(dataset: Any, name: str) -> Any:
    """Return a value of the header, or None if it is absent or invalid: a side fact must not cost the photo."""
    try:
        return dataset.get(name)
    except Exception:
        # pydicom converts values when they are read, and raises many types of errors.
        return None


def _text(dataset: Any, name: str) -> str:
    return str(_value(dataset, name) or "").strip()


def _number(dataset: Any, name: str) -> float | None:
    value = _value(dataset, name)
    try:
        return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
    except (TypeError, ValueError, IndexError):
        return None


def _judge_kind(dataset: Any) -> None:
    sop = _text(dataset, "SOPClassUID")
    if sop in _WIDE_FIELD:
        raise PhotoError(Status.NOT_FUNDUS, "wide-field image; a standard fundus photograph is required")
    if sop in _OCT or _text(dataset, "Modality") in ("OPT", "OPTENF", "OPTBSV"):
        raise PhotoError(Status.UNSUPPORTED, "OCT scan, not a photograph")
    field = _number(dataset, "HorizontalFieldOfView")
    if field is not None and field > _WIDEST_DEGREES:
        raise PhotoError(Status.NOT_FUNDUS, f"wide-field image ({field:g} degrees); 30 to 60 are standard")
    # pydicom keeps nothing of a file that ends within its compressed pixels.
    if "PixelData" not in dataset and ("Rows" in dataset or "SOPClassUID" not in dataset):
        raise PhotoError(Status.UNREADABLE, "the pixels are cut off or were removed; export it again")
    if "PixelData" not in dataset:
        raise PhotoError(Status.UNSUPPORTED, "DICOM file without an image")
    _complete(dataset)
    frames = int(_number(dataset, "NumberOfFrames") or 1)
    if frames > 1:
        raise PhotoError(
            Status.UNSUPPORTED, f"{frames} frames (angiography, or a stereo pair); export one colour photo per file"
        )
    samples = _number(dataset, "SamplesPerPixel") or 1
    if samples != 3 and _text(dataset, "PhotometricInterpretation") != "PALETTE COLOR":
        if samples != 1:
            raise PhotoError(Status.UNSUPPORTED, f"{samples:g} channels; a colour fundus photograph has three")
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")


def _complete(dataset: Any) -> None:
    """Fill in what exports leave out, where only one value makes sense for a colour photo."""
    photometric = _text(dataset, "PhotometricInterpretation").upper()
    samples = _number(dataset, "SamplesPerPixel")
    if samples is None and (photometric.startswith(("RGB", "YBR")) or not photometric):
        samples = dataset.SamplesPerPixel = 3
    if samples == 3:
        dataset.PhotometricInterpretation = photometric or "RGB"
    allocated = int(_number(dataset, "BitsAllocated") or 8)
    stored = int(_number(dataset, "BitsStored") or allocated)
    # Samples may be stored at the upper end of their words: then the lowest bits are zeros.
    stored = max(stored, int(_number(dataset, "HighBit") or 0) + 1)
    dataset.BitsAllocated, dataset.BitsStored = allocated, min(stored, allocated)
    dataset.HighBit = dataset.BitsStored - 1
    for name in ("PlanarConfiguration", "PixelRepresentation"):
        if _number(dataset, name) is None:
            setattr(dataset, name, 0)


def _facts(dataset: Any) -> PhotoFacts:
    names = [_text(dataset, name) for name in ("Manufacturer", "ManufacturerModelName")]
    spacing = _number(dataset, "PixelSpacing") or _number(dataset, "ImagerPixelSpacing")
    return PhotoFacts(
        patient=_patient(dataset),
        eye=_eye(dataset),
        camera=" ".join(name for name in names if name) or None,
        # The standard puts row spacing first; fundus cameras have square pixels.
        pixel_spacing_mm=spacing if spacing and spacing > 0 else None,
    )


def _patient(dataset: Any) -> str | None:
    """Return the patient identifier, with its issuer if there is one: two hospitals use the same numbers."""
    patient, issuer = _text(dataset, "PatientID"), _text(dataset, "IssuerOfPatientID")
    if not isinstance(_value(dataset, "PatientID") or "", str):
        # Several values: nobody knows which.
        return None
    for item in _items(dataset, "IssuerOfPatientIDQualifiersSequence"):
        issuer = issuer or _text(item, "UniversalEntityID")
    if not patient or is_placeholder(patient, zeros=True):
        return None
    return f"{issuer}/{patient}" if issuer else patient


def _eye(dataset: Any) -> str | None:
    """Return the eye from every place that the standard has for it; None if they disagree."""
    found = {normal_eye(_text(dataset, name)) for name in ("ImageLaterality", "Laterality", "FrameLaterality")}
    for groups in (
        _items(dataset, "SharedFunctionalGroupsSequence"),
        _items(dataset, "PerFrameFunctionalGroupsSequence"),
    ):
        for item in groups[:1]:
            for anatomy in _items(item, "FrameAnatomySequence"):
                found.add(normal_eye(_text(anatomy, "FrameLaterality")))
    for region in (*_items(dataset, "AnatomicRegionSequence"), *_items(dataset, "PrimaryAnatomicStructureSequence")):
        found.add(_REGION_CODES.get(_text(region, "CodeValue")))
        for name in ("AnatomicRegionModifierSequence", "PrimaryAnatomicStructureModifierSequence"):
            for modifier in _items(region, name):
                found.add(_EYE_CODES.get(_text(modifier, "CodeValue")))
    found -= {None}
    return found.pop() if len(found) == 1 else None


def _items(dataset: Any, name: str) -> list[Any]:
    value = _value(dataset, name)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
