"""All numeric tolerances of the tests, with their reasons."""

FLOAT32_STEP = 2**-24
"""Half a unit in the last place of float32, relative: the largest rounding error of one operation."""


def sample_grey_levels(farthest_px: float, largest_box_px: float = 1.0) -> float:
    """Bound the error of float32 `sample` against the float64 reference, in grey levels before the colour matrix.

    A position takes three rounded operations and an edge of the box one more: four half-units of the farthest position.
    This moves the value by at most 255 grey levels per pixel, on each of two axes. The sum over the box adds one
    rounding per pixel, each of a value of at most 255 grey levels.
    """
    taps = (largest_box_px + 2) ** 2
    return 2 * 255 * 4 * FLOAT32_STEP * farthest_px + 255 * (taps + 8) * FLOAT32_STEP


OPENCV_WARP_GREY_LEVELS = 255 / 32
"""OpenCV 4 rounds warp positions to 1/32 pixel, which is half of that on average on each of two axes, at up to 255 grey
levels per pixel. OpenCV 5 does not."""

BFLOAT16_RELATIVE = 2**-8
"""One rounding to the 8 mantissa bits of bfloat16."""

INTERPRETED_BFLOAT16_RELATIVE = 2**-7
"""Triton's interpreter truncates where hardware rounds to nearest: twice the error."""

FLOAT16_RELATIVE = 2**-11
"""One rounding to the 11 mantissa bits of float16."""

CIRCLE_RADII = 0.02
"""Field circle against the synthetic truth, in radii: it is found on an image of 192 pixels, where a radius is about
70 pixels, to within one pixel on each side, and the synthetic field edge is soft."""

CIRCLE_SHIFT = 0.005
"""Field circles from two decoders, in radii: half a pixel of the small image, where a radius is about 90 pixels."""

SCALED_DECODE_GREY_LEVELS = 1.5
"""Mean difference between a photo prepared from a scaled decode and from a full one: the DCT's own low-pass is not an
area average, and the crop is rounded to whole pixels of the decoded image."""

ENGINE_FP32 = 1e-4
"""Probabilities of a float32 engine against torch: different orders of summation in some sixty layers."""

TORCHVISION_ONE_STEP_GREY_LEVELS = 0.05
"""One geometric transform by a matrix against torchvision's: both interpolate once, in float32; torchvision's positions
run from -1 to 1 and its matrix is rounded before it is inverted: 1e-4 pixels of 96, times 255 grey levels."""

TORCHVISION_CHAIN_GREY_LEVELS = 2.0
"""All geometric transforms by one matrix against torchvision's separate ones: torchvision interpolates three times and
smooths each time; at most 1.7 grey levels on the test image, whose finest detail is 8 pixels."""

TORCHVISION_COLOUR_GREY_LEVELS = 0.05
"""Colours by a matrix against torchvision's, where nothing is clamped: its four-digit luma weights sum to 0.9999, times
255 grey levels, and a saturation of 1.3 or more multiplies that."""

KERNEL_PROBABILITY = 1e-3
"""Probabilities of a model on crops from kernels that differ only in float32 rounding: a hundredth of a grey level on
sharp edges."""

PREPARE_PROBABILITY = 0.02
"""Probabilities of a model on crops that differ by half a grey level on average."""
