"""Pictures for pages that must stand alone: thumbnails as data, plots as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray

__all__ = ["as_svg", "blend", "thumbnail", "with_heat"]

_THUMB_PX = 160


def thumbnail(image: NDArray[np.uint8], side: int = _THUMB_PX) -> str:
    """A square picture, uint8 [S, S, 3] RGB, as a small JPEG in a data URL."""
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def with_heat(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay a heatmap over a photo.

    Args:
        image: uint8 [H, W, 3] RGB.
        heat: [h, w], not negative; its largest value is drawn strongest.
    """
    height, width = image.shape[:2]
    highest = float(heat.max())
    smooth = cv2.resize(heat / highest if highest else heat, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((smooth * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    # Weak heat leaves the retina as it is.
    return blend(image, 0.6 * smooth, colours)


def blend(image: NDArray[np.uint8], strength: NDArray[np.float32], colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Lay colours, [3] or [H, W, 3], over a picture [H, W, 3], as strong as [H, W] says, 0 to 1."""
    share = strength[..., None]
    return (image * (1 - share) + colours * share).round().astype(np.uint8)


def as_svg(
    draw: Callable[[Sequence[Any]], None], *, columns: int, width_in: float = 7.2, height_in: float = 2.5
) -> str:
    """Draw with matplotlib, and return an SVG element; equal data gives equal text.

    Args:
        draw: is given the axes, one a column.
        columns: plots side by side.
        width_in: of all of them, in inches; pages scale the picture to their own width.
        height_in: likewise.
    """
    matplotlib.use("svg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8.5, "svg.hashsalt": "fastfundus"}
    ):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        draw(axes)
        for each in axes:
            each.spines[["top", "right"]].set_visible(False)
            each.tick_params(labelsize=8)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    svg = picture.getvalue()
    return svg[svg.index("<svg") :]
