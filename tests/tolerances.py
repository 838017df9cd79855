"""Every numeric tolerance of the tests, with its reason."""

FLOAT32_STEP = 2**-24
"""Half a unit in the last place of float32, relative: what one operation may be off by."""


def sample_grey_levels(farthest_px: float, largest_box_px: float = 1.0) -> float:
    """Bound `sample` in float32 against the float64 reference, in grey levels, before the colour matrix.

    A position is three rounded operations, and an edge of the box one more: four half-units of the farthest one. It
    moves the value by 255 grey levels a pixel at most, on each of two axes. The sum over the box adds one rounding a
    pixel of at most 255 grey levels.
    """
    taps = (largest_box_px + 2) ** 2
    return 2 * 255 * 4 * FLOAT32_STEP * farthest_px + 255 * (taps + 8) * FLOAT32_STEP


OPENCV_WARP_GREY_LEVELS = 255 / 32
"""OpenCV 4 rounds positions of a warp to 1/32 pixel, half of that on average in each of two axes, at up to 255 grey
levels a pixel. OpenCV 5 does not."""

BFLOAT16_RELATIVE = 2**-8
"""One rounding to bfloat16's 8 bits of mantissa."""

INTERPRETED_BFLOAT16_RELATIVE = 2**-7
"""Triton's interpreter cuts the bits off where hardware rounds to nearest: twice the error."""

FLOAT16_RELATIVE = 2**-11
"""One rounding to float16's 11 bits of mantissa."""

CIRCLE_RADII = 0.02
"""Field circle against the synthetic truth, in radii: it is found on a picture of 192 pixels, where a radius is about
70 pixels, to within one pixel on each side, and the drawn rim is soft."""

CIRCLE_SHIFT = 0.005
"""Field circle by two decoders, in radii: half a pixel of the small picture, in which a radius is about 90 pixels."""

SCALED_DECODE_GREY_LEVELS = 1.5
"""Mean difference between a photo prepared from a scaled decode and from a full one: the DCT's own low-pass is not an
area average, and the crop is rounded to whole pixels of the decoded picture."""

ENGINE_FP32 = 1e-4
"""Probabilities of a float32 engine against torch: other orders of summation in some sixty layers."""

TORCHVISION_ONE_STEP_GREY_LEVELS = 0.05
"""One geometric change by a matrix against torchvision's: both interpolate once, in float32; torchvision's positions
run from -1 to 1 and its matrix is rounded before it is inverted: 1e-4 pixels of 96, times 255 grey levels."""

TORCHVISION_CHAIN_GREY_LEVELS = 2.0
"""All geometric changes by one matrix against torchvision's one by one: torchvision interpolates three times, and each
time smooths; 1.7 grey levels at most on the test's picture, whose finest detail is 8 pixels."""

TORCHVISION_COLOUR_GREY_LEVELS = 0.05
"""Colours by a matrix against torchvision's, where nothing is clamped: its luma has weights of four digits that sum to
0.9999, times 255 grey levels, and a saturation of 1.3 and more multiplies that."""

KERNEL_PROBABILITY = 1e-3
"""Of a model, by kernels that differ in float32 rounding alone: a hundredth of a grey level on sharp edges."""

PREPARE_PROBABILITY = 0.02
"""Of a model, by crops that differ by half a grey level on average."""
