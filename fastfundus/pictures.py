"""Pictures for self-contained pages: thumbnails as data URLs, plots as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["as_svg", "blend", "thumbnail", "with_heat"]

_THUMB_PX = 160


def thumbnail(image: NDArray[np.uint8], side: int = _THUMB_PX) -> str:
    """Return a square picture, uint8 [S, S, 3] RGB, as a small JPEG in a data URL."""
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def with_heat(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Overlay a heatmap on a photo.

    Args:
        image: uint8 [H, W, 3] RGB.
        heat: [h, w], non-negative; normalised to its largest value.
    """
    height, width = image.shape[:2]
    highest = float(heat.max())
    smooth = cv2.resize(heat / highest if highest else heat, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((smooth * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    # The opacity follows the heat, so that the retina stays visible where it is weak.
    return blend(image, 0.6 * smooth, colours)


def blend(image: NDArray[np.uint8], strength: NDArray[np.float32], colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Overlay colours, [3] or [H, W, 3], on a picture [H, W, 3] with opacity `strength`, [H, W], 0 to 1."""
    share = strength[..., None]
    return (image * (1 - share) + colours * share).round().astype(np.uint8)


def as_svg(
    draw: Callable[[Sequence[Any]], None], *, columns: int, width_in: float = 7.2, height_in: float = 2.5
) -> str:
    """Draw with matplotlib and return an SVG element; equal data give equal text.

    Args:
        draw: receives the axes, one per column.
        columns: number of plots next to each other.
        width_in: total width in inches; pages scale the picture to their own width.
        height_in: height in inches.
    """
    # Imported only when needed: it would delay the first result of a screening by a quarter of a second.
    import matplotlib

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
