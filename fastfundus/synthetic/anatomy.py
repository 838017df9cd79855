"""The anatomy of one eye in field units: positions of disc and fovea, colour of the retina, and course of its vessels.

In field units, the retinal field is a circle of radius 1 around (0, 0); x points right and y down in the photo.
Proportions follow a 45 degree photo: the disc is about a seventh of the field wide, and the fovea is two and a half
disc diameters to its temporal side, slightly lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Eye", "Vessels", "draw_eye", "grow_vessels"]


@dataclass(frozen=True, slots=True)
class Eye:
    """One eye seen from one camera position, in field units."""

    nasal: float
    """+1 if the nose is on the right of the photo (right eye), -1 for a left eye."""
    disc: NDArray[np.float64]
    """[2], centre of the optic disc."""
    disc_radii: NDArray[np.float64]
    """[2], horizontal and vertical radius of the disc."""
    fovea: NDArray[np.float64]
    """[2], centre of the fovea."""
    colour: NDArray[np.float64]
    """[3], RGB reflectance of the retina, 0 to 1."""
    pigment: float
    """0 (fair, with visible choroid) to 1 (dark and even)."""
    cup_ratio: float
    """Vertical cup-to-disc ratio."""
    tortuosity: float
    """Tortuosity of the vessels, about 1."""


def draw_eye(patient_rng: np.random.Generator, photo_rng: np.random.Generator, eye: str) -> Eye:
    """Draw one eye; properties shared by both eyes come from the patient's generator.

    Args:
        patient_rng: Generator seeded by the patient, in the same state for both eyes.
        photo_rng: Generator seeded by the photo.
        eye: "L" or "R".
    """
    pigment = patient_rng.uniform()
    tortuosity = patient_rng.uniform(0.6, 1.5)
    disc_radius = patient_rng.normal(0.135, 0.009)
    cup_ratio = float(np.clip(patient_rng.normal(0.35, 0.07), 0.15, 0.5))
    tone = patient_rng.normal(0, 1, 3)

    nasal = 1.0 if eye == "R" else -1.0
    # The camera aims between the fovea (share 0) and the disc (share 1).
    aim = photo_rng.uniform(-0.05, 0.55)
    disc_from_fovea = np.array([nasal * photo_rng.normal(0.69, 0.03), photo_rng.normal(-0.07, 0.03)])
    fovea = -aim * disc_from_fovea + photo_rng.normal(0, 0.03, 2)
    fair = np.array([0.80, 0.46, 0.27])
    dark = np.array([0.60, 0.29, 0.12])
    colour = (1 - pigment) * fair + pigment * dark
    colour = colour * (1 + 0.05 * tone) * (1 + photo_rng.normal(0, 0.02, 3))
    return Eye(
        nasal=nasal,
        disc=fovea + disc_from_fovea,
        disc_radii=disc_radius * np.array([photo_rng.normal(0.93, 0.02), 1.0]),
        fovea=fovea,
        colour=colour,
        pigment=pigment,
        cup_ratio=float(np.clip(cup_ratio + photo_rng.normal(0, 0.02), 0.12, 0.52)),
        tortuosity=tortuosity,
    )


@dataclass(frozen=True, slots=True)
class Vessels:
    """A vessel tree as straight segments, in field units."""

    start: NDArray[np.float64]
    """[K, 2]"""
    end: NDArray[np.float64]
    """[K, 2]"""
    width: NDArray[np.float64]
    """[K], full width."""
    vein: NDArray[np.bool_]
    """[K]"""


# The trunks: angle from straight up, towards the temporal side (positive) or the nose (negative); direction, up or
# down; vein or artery; and width.
_TRUNK_ANGLES = np.radians([12, 34, 12, 34, -38, -60, -38, -60, -88])
_TRUNK_UP = np.array([1, 1, -1, -1, 1, 1, -1, -1, 1])
_TRUNK_VEIN = np.array([False, True, False, True, True, False, True, False, True])
_TRUNK_WIDTH = np.array([0.019, 0.026, 0.019, 0.026, 0.016, 0.013, 0.016, 0.013, 0.009])
_STEP = 0.034
_MAX_TIPS = 260


def grow_vessels(eye: Eye, rng: np.random.Generator) -> Vessels:
    """Grow arteries and veins from the disc, advancing all tips in parallel.

    Temporal trunks follow an ellipse around the fovea (the arcades), nasal ones run outward. Tips branch, taper, and
    stop at the edge of the field or outside the foveal avascular zone.
    """
    trunks = len(_TRUNK_UP)
    temporal = -eye.nasal
    angle = _TRUNK_ANGLES + rng.normal(0, 0.09, trunks)
    heading = np.stack([temporal * np.sin(angle), -_TRUNK_UP * np.cos(angle)], axis=1)
    position = eye.disc + rng.normal(0, 0.012, (trunks, 2)) + 0.02 * heading
    width = _TRUNK_WIDTH * rng.uniform(0.85, 1.12, trunks)
    vein = _TRUNK_VEIN.copy()
    # Only the four temporal trunks follow the arcades; branches wander.
    arcade = np.arange(trunks) < 4
    curl = rng.normal(0, 0.3, trunks)
    up = _TRUNK_UP.astype(float)
    pieces: list[tuple[NDArray[np.float64], ...]] = []
    arch = np.array([0.80, 0.50]) * rng.uniform(0.92, 1.1, 2)

    for step in range(75):
        if not len(position):
            break
        from_fovea = position - eye.fovea
        scaled = from_fovea / arch
        # Tangent of the ellipse through this point, running from the disc above (or below) the fovea.
        tangent = np.stack([scaled[:, 1] * arch[0], -scaled[:, 0] * arch[1]], axis=1) * (temporal * -up)[:, None]
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
        inward = -from_fovea / (np.linalg.norm(from_fovea, axis=1, keepdims=True) + 1e-9)
        distance = np.linalg.norm(scaled, axis=1)
        pull = np.clip(distance - 1.0, -0.5, 0.5)[:, None]
        arcade_aim = tangent + 1.3 * pull * inward
        outward = position - eye.disc
        outward /= np.linalg.norm(outward, axis=1, keepdims=True) + 1e-9
        aim = np.where(arcade[:, None], arcade_aim, outward)
        aim /= np.linalg.norm(aim, axis=1, keepdims=True) + 1e-9
        strength = np.where(arcade, 0.22 if step > 3 else 0.06, 0.05)[:, None]
        curl = 0.8 * curl + rng.normal(0, 0.22 * eye.tortuosity, len(curl))
        sideways = np.stack([-heading[:, 1], heading[:, 0]], axis=1)
        heading = heading + strength * aim + 0.2 * curl[:, None] * sideways
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        following = position + _STEP * heading
        pieces.append((position, following, width, vein))
        position = following
        width = width * np.where(arcade, 0.985, 0.972)

        from_fovea = np.linalg.norm(position - eye.fovea, axis=1)
        alive = (np.linalg.norm(position, axis=1) < 1.05) & (width > 0.0034) & (from_fovea > 0.10)
        branch = alive & (rng.uniform(size=len(width)) < np.where(arcade, 0.15, 0.10)) & (width > 0.0055) & (step > 2)
        turn = np.where(rng.uniform(size=len(width)) < 0.5, 1.0, -1.0) * rng.uniform(0.45, 0.95, len(width))
        turned = np.stack(
            [
                np.cos(turn) * heading[:, 0] - np.sin(turn) * heading[:, 1],
                np.sin(turn) * heading[:, 0] + np.cos(turn) * heading[:, 1],
            ],
            axis=1,
        )
        room = max(0, _MAX_TIPS - int(alive.sum()))
        chosen = np.flatnonzero(branch)[:room]
        kept = np.flatnonzero(alive)
        child_width = width[chosen] * rng.uniform(0.45, 0.75, len(chosen))
        width[chosen] *= 0.95
        position = np.concatenate([position[kept], position[chosen]])
        heading = np.concatenate([heading[kept], turned[chosen]])
        width = np.concatenate([width[kept], child_width])
        vein = np.concatenate([vein[kept], vein[chosen]])
        arcade = np.concatenate([arcade[kept], np.zeros(len(chosen), bool)])
        up = np.concatenate([up[kept], up[chosen]])
        curl = np.concatenate([curl[kept], np.zeros(len(chosen))])

    start, end, widths, veins = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return Vessels(start=start, end=end, width=widths, vein=veins)
