"""Augmentation matrices: identity when disabled, reproducible, and equal to separate steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fastfundus.config import AugmentConfig
from fastfundus.kernels.ops import sample
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo
from fastfundus.training.augment import compose_colour, compose_geometry, draw_epoch, fixed_transforms, normalisation
from tests import tolerances

OFF = {
    "scale": 1.0,
    "rotate_degrees": 0.0,
    "flip_horizontal": False,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue_degrees": 0.0,
}
SPEC = PreprocessSpec(size=32)
RAW = PreprocessSpec(size=32, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
"""Normalisation that keeps grey levels, so that the matrix contains only the colour changes."""


def test_disabled_augmentation_equals_evaluation() -> None:
    drawn, fixed = draw_epoch(AugmentConfig(**OFF), SPEC, 5, seed=1, epoch=2), fixed_transforms(SPEC, 5)
    np.testing.assert_allclose(drawn.geometry, fixed.geometry, atol=1e-6)
    np.testing.assert_allclose(drawn.colour, fixed.colour, atol=1e-6)


def test_normalisation_by_hand() -> None:
    black, white = normalisation(SPEC)[:3] @ np.array([[0, 255], [0, 255], [0, 255], [1, 1]])[:, [0]], None
    np.testing.assert_allclose(black[:, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    white = normalisation(SPEC)[:3] @ np.array([255, 255, 255, 1])
    np.testing.assert_allclose(white, [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_draws_depend_on_seed_and_epoch_only() -> None:
    config = AugmentConfig()
    first = draw_epoch(config, SPEC, 20, seed=3, epoch=4)
    again = draw_epoch(config, SPEC, 20, seed=3, epoch=4)
    np.testing.assert_array_equal(first.geometry, again.geometry)
    np.testing.assert_array_equal(first.colour, again.colour)
    for seed, epoch in [(4, 4), (3, 5)]:
        assert not np.array_equal(first.geometry, draw_epoch(config, SPEC, 20, seed=seed, epoch=epoch).geometry)


def test_crops_stay_inside_the_photo() -> None:
    config = AugmentConfig(**{**OFF, "scale": 0.5})
    geometry = draw_epoch(config, SPEC, 500, seed=0, epoch=0).geometry
    corners = np.array([[0, 0, 1], [32, 0, 1], [0, 32, 1], [32, 32, 1]], float).T
    places = geometry @ corners
    assert places.min() > -1e-4
    assert places.max() < 32 + 1e-4
    sides = geometry[:, 0, 0]
    assert sides.min() < 0.55
    assert sides.max() > 0.95


def test_rotation_and_flip_keep_the_centre() -> None:
    config = AugmentConfig(**{**OFF, "rotate_degrees": 90.0, "flip_horizontal": True, "flip_vertical": True})
    geometry = draw_epoch(config, SPEC, 200, seed=0, epoch=0).geometry
    np.testing.assert_allclose(geometry @ np.array([16.0, 16.0, 1.0]), 16, atol=1e-4)
    determinants = np.linalg.det(geometry[:, :, :2].astype(float))
    np.testing.assert_allclose(np.abs(determinants), 1, atol=1e-5)
    assert 0.3 < (determinants < 0).mean() < 0.7


def test_horizontal_flip() -> None:
    config = AugmentConfig(**{**OFF, "flip_horizontal": True})
    geometry = draw_epoch(config, RAW, 50, seed=0, epoch=0).geometry
    colour = fixed_transforms(RAW, 50).colour
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).repeat(50, 1, 1, 1)
    got = sample(images, torch.from_numpy(geometry), torch.from_numpy(colour), 32)
    plain = images[0].permute(2, 0, 1).float()
    mirrored = [n for n in range(50) if geometry[n, 0, 0] < 0]
    assert 0 < len(mirrored) < 50
    for n in range(50):
        expected = plain.flip(2) if n in mirrored else plain
        assert (got[n] - expected).abs().max() < 0.01


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue_degrees"])
def test_colour_changes_one_by_one(name: str) -> None:
    strength = 20.0 if name == "hue_degrees" else 0.4
    colour = draw_epoch(AugmentConfig(**{**OFF, name: strength}), RAW, 40, seed=0, epoch=0).colour
    pixel = np.array([180.0, 90.0, 40.0])
    luma = 0.299 * 180 + 0.587 * 90 + 0.114 * 40
    results = colour[:, :, :3].astype(float) @ pixel + colour[:, :, 3]
    for result in results:
        if name == "brightness":
            factor = result[0] / pixel[0]
            expected = factor * pixel
        elif name == "contrast":
            factor = (result[0] - 127.5) / (pixel[0] - 127.5)
            expected = factor * (pixel - 127.5) + 127.5
        elif name == "saturation":
            factor = (result[0] - luma) / (pixel[0] - luma)
            expected = factor * (pixel - luma) + luma
        else:
            # Green changes by a fraction of red - blue, which would reach 1 at 60 degrees.
            np.testing.assert_allclose(result[[0, 2]], pixel[[0, 2]], rtol=1e-5)
            assert abs(result[1] - pixel[1]) <= 20 / 60 * (180 - 40) + 1e-3
            continue
        np.testing.assert_allclose(result, expected, rtol=1e-4)
        assert 0.6 - 1e-4 <= factor <= 1.4 + 1e-4
    assert np.ptp(results[:, 1]) > 5


def test_draws_do_not_depend_on_the_number_of_photos() -> None:
    """Batches, ranks and workers select rows of an epoch, so a row must not depend on the number of rows."""
    config = AugmentConfig(aspect=1.3, zoom=0.1, shear_degrees=5)
    many, few = (draw_epoch(config, SPEC, count, seed=3, epoch=4) for count in (50, 20))
    np.testing.assert_array_equal(many[:20].geometry, few.geometry)
    np.testing.assert_array_equal(many[:20].colour, few.colour)


def test_transforms_are_selected_by_rows_scaled_and_shifted() -> None:
    transforms = draw_epoch(AugmentConfig(), SPEC, 6, seed=3, epoch=4)
    assert (len(transforms), len(transforms[np.array([4, 1])])) == (6, 2)
    place = np.array([3.0, 5.0, 1.0])
    half = np.array([6.0, 10.0, 1.0])
    np.testing.assert_allclose(transforms.scaled(0.5).geometry @ half, transforms.geometry @ place, atol=1e-4)
    corner = np.tile(np.float32([2, 4]), (6, 1))
    np.testing.assert_allclose(
        transforms.shifted(corner).geometry @ np.array([1.0, 1.0, 1.0]), transforms.geometry @ place, atol=1e-4
    )
    np.testing.assert_array_equal(transforms.shifted(corner).colour, transforms.colour)
    # Iteration is refused, because unpacking into two values would yield the first two photos.
    with pytest.raises(TypeError, match="not iterable"):
        list(transforms)  # type: ignore[call-overload]


SIZE = 96
PLAIN = {"left": 0.0, "top": 0.0, "width": 1.0, "height": 1.0, "mirror_x": False, "mirror_y": False}
PLAIN |= {"degrees": 0.0, "zoom": 1.0, "shear_degrees": 0.0}


def picture() -> torch.Tensor:
    """Return a smooth image without a border, float32 [3, S, S] in grey levels."""
    noise = torch.randn(1, 3, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, SIZE, mode="bicubic", align_corners=False)[0]
    return (128 + 40 * smooth).clamp(20, 235).round()


def by_matrix(image: torch.Tensor, **changes: float) -> torch.Tensor:
    geometry = compose_geometry(SIZE, **{name: np.array([value]) for name, value in {**PLAIN, **changes}.items()})
    pixels = image.permute(1, 2, 0).to(torch.uint8)[None].contiguous()
    return sample(pixels, torch.from_numpy(geometry.astype(np.float32)), torch.eye(3, 4)[None], SIZE)[0]


def affine(image: torch.Tensor, degrees: float = 0.0, zoom: float = 1.0, shear: float = 0.0) -> torch.Tensor:
    bilinear = v2.InterpolationMode.BILINEAR
    return functional.affine(image, degrees, [0.0, 0.0], zoom, [shear, 0.0], interpolation=bilinear)


def cropped(image: torch.Tensor) -> torch.Tensor:
    return functional.resized_crop(image, 12, 24, 60, 48, [SIZE, SIZE], antialias=True)


CROP = {"left": 24 / SIZE, "top": 12 / SIZE, "width": 48 / SIZE, "height": 60 / SIZE}
STEPS = {
    "crop": (CROP, cropped),
    "flip-x": ({"mirror_x": True}, functional.hflip),
    "flip-y": ({"mirror_y": True}, functional.vflip),
    "rotation": ({"degrees": 20.0}, lambda image: affine(image, 20.0)),
    "zoom-in": ({"zoom": 1.3}, lambda image: affine(image, zoom=1.3)),
    # A shear alone minifies across columns, where sampling averages by area but torchvision does not; so zoom, too.
    "shear": ({"shear_degrees": 10.0, "zoom": 1.05}, lambda image: affine(image, zoom=1.05, shear=10.0)),
    "rotation-zoom-shear": (
        {"degrees": -33.0, "zoom": 1.2, "shear_degrees": 7.0},
        lambda image: affine(image, -33.0, 1.2, 7.0),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_one_step_equals_torchvision(name: str) -> None:
    changes, step = STEPS[name]
    image, inside = picture(), slice(2, -2)
    # At the edges of a crop, torchvision's resize repeats pixels; sampling reads the photo beyond them, or black.
    got, want = (result[:, inside, inside] for result in (by_matrix(image, **changes), step(image)))
    assert (got - want).abs().max() < tolerances.TORCHVISION_ONE_STEP_GREY_LEVELS


def test_all_steps_equal_torchvision_one_by_one() -> None:
    changes = CROP | {"mirror_x": True, "degrees": 12.0, "zoom": 1.1, "shear_degrees": -6.0}
    want = affine(functional.hflip(cropped(picture())), 12.0, 1.1, -6.0)
    got = by_matrix(picture(), **changes)
    # Exclude the border, where torchvision's crop repeats edge pixels and its rotation brings in black.
    inside = slice(8, -8)
    difference = (got - want)[:, inside, inside].abs()
    assert difference.max() < tolerances.TORCHVISION_CHAIN_GREY_LEVELS
    # The image did change.
    assert (want - picture())[:, inside, inside].abs().mean() > 10


def recoloured(image: torch.Tensor, pivot: float = 127.5, **changes: float) -> torch.Tensor:
    settings = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue_degrees": 0.0, **changes}
    arrays = {name: np.array([value]) for name, value in settings.items()}
    matrix = torch.from_numpy(compose_colour(**arrays, pivot=pivot))[0].float()
    return torch.einsum("ij,jhw->ihw", matrix[:3, :3], image) + matrix[:3, 3, None, None]


def retina() -> torch.Tensor:
    """Return a retina of low contrast, so that the changes below stay within 0 to 255."""
    image = torch.from_numpy(draw_photo(seed=1, long_side=128).image).permute(2, 0, 1).float()
    return 40 + 0.5 * image


def test_colours_equal_torchvision_one_by_one() -> None:
    image = retina() / 255
    steps = functional.adjust_brightness(image, 1.1)
    pivot = 255 * float(functional.rgb_to_grayscale(steps).mean())
    steps = functional.adjust_saturation(functional.adjust_contrast(steps, 0.8), 1.3)
    got = recoloured(retina(), pivot, brightness=1.1, contrast=0.8, saturation=1.3)
    assert (got - 255 * steps).abs().max() < tolerances.TORCHVISION_COLOUR_GREY_LEVELS
    assert (got - retina()).abs().mean() > 5


@pytest.mark.parametrize("degrees", [6.0, -6.0])
def test_hue_equals_torchvision_on_a_retina(degrees: float) -> None:
    want = 255 * functional.adjust_hue(retina() / 255, degrees / 360)
    got = recoloured(retina(), hue_degrees=degrees)
    ordered = [(image[0] >= image[1]) & (image[1] >= image[2]) for image in (retina(), got)]
    red_to_yellow = ordered[0] & ordered[1]
    difference = (got - want).abs().amax(dim=0)
    assert difference[red_to_yellow].max() < tolerances.TORCHVISION_COLOUR_GREY_LEVELS
    assert red_to_yellow.float().mean() > 0.95
    # Grey pixels outside the field and the few other colours differ by less than half of the change.
    assert difference.max() < 0.5 * (want - retina()).abs().max()
    assert (got - retina()).abs().max() > 5


def test_every_geometry_setting_has_an_effect() -> None:
    names = ("aspect", "zoom", "shear_degrees")
    for name, value in zip(names, (1.5, 0.2, 10.0), strict=True):
        drawn = draw_epoch(AugmentConfig(**{**OFF, name: value}), SPEC, 100, seed=0, epoch=0).geometry
        fixed = fixed_transforms(SPEC, 100).geometry
        assert np.abs(drawn - fixed).max(axis=(1, 2)).min() > 0, name
        if name == "aspect":
            ratio = drawn[:, 0, 0] / drawn[:, 1, 1]
            assert 1 / 1.5 - 1e-5 <= ratio.min() < 0.72
            assert 1.4 < ratio.max() <= 1.5 + 1e-5
