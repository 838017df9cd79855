"""Tests of DICOM files: colours and layouts against the original pixels, metadata, and rejections with their
reasons."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import convert_color_space
from pydicom.uid import (
    MPEG2MPML,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    OphthalmicPhotography8BitImageStorage,
    OphthalmicTomographyImageStorage,
    RLELossless,
    WideFieldOphthalmicPhotographyStereographicProjectionImageStorage,
)

from fastfundus.errors import PhotoError
from fastfundus.photo import prepare_photo
from fastfundus.photo.decode_plan import plan_decode
from fastfundus.photo.dicom import is_dicom, read_dicom
from fastfundus.photo.dicom_pixels import first_frame
from fastfundus.photo.prepare import decode_at, prepare_bytes
from fastfundus.records import PhotoFacts, Status
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo

SPEC = PreprocessSpec(size=224)
EXPLICIT = pydicom.uid.ExplicitVRLittleEndian


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return draw_photo(3, lesions=("exudates",), long_side=400).image[20:380]


def dicom(pixels: bytes, syntax: str = EXPLICIT, **elements: Any) -> bytes:
    """Build an Ophthalmic Photography file; elements given as None are omitted."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = OphthalmicPhotography8BitImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": OphthalmicPhotography8BitImageStorage,
        "SOPInstanceUID": "1.2.3",
        "Modality": "OP",
        "PatientID": "P-007",
        "ImageLaterality": "L",
        "Manufacturer": "Maker",
        "ManufacturerModelName": "Model 1",
        "PixelSpacing": [0.01, 0.01],
        "Rows": 360,
        "Columns": 400,
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": encapsulate([pixels]) if pydicom.uid.UID(syntax).is_compressed else pixels,
    }
    for name, value in {**values, **elements}.items():
        if value is not None:
            setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def picture(rgb: np.ndarray, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return file.getvalue()


def read(data: bytes) -> np.ndarray:
    assert is_dicom(data)
    return decode_at(data, 0)


def test_rgb_by_pixel_and_by_plane(rgb: np.ndarray) -> None:
    np.testing.assert_array_equal(read(dicom(rgb.tobytes())), rgb)
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    np.testing.assert_array_equal(read(dicom(planes.tobytes(), PlanarConfiguration=1)), rgb)


@pytest.mark.parametrize("syntax", [pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.DeflatedExplicitVRLittleEndian])
def test_other_uncompressed_syntaxes(rgb: np.ndarray, syntax: str) -> None:
    np.testing.assert_array_equal(read(dicom(rgb.tobytes(), syntax)), rgb)


def test_a_file_without_preamble(rgb: np.ndarray) -> None:
    whole = dicom(rgb.tobytes())
    dataset = pydicom.dcmread(io.BytesIO(whole))
    file = io.BytesIO()
    pydicom.dcmwrite(file, pydicom.Dataset(dataset), implicit_vr=False, little_endian=True)
    assert file.getvalue()[128:132] != b"DICM"
    np.testing.assert_array_equal(read(file.getvalue()), rgb)


def test_ybr_full_and_422(rgb: np.ndarray) -> None:
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL")
    got = read(dicom(ybr.tobytes(), PhotometricInterpretation="YBR_FULL"))
    # Conversion to 8-bit YCbCr and back rounds at each step.
    assert np.abs(got.astype(int) - rgb).max() <= 2
    halved = ybr.reshape(360, 200, 2, 3)
    stored = np.stack([halved[:, :, 0, 0], halved[:, :, 1, 0], halved[:, :, 0, 1], halved[:, :, 0, 2]], axis=-1).astype(
        np.uint8
    )
    got = read(dicom(stored.tobytes(), PhotometricInterpretation="YBR_FULL_422"))
    assert np.abs(got.astype(int) - rgb).mean() < 1.5


def test_run_length(rgb: np.ndarray) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(rgb.tobytes())))
    dataset.compress(RLELossless)
    file = io.BytesIO()
    dataset.save_as(file)
    np.testing.assert_array_equal(read(file.getvalue()), rgb)


def test_jpeg_is_taken_out_and_decoded_scaled(rgb: np.ndarray) -> None:
    jpeg = picture(rgb, "JPEG", quality=92)
    data = dicom(jpeg, JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422")
    np.testing.assert_array_equal(read(data), decode_at(jpeg, 0))
    photo = read_dicom(data)
    assert photo.decode(plan_decode(photo.header, 90)).shape == (90, 100, 3)


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL_422"])
def test_a_jpeg_that_says_what_it_is_is_believed(rgb: np.ndarray, said: str) -> None:
    """Some exports write RGB into the header of YCbCr images; trusting it would turn retinas green."""
    jpeg = picture(rgb, "JPEG", quality=92)
    assert b"JFIF" in jpeg
    got = read(dicom(jpeg, JPEGBaseline8Bit, PhotometricInterpretation=said))
    np.testing.assert_array_equal(got, decode_at(jpeg, 0))


def test_a_jpeg_of_rgb_components_that_only_dicom_names(rgb: np.ndarray) -> None:
    # R, G and B components without any segment that identifies them.
    file = io.BytesIO()
    Image.fromarray(rgb, "RGB").save(file, "JPEG", quality=95, subsampling=0, keep_rgb=True)
    data = file.getvalue()
    at = data.index(b"\xff\xee")
    data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    # Component ids are numbers instead of the letters R, G, B, so that decoders cannot identify them either.
    for name, number in ((b"R", 1), (b"G", 2), (b"B", 3)):
        frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
        data = (
            data[:frame] + data[frame : frame + 19].replace(name, bytes([number])) + data[frame + 19 : scan]
            + data[scan : scan + 14].replace(name, bytes([number])) + data[scan + 14 :]
        )  # fmt: skip
    got = read(dicom(data, JPEGBaseline8Bit, PhotometricInterpretation="RGB"))
    assert np.abs(got.astype(int) - rgb).mean() < 2


def test_jpeg_2000(rgb: np.ndarray) -> None:
    code = picture(rgb, "JPEG2000", irreversible=False, no_jp2=True)
    got = read(dicom(code, JPEG2000Lossless, PhotometricInterpretation="RGB"))
    np.testing.assert_array_equal(got, rgb)


@pytest.mark.parametrize("bits", [12, 16])
def test_deep_samples_map_full_scale_to_full_scale(rgb: np.ndarray, bits: int) -> None:
    deep = (rgb.astype(np.uint32) * (2**bits - 1) // 255).astype("<u2")
    got = read(dicom(deep.tobytes(), BitsAllocated=16, BitsStored=bits, HighBit=bits - 1))
    assert np.abs(got.astype(int) - rgb).max() <= 1


def test_palette(rgb: np.ndarray) -> None:
    indexed = Image.fromarray(rgb).quantize(256)
    palette = np.array(indexed.getpalette(), np.uint16).reshape(-1, 3)
    palette = np.pad(palette, ((0, 256 - len(palette)), (0, 0))) * 257
    tables = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = palette[:, channel].astype("<u2").tobytes()
    data = dicom(
        np.array(indexed).tobytes(),
        SamplesPerPixel=1,
        PlanarConfiguration=None,
        PhotometricInterpretation="PALETTE COLOR",
        **tables,
    )
    np.testing.assert_array_equal(read(data), np.array(indexed.convert("RGB")))


def test_facts(rgb: np.ndarray) -> None:
    assert read_dicom(dicom(rgb.tobytes())).facts == PhotoFacts("P-007", "L", "Maker Model 1", 0.01)
    plain = dicom(
        rgb.tobytes(), PatientID="", ImageLaterality=None, Laterality="R", Manufacturer=None,
        ManufacturerModelName=None, PixelSpacing=None,
    )  # fmt: skip
    assert read_dicom(plain).facts == PhotoFacts(None, "R", None, None)
    assert read_dicom(dicom(rgb.tobytes(), ImageLaterality="B")).facts.eye is None


REFUSED: dict[str, tuple[dict[str, Any], Status, str]] = {
    "wide-field": (
        {"SOPClassUID": WideFieldOphthalmicPhotographyStereographicProjectionImageStorage},
        Status.NOT_FUNDUS,
        "wide-field image",
    ),
    "wide angle": ({"HorizontalFieldOfView": 200.0}, Status.NOT_FUNDUS, "wide-field image .200 degrees"),
    "oct": ({"SOPClassUID": OphthalmicTomographyImageStorage}, Status.UNSUPPORTED, "OCT scan"),
    "oct by modality": ({"Modality": "OPT"}, Status.UNSUPPORTED, "OCT scan"),
    "angiography": (
        {"NumberOfFrames": 12, "SOPClassUID": MultiFrameTrueColorSecondaryCaptureImageStorage},
        Status.UNSUPPORTED,
        "12 frames",
    ),
    "grey": (
        {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PlanarConfiguration": None},
        Status.UNSUPPORTED,
        "greyscale image",
    ),
    "no pixels": ({"PixelData": None}, Status.UNREADABLE, "cut off or were removed"),
    "no picture": ({"PixelData": None, "Rows": None}, Status.UNSUPPORTED, "without an image"),
    "huge": ({"Rows": 60000, "Columns": 60000}, Status.UNSUPPORTED, "at most 150,000,000"),
    "tiny": ({"Rows": 20, "Columns": 20}, Status.UNSUPPORTED, "at least 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(rgb: np.ndarray, name: str) -> None:
    elements, status, reason = REFUSED[name]
    with pytest.raises(PhotoError, match=reason) as caught:
        read_dicom(dicom(rgb.tobytes(), **elements))
    assert caught.value.status is status


def test_an_unknown_compression_is_unsupported(rgb: np.ndarray) -> None:
    result = prepare_bytes(dicom(b"\0" * 5000, MPEG2MPML), SPEC)
    assert result.status is Status.UNSUPPORTED
    assert "unsupported compression (MPEG2" in result.reason
    # The metadata is still known.
    assert result.facts.patient == "P-007"


def compressed(rgb: np.ndarray, folder: Path, syntax: str) -> bytes:
    gdcm = pytest.importorskip("gdcm")
    (folder / "plain.dcm").write_bytes(dicom(rgb.tobytes()))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "compressed.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "compressed.dcm").read_bytes()


@pytest.mark.parametrize("syntax", ["JPEGLSLossless", "JPEGLosslessProcess14_1", "JPEGLosslessProcess14"])
def test_lossless_compressions_of_archives_are_exact(rgb: np.ndarray, tmp_path: Path, syntax: str) -> None:
    data = compressed(rgb, tmp_path, syntax)
    np.testing.assert_array_equal(read_dicom(data).decode(None), rgb)
    cut = prepare_bytes(data[: len(data) // 2], SPEC)
    assert cut.status is Status.UNREADABLE
    assert re.fullmatch("the (pixels are cut off|image is damaged).*export it again", cut.reason)


@pytest.mark.parametrize("syntax", ["JPEGLSLossless", "JPEGLosslessProcess14_1"])
def test_damage_of_lossless_compression_is_noticed(rgb: np.ndarray, tmp_path: Path, syntax: str) -> None:
    data = compressed(rgb, tmp_path, syntax)
    frame = first_frame(pydicom.dcmread(io.BytesIO(data)))
    start, generator = data.index(frame[:60]), np.random.default_rng(0)
    scored = 0
    for _ in range(30):
        at = start + int(generator.integers(400, len(frame) - 400))
        junk = generator.integers(0, 256, 64).astype(np.uint8).tobytes()
        result = prepare_bytes(data[:at] + junk + data[at + 64 :], SPEC)
        scored += result.status is not Status.UNREADABLE
    # Junk may consist of valid codes for as many pixels: lossless JPEG has no checksum.
    assert scored <= 3


def test_high_throughput_jpeg_2000(tmp_path: Path) -> None:
    """Drawn, and encoded by OpenJPH through imagecodecs 2026.3.6, because nothing installed here can encode it."""
    frame = (Path(__file__).parent / "files" / "drawn.htj2k").read_bytes()
    drawn = draw_photo(3, lesions=("exudates",), long_side=512).image
    expected = cv2.resize(drawn, (64, 64), interpolation=cv2.INTER_AREA)
    data = dicom(frame, "1.2.840.10008.1.2.4.201", Rows=64, Columns=64, PhotometricInterpretation="YBR_RCT")
    # OpenCV's area interpolation may round otherwise on another processor.
    assert np.abs(read_dicom(data).decode(None).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("stored", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("said", ["RGB", "YBR_FULL", "YBR_FULL_422"])
def test_black_surroundings_tell_rgb_from_ybr(rgb: np.ndarray, stored: str, said: str) -> None:
    """Templates of exports state one of them for both kinds of photos."""
    samples = rgb if stored == "RGB" else convert_color_space(rgb, "RGB", "YBR_FULL")
    decoded = read_dicom(dicom(samples.tobytes(), PhotometricInterpretation=said)).decode(None)
    assert int(np.abs(decoded.astype(int) - rgb).max()) <= (0 if stored == "RGB" else 2)


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL"])
def test_without_black_surroundings_the_header_is_believed(rgb: np.ndarray, said: str) -> None:
    inner = np.maximum(rgb, 40)
    samples = inner if said == "RGB" else convert_color_space(inner, "RGB", "YBR_FULL")
    decoded = read_dicom(dicom(samples.tobytes(), PhotometricInterpretation=said)).decode(None)
    assert int(np.abs(decoded.astype(int) - inner).max()) <= 2


def test_subsampled_ybr_without_compression(rgb: np.ndarray) -> None:
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL").astype(int)
    chroma = (ybr[:, 0::2, 1:] + ybr[:, 1::2, 1:]) // 2
    samples = np.dstack([ybr[:, 0::2, 0], ybr[:, 1::2, 0], chroma]).astype(np.uint8)
    decoded = read_dicom(dicom(samples.tobytes(), PhotometricInterpretation="YBR_FULL_422")).decode(None)
    # Two neighbours share a colour.
    assert float(np.abs(decoded.astype(int) - rgb).mean()) < 1


@pytest.mark.parametrize(("depth", "high"), [(12, 15), (10, 15), (12, 13)])
def test_samples_at_the_upper_end_of_their_words(rgb: np.ndarray, depth: int, high: int) -> None:
    samples = (rgb.astype(np.uint32) * (2**depth - 1) // 255) << (high + 1 - depth)
    data = dicom(samples.astype("<u2").tobytes(), BitsAllocated=16, BitsStored=depth, HighBit=high)
    assert int(np.abs(read_dicom(data).decode(None).astype(int) - rgb).max()) <= 1


@pytest.mark.parametrize(
    ("bits", "factor", "said"), [(8, 1, 8), (16, 257, 16), (16, 256, 16), (16, 1, 16), (16, 1, 8), (8, 1, 16)]
)
def test_palettes_of_8_and_16_bits(rgb: np.ndarray, bits: int, factor: int, said: int) -> None:
    reduced = Image.fromarray(rgb).quantize(256)
    table = np.array(reduced.getpalette(), int).reshape(-1, 3)
    elements: dict[str, Any] = {"SamplesPerPixel": 1, "PhotometricInterpretation": "PALETTE COLOR"}
    for index, colour in enumerate(("Red", "Green", "Blue")):
        values = (np.pad(table[:, index], (0, 256 - len(table))) * factor).astype(f"<u{bits // 8}")
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, said]
        elements[f"{colour}PaletteColorLookupTableData"] = values.tobytes()
    decoded = read_dicom(dicom(np.array(reduced).tobytes(), PlanarConfiguration=None, **elements)).decode(None)
    assert int(np.abs(decoded.astype(int) - table[np.array(reduced)]).max()) <= 1


def test_signed_colours_are_colours(rgb: np.ndarray) -> None:
    """Templates of exports set PixelRepresentation 1 in colour objects."""
    np.testing.assert_array_equal(read_dicom(dicom(rgb.tobytes(), PixelRepresentation=1)).decode(None), rgb)


def j2k(rgb: np.ndarray, *, transform: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG2000", irreversible=False, mct=int(transform), no_jp2=True)
    return file.getvalue()


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL", "YBR_RCT"])
def test_a_codestream_with_its_own_transform_is_rgb_whatever_the_header_says(rgb: np.ndarray, said: str) -> None:
    data = dicom(j2k(rgb, transform=True), JPEG2000Lossless, PhotometricInterpretation=said)
    np.testing.assert_array_equal(read_dicom(data).decode(None), rgb)


def test_a_codestream_without_a_transform_has_the_colours_that_the_header_says(rgb: np.ndarray) -> None:
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL")
    data = dicom(j2k(ybr, transform=False), JPEG2000Lossless, PhotometricInterpretation="YBR_FULL")
    # Rounding to YCbCr and back moves a channel by up to two grey levels.
    assert int(np.abs(read_dicom(data).decode(None).astype(int) - rgb).max()) <= 2


@pytest.mark.parametrize(("depth", "said"), [(12, 16), (12, 12), (10, 16), (16, 16), (8, 16), (8, 12)])
def test_bits_that_were_used_decide_the_range(rgb: np.ndarray, depth: int, said: int) -> None:
    samples = (rgb.astype(np.uint32) * (2**depth - 1) // 255).astype("<u2")
    samples[178:182, 198:202] = 2**depth - 1  # a highlight, as every flash photo has one
    samples[180, 200] = 2**said - 1  # a hot pixel
    data = dicom(samples.tobytes(), BitsAllocated=16, BitsStored=said, HighBit=said - 1)
    decoded = read_dicom(data).decode(None).astype(int)
    decoded[178:182, 198:202] = rgb[178:182, 198:202]
    assert int(np.abs(decoded - rgb).max()) <= 1


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("PixelSpacing", b"0,01\\0,01 "),
        ("HorizontalFieldOfView", b""),
        ("NumberOfFrames", b"1x"),
        ("PixelSpacing", b"x "),
    ],
)
def test_an_invalid_side_fact_costs_only_itself(rgb: np.ndarray, name: str, raw: bytes) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(rgb.tobytes())))
    tag = pydicom.datadict.tag_for_keyword(name)
    assert tag is not None
    vr = pydicom.datadict.dictionary_VR(tag)
    dataset[tag] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), vr, len(raw), raw, 0, False, True)
    file = io.BytesIO()
    dataset.save_as(file)
    result = prepare_bytes(file.getvalue(), SPEC)
    assert result.status is Status.OK
    if name == "PixelSpacing":
        assert result.facts.pixel_spacing_mm is None
    assert result.facts.eye == "L"


def sequence(**elements: object) -> pydicom.Sequence:
    item = pydicom.Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


LATERALITY = {
    "ImageLaterality": {"ImageLaterality": "R"},
    "Laterality": {"Laterality": "R"},
    "OD in Laterality": {"Laterality": "OD"},
    "FrameLaterality": {"SharedFunctionalGroupsSequence": sequence(FrameAnatomySequence=sequence(FrameLaterality="R"))},
    "SNOMED modifier": {
        "AnatomicRegionSequence": sequence(AnatomicRegionModifierSequence=sequence(CodeValue="24028007"))
    },
    "SRT modifier": {"AnatomicRegionSequence": sequence(AnatomicRegionModifierSequence=sequence(CodeValue="G-A100"))},
    "right eye as a region": {"AnatomicRegionSequence": sequence(CodeValue="1290041000")},
    "both places agree": {"ImageLaterality": "R", "Laterality": "R"},
}


@pytest.mark.parametrize("place", LATERALITY)
@pytest.mark.filterwarnings("ignore:The value length:UserWarning", "ignore:Invalid value for VR:UserWarning")
def test_laterality_from_every_place_of_the_standard(rgb: np.ndarray, place: str) -> None:
    elements = {"ImageLaterality": None, **LATERALITY[place]}
    assert read_dicom(dicom(rgb.tobytes(), **elements)).facts.eye == "R"


def test_contradictory_or_double_laterality_is_unknown(rgb: np.ndarray) -> None:
    assert read_dicom(dicom(rgb.tobytes(), Laterality="R")).facts.eye is None
    assert read_dicom(dicom(rgb.tobytes(), ImageLaterality="B")).facts.eye is None


def test_patients_have_an_issuer_and_placeholders_are_unknown(rgb: np.ndarray) -> None:
    def patient(**elements: str | list[str]) -> str | None:
        return read_dicom(dicom(rgb.tobytes(), **elements)).facts.patient

    assert patient(IssuerOfPatientID="North Hospital") == "North Hospital/P-007"
    for text in ("ANONYMIZED", "0", "000000", "Unknown", "", "anonymous^patient", "Anonymous^1", "Unknown Patient"):
        assert patient(PatientID=text) is None
    assert patient(PatientID="ANON0017") == "ANON0017"
    assert patient(PatientID=["P-007", "P-008"]) is None


@pytest.mark.parametrize(
    "elements",
    [
        {"PhotometricInterpretation": None},
        {"SamplesPerPixel": None},
        {"PlanarConfiguration": None},
        {"BitsStored": None, "HighBit": None},
        {"PixelRepresentation": None},
        {"BitsStored": 12},
        {"PhotometricInterpretation": "rgb"},
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")
def test_what_has_one_sensible_value_may_be_missing(rgb: np.ndarray, elements: dict[str, object]) -> None:
    np.testing.assert_array_equal(read_dicom(dicom(rgb.tobytes(), **elements)).decode(None), rgb)


def test_a_file_without_preamble_but_with_meta_information_is_read(rgb: np.ndarray) -> None:
    np.testing.assert_array_equal(read_dicom(dicom(rgb.tobytes())[132:]).decode(None), rgb)
    assert is_dicom(dicom(rgb.tobytes())[132:])


@pytest.mark.parametrize("element", ["Rows", "Columns"])
def test_a_missing_element_is_reported(rgb: np.ndarray, element: str) -> None:
    """Regression test; found by fuzzing."""
    result = prepare_bytes(dicom(rgb.tobytes(), **{element: None}), SPEC)
    assert result.status in (Status.UNREADABLE, Status.UNSUPPORTED)
    assert result.reason


@pytest.mark.parametrize("share", [0.0012, 0.01, 0.5, 0.999])
def test_a_cut_file_is_unreadable(rgb: np.ndarray, share: float) -> None:
    for data in (
        dicom(rgb.tobytes()),
        dicom(picture(rgb, "JPEG", quality=92), JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422"),
    ):
        result = prepare_bytes(data[: max(200, int(len(data) * share))], SPEC)
        assert result.status in (Status.UNREADABLE, Status.UNSUPPORTED)
        assert result.image is None


@pytest.mark.real_data
def test_real_files(real_data: Path) -> None:
    """An embedded JPEG equals the photo it was made from, apart from its own compression."""
    results = {path.name: prepare_photo(path, SPEC) for path in sorted((real_data / "dicom").glob("*.dcm"))}
    statuses = {name: result.status.value for name, result in results.items()}
    assert {name: value for name, value in statuses.items() if name.startswith("op_")} == {
        "op_jpegbaseline_ybr422_hrf01h.dcm": "ok",
        "op_rgb_explicitle_drive21.dcm": "ok",
    }
    assert set(statuses.values()) == {"ok", "not_fundus"}
    assert results["op_jpegbaseline_ybr422_hrf01h.dcm"].facts.eye == "L"
    photo = prepare_photo(real_data / "hrf" / "images" / "01_h.jpg", SPEC)
    assert photo.image is not None
    twin = results["op_jpegbaseline_ybr422_hrf01h.dcm"].image
    assert twin is not None
    assert np.abs(twin.astype(int) - photo.image).mean() < 2


def test_subsampled_colours_are_never_rgb(rgb: np.ndarray) -> None:
    """A JPEG without markers whose header says RGB: only YCbCr is subsampled."""
    file = picture(rgb, "JPEG", quality=92, subsampling=2)
    bare = file[:2] + file[file.index(b"\xff\xdb") :]
    data = dicom(bare, JPEGBaseline8Bit, PhotometricInterpretation="RGB")
    assert float(np.abs(read(data).astype(int) - rgb).mean()) < 2


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000Lossless])
def test_a_compressed_image_that_is_called_uncompressed(rgb: np.ndarray, syntax: str) -> None:
    frame = j2k(rgb, transform=True) if syntax == JPEG2000Lossless else picture(rgb, "JPEG", quality=95)
    data = dicom(frame, syntax).replace(
        syntax.encode() + b"\0" * (len(syntax) % 2), EXPLICIT.encode().ljust(len(syntax) + len(syntax) % 2, b"\0")
    )
    assert float(np.abs(read(data).astype(int) - rgb).mean()) < 2


def test_a_jpeg_in_place_of_uncompressed_pixels(rgb: np.ndarray) -> None:
    data = dicom(picture(rgb, "JPEG", quality=95))
    assert float(np.abs(read(data).astype(int) - rgb).mean()) < 2


def test_a_dataset_without_meta_information_in_implicit_form(rgb: np.ndarray) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(rgb.tobytes())))
    file = io.BytesIO()
    pydicom.dcmwrite(file, pydicom.Dataset(dataset), implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read(file.getvalue()), rgb)


def test_four_channels_are_not_called_grey(rgb: np.ndarray) -> None:
    data = dicom(np.dstack([rgb, rgb[..., :1]]).tobytes(), SamplesPerPixel=4, PhotometricInterpretation="ARGB")
    with pytest.raises(PhotoError, match="4 channels; a colour fundus photograph has three"):
        read_dicom(data)
