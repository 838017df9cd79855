"""Every numeric tolerance of the tests, with its reason."""

GRID_GREY_LEVELS = 2e-2
"""`sample` against its reference, float32: grid_sample keeps positions in -1 to 1, whose float32 step moves a position
by up to 2e-5 pixels at 256 pixels; times the steepest slope (255 grey levels a pixel), twice for two axes."""

BFLOAT16_RELATIVE = 2**-8
"""One rounding to bfloat16's 8 bits of mantissa."""

FLOAT16_RELATIVE = 2**-11
"""One rounding to float16's 11 bits of mantissa."""

CIRCLE_RADII = 0.02
"""Field circle against the synthetic truth, in radii: it is found on a picture of 192 pixels, where a radius is about
70 pixels, to within one pixel on each side, and the drawn rim is soft."""

SCALED_DECODE_GREY_LEVELS = 1.5
"""Mean difference between a photo prepared from a scaled decode and from a full one: the DCT's own low-pass is not an
area average, and the crop is rounded to whole pixels of the decoded picture."""

ENGINE_FP32 = 1e-4
"""Probabilities of a float32 engine against torch: other orders of summation in some sixty layers."""
