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

__all__ = ["as_svg", "thumbnail"]

_THUMB_PX = 160


def thumbnail(image: NDArray[np.uint8], side: int = _THUMB_PX) -> str:
    """A square picture, uint8 [S, S, 3] RGB, as a small JPEG in a data URL."""
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


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

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "fastfundus"}):
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
