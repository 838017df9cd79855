"""Drawing of one photo: reflectance of the retina, blood, camera optics, and the ground truth.

The image is kept as three float32 planes, because OpenCV's arithmetic on a plane runs at memory speed. Smooth
components are computed on a grid eight times coarser and enlarged.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import ConfigError, close_matches
from fastfundus.records import FieldCircle
from fastfundus.synthetic.anatomy import Eye, Vessels, draw_eye, grow_vessels
from fastfundus.synthetic.optics import CAMERAS, QUALITIES, Camera, Plane, illumination, place_field, sensor_noise
from fastfundus.synthetic.pathology import DISEASED_CUP_RATIO, LESIONS, Canvas, draw_lesions

__all__ = ["SyntheticPhoto", "draw_photo"]

_COARSE = 8
# Share of R, G and B that blood absorbs where it covers the retina; haemoglobin absorbs green most.
_BLOOD = (0.34, 0.68, 0.56)
_ARTERY = 0.72
_SPOT_COLOURS = {"exudates": (1.02, 0.86, 0.38), "drusen": (0.98, 0.74, 0.42)}
_SPOT_OPACITY = {"exudates": 0.88, "drusen": 0.52}


@dataclass(frozen=True, slots=True)
class SyntheticPhoto:
    """A photo and its ground truth. Masks are uint8 [H, W], 0 or 255."""

    image: NDArray[np.uint8]
    """uint8 [H, W, 3] RGB."""
    eye: str
    """"L" or "R"."""
    lesions: tuple[str, ...]
    """Lesions present, in the order of `LESIONS`; empty means normal."""
    quality: str
    """One of `QUALITIES`."""
    camera: str
    field: FieldCircle
    vessel_mask: NDArray[np.uint8]
    disc_mask: NDArray[np.uint8]
    cup_mask: NDArray[np.uint8]
    lesion_masks: dict[str, NDArray[np.uint8]]


def draw_photo(
    seed: int,
    *,
    patient_seed: int | None = None,
    eye: str = "R",
    lesions: Collection[str] = (),
    camera: Camera = CAMERAS[0],
    quality: str = "good",
    long_side: int = 1024,
) -> SyntheticPhoto:
    """Draw one fundus photograph.

    Args:
        seed: Seed of everything specific to this photo; equal arguments give identical bytes.
        patient_seed: Seed of everything that the eyes of one patient share; defaults to `seed`.
        eye: "L" or "R".
        lesions: Lesions from `LESIONS`; empty draws a normal eye.
        camera: One of `CAMERAS`, or a custom camera.
        quality: One of `QUALITIES`.
        long_side: Width of the frame in pixels, 64 to 8192.

    Raises:
        ConfigError: An argument is outside its allowed values.
    """
    for name, value, allowed in [("eye", eye, ("L", "R")), ("quality", quality, QUALITIES)]:
        if value not in allowed:
            raise ConfigError(f"synthetic {name} {value!r} is unknown{close_matches(value, allowed)}")
    for kind in lesions:
        if kind not in LESIONS:
            raise ConfigError(f"synthetic lesion {kind!r} is unknown{close_matches(kind, LESIONS)}")
    if not 64 <= long_side <= 8192:
        raise ConfigError(f"synthetic long_side must be 64 to 8192 pixels, got {long_side}")

    kinds = tuple(kind for kind in LESIONS if kind in lesions)
    patient_rng = np.random.default_rng([seed if patient_seed is None else patient_seed, 1])
    rng = np.random.default_rng([seed, 2])
    anatomy = draw_eye(patient_rng, rng, eye)
    if "cupping" in kinds:
        anatomy = replace(anatomy, cup_ratio=float(rng.uniform(*DISEASED_CUP_RATIO)))
    height, width, circle = place_field(camera, long_side, rng)
    canvas = Canvas(height, width, circle.x_px, circle.y_px, circle.radius_px)

    planes = _background(canvas, anatomy, rng)
    disc_mask, cup_mask = _paint_disc(planes, canvas, anatomy, rng)
    spots = draw_lesions(canvas, anatomy, kinds, rng)
    for kind, coverage in spots.items():
        if kind in _SPOT_COLOURS:
            _blend(planes, coverage, _SPOT_COLOURS[kind], _SPOT_OPACITY[kind])
    blood, vessel_mask = _vessel_coverage(canvas, grow_vessels(anatomy, rng))
    if "haemorrhages" in spots:
        blood = np.maximum(blood, spots["haemorrhages"])
    for plane, absorbed in zip(planes, _BLOOD, strict=True):
        factor = cv2.LUT(blood, (1 - absorbed / 255 * np.arange(256)).astype(np.float32))
        cv2.multiply(plane, factor, plane)
    image, visible = _photograph(planes, canvas, camera, quality, rng)

    hidden = visible < 128
    masks = [vessel_mask, disc_mask, cup_mask, *((spot > 127).astype(np.uint8) * 255 for spot in spots.values())]
    for mask in masks:
        mask[hidden] = 0
    if "cupping" in kinds:
        masks.append(masks[2].copy())
    lesion_masks = dict(zip([*spots, *(["cupping"] if "cupping" in kinds else [])], masks[3:], strict=True))
    return SyntheticPhoto(
        image, eye, kinds, quality, camera.name, circle, vessel_mask, disc_mask, cup_mask, lesion_masks
    )


def _coarse_grid(canvas: Canvas) -> tuple[Plane, Plane]:
    """Return field positions at the centres of coarse cells, so that enlarging restores their positions."""
    rows, columns = -(-canvas.height // _COARSE), -(-canvas.width // _COARSE)
    x_px = (np.arange(columns, dtype=np.float32) + 0.5) * canvas.width / columns
    y_px = (np.arange(rows, dtype=np.float32) + 0.5) * canvas.height / rows
    x, y = np.meshgrid((x_px - canvas.x_px) / canvas.radius_px, (y_px - canvas.y_px) / canvas.radius_px)
    return x.astype(np.float32), y.astype(np.float32)


def _enlarge(plane: Plane, canvas: Canvas) -> Plane:
    return cv2.resize(plane, (canvas.width, canvas.height), interpolation=cv2.INTER_LINEAR)


def _clouds(shape: tuple[int, int], cells: list[int], rng: np.random.Generator) -> Plane:
    """Return smooth noise whose first octave has unit variance.

    It is the sum of enlarged random grids, `cells` across.
    """
    total = np.zeros(shape, np.float32)
    for index, count in enumerate(cells):
        grid = rng.standard_normal((count, count), dtype=np.float32)
        total += cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC) * np.float32(0.7**index)
    return total


def _background(canvas: Canvas, eye: Eye, rng: np.random.Generator) -> list[Plane]:
    """Draw retina, choroid and macula as three planes of reflectance."""
    x, y = _coarse_grid(canvas)
    fair = 1 - eye.pigment
    mottle = _clouds(x.shape, [5, 9, 17, 33], rng) * np.float32(0.030)
    # Choroidal vessels show through in fair eyes as pale bands, drawn as ridges of smooth noise.
    bands = _clouds(x.shape, [10, 20], rng)
    choroid = np.float32(0.10 * fair**2) * (np.exp(-6 * bands * bands) - np.float32(0.35))
    to_fovea = ((x - eye.fovea[0]) ** 2 + (y - eye.fovea[1]) ** 2).astype(np.float32)
    macula = np.exp(-to_fovea / np.float32(2 * 0.13**2)) * np.float32(rng.uniform(0.22, 0.36))
    pit = np.exp(-to_fovea / np.float32(2 * 0.035**2)) * np.float32(0.14)
    to_disc = ((x - eye.disc[0]) ** 2 + (y - eye.disc[1]) ** 2).astype(np.float32)
    glow = np.exp(-to_disc / np.float32(2 * 0.22**2)) * np.float32(0.10)
    planes = []
    for channel, (level, depth, shine) in enumerate(zip(eye.colour, (0.8, 1.0, 1.15), (0.4, 1.0, 0.9), strict=True)):
        relief = 1 + mottle + choroid * (1.0, 1.3, 1.5)[channel] - (macula + pit) * np.float32(depth) + glow * shine
        planes.append(_enlarge((np.float32(level) * relief).astype(np.float32), canvas))
    return planes


def _paint_disc(
    planes: list[Plane], canvas: Canvas, eye: Eye, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Paint the rim and the cup of the disc; return the masks of disc and cup."""
    disc, cup = canvas.blank(), canvas.blank()
    centre = canvas.points(eye.disc)
    tilt = float(rng.normal(0, 8))
    # The cup is slightly to the temporal side of the disc's centre.
    slack = eye.disc_radii * (1 - eye.cup_ratio)
    cup_centre = canvas.points(eye.disc + np.array([-eye.nasal * 0.25 * slack[0], rng.normal(0, 0.1) * slack[1]]))
    for mask, middle, radii in [(disc, centre, eye.disc_radii), (cup, cup_centre, eye.disc_radii * eye.cup_ratio)]:
        axes = np.round(radii * canvas.radius_px * 16).astype(int)
        cv2.ellipse(mask, middle.tolist(), axes.tolist(), tilt, 0, 360, 255, -1, cv2.LINE_AA, shift=4)
    soft = max(0.5, 0.010 * canvas.radius_px)
    rim = np.array([0.98, 0.68, 0.42]) * (0.92 + 0.16 * (1 - eye.pigment)) * rng.uniform(0.94, 1.04)
    pallor = np.array([1.06, 0.93, 0.72]) * rng.uniform(0.95, 1.05)
    _blend(planes, cv2.GaussianBlur(disc, (0, 0), soft), tuple(rim), 0.88)
    _blend(planes, cv2.GaussianBlur(cup, (0, 0), soft * 0.9), tuple(pallor), 0.85)
    return (disc > 127).astype(np.uint8) * 255, (cup > 127).astype(np.uint8) * 255


def _blend(planes: list[Plane], coverage: NDArray[np.uint8], colour: tuple[float, ...], opacity: float) -> None:
    """Blend the covered part of the planes with a colour, within its bounding box."""
    x, y, width, height = cv2.boundingRect(coverage)
    if not width:
        return
    box = np.s_[y : y + height, x : x + width]
    alpha = coverage[box].astype(np.float32) * np.float32(opacity / 255)
    for plane, level in zip(planes, colour, strict=True):
        plane[box] += alpha * (np.float32(level) - plane[box])


def _vessel_coverage(canvas: Canvas, vessels: Vessels) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw the vessel tree as blood coverage, thin vessels first so that thick ones cover them.

    Returns:
        The coverage (255 = opaque vein), and the mask of vessels at least one and a half pixels wide.
    """
    coverage, mask = canvas.blank(), canvas.blank()
    width_px = vessels.width * canvas.radius_px
    segments = np.stack([canvas.points(vessels.start), canvas.points(vessels.end)], axis=1)
    thickness = np.maximum(1, np.round(width_px)).astype(int)
    for size in np.unique(thickness):
        for is_vein in (False, True):
            chosen = (thickness == size) & (vessels.vein == is_vein)
            if not chosen.any():
                continue
            # A vessel thinner than a pixel darkens that pixel proportionally.
            opacity = min(1.0, 0.35 + 0.65 * float(width_px[chosen].mean()) / max(6.0, 0.02 * canvas.radius_px))
            level = round(255 * (1.0 if is_vein else _ARTERY) * opacity)
            cv2.polylines(coverage, list(segments[chosen]), False, level, int(size), cv2.LINE_AA, shift=4)
            if size >= 2:
                cv2.polylines(mask, list(segments[chosen]), False, 255, int(size), cv2.LINE_8, shift=4)
    return cv2.GaussianBlur(coverage, (0, 0), max(0.5, 0.0022 * canvas.radius_px)), mask


def _photograph(
    planes: list[Plane], canvas: Canvas, camera: Camera, quality: str, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Illuminate the retina, cut the field out of the frame, blur, and add grain.

    Returns:
        The image, uint8 [H, W, 3] RGB; and the visible field, uint8 [H, W], 0 to 255.
    """
    x, y = _coarse_grid(canvas)
    light = illumination(x, y, camera, rng)
    blur = camera.blur
    if quality == "dark":
        light *= np.float32(rng.uniform(0.08, 0.16))
    elif quality == "blur":
        blur = rng.uniform(0.042, 0.060)
    visible = canvas.blank()
    centre = canvas.points(np.zeros(2)).tolist()
    cv2.circle(visible, centre, round(canvas.radius_px * 16), 255, -1, cv2.LINE_AA, shift=4)
    if camera.notch:
        notch = canvas.points(np.array([0.715, -0.715])).tolist()
        cv2.circle(visible, notch, round(0.045 * canvas.radius_px * 16), 255, -1, cv2.LINE_AA, shift=4)
    if quality == "cut":
        _cut_field(visible, canvas, rng)
    sigma = blur * canvas.radius_px
    gain = np.array(camera.gain) * (1 + rng.normal(0, 0.02, 3))
    lit = _enlarge(light * np.float32(248), canvas)
    cv2.multiply(lit, cv2.GaussianBlur(visible, (0, 0), max(0.6, 0.002 * canvas.radius_px)), lit, 1 / 255, cv2.CV_32F)
    grain = sensor_noise(canvas.height, canvas.width, camera.noise, rng)
    channels = []
    for plane, factor, speckle in zip(planes, gain, grain, strict=True):
        plane = cv2.GaussianBlur(plane, (0, 0), sigma) if sigma > 0.35 else plane
        cv2.multiply(plane, lit, plane, float(factor))
        cv2.add(plane, cv2.multiply(speckle, visible, scale=0.9 / 255, dtype=cv2.CV_32F), plane)
        channels.append(cv2.add(plane, 2.5, dtype=cv2.CV_8U))
    return cv2.merge(channels), visible


def _cut_field(visible: NDArray[np.uint8], canvas: Canvas, rng: np.random.Generator) -> None:
    """Hide a crescent, as eyelids, lashes or a small pupil do: about half of the field becomes dark."""
    angle = rng.uniform(0, 2 * np.pi)
    away = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(1.10, 1.30)
    lid = canvas.blank()
    cv2.circle(lid, canvas.points(away).tolist(), round(1.42 * canvas.radius_px * 16), 255, -1, cv2.LINE_AA, shift=4)
    visible[:] = cv2.subtract(visible, cv2.GaussianBlur(lid, (0, 0), max(0.6, 0.02 * canvas.radius_px)))
