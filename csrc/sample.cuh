// The arithmetic of `sample`, defined once for device and host and compiled by both nvcc and g++.
//
// kernels/reference.py specifies the result: pixel centres are at half-integer positions, everything outside the photo
// is black, and an output pixel integrates over a box of the source that is at least one pixel wide on each axis. A box
// of one pixel amounts to bilinear interpolation.
//
// The arithmetic is float32. `Rgb` is three floats on the device and a vector of four on the host, so that g++ emits
// vector instructions for the same expressions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTFUNDUS_BOTH __host__ __device__ __forceinline__
#else
#include <cmath>
#ifdef __SSE4_1__
#include <smmintrin.h>
#endif
#define FASTFUNDUS_BOTH inline
#endif

namespace fastfundus {

// A stretch below this, 1 + 2^-12, counts as one, so that rounding in a rotation does not add taps.
constexpr float kLeastMinification = 1.0f + 1.0f / 4096.0f;

#ifdef __CUDACC__
struct Rgb {
    float red, green, blue;
};
FASTFUNDUS_BOTH Rgb make_rgb(float red, float green, float blue) { return {red, green, blue}; }
FASTFUNDUS_BOTH Rgb operator+(Rgb a, Rgb b) { return {a.red + b.red, a.green + b.green, a.blue + b.blue}; }
FASTFUNDUS_BOTH Rgb operator*(float s, Rgb a) { return {s * a.red, s * a.green, s * a.blue}; }
FASTFUNDUS_BOTH float red(Rgb a) { return a.red; }
FASTFUNDUS_BOTH float green(Rgb a) { return a.green; }
FASTFUNDUS_BOTH float blue(Rgb a) { return a.blue; }
#else
typedef float Rgb __attribute__((vector_size(16)));
inline Rgb make_rgb(float red, float green, float blue) { return Rgb{red, green, blue, 0.0f}; }
inline float red(Rgb a) { return a[0]; }
inline float green(Rgb a) { return a[1]; }
inline float blue(Rgb a) { return a[2]; }
#endif

// One photo: uint8 [height, width, 3], without padding between rows.
struct Source {
    const uint8_t *pixels;
    int32_t height, width;
};

// The arguments for one photo of a batch, as packed by kernels/jobs.py.
struct Job {
    int64_t offset;  // first byte of the photo in the buffer
    int32_t height, width;
    float geometry[6];  // [2, 3], maps output positions to source positions
    float colour[12];   // [3, 4], maps RGB in grey levels to output channels
};
static_assert(sizeof(Job) == 88, "kernels/jobs.py packs 88 bytes");

// Size of the box of one output pixel: width and height in source pixels, and the most columns and rows it can touch.
struct Footprint {
    float width, height;
    int32_t columns, rows;
};

// Start of the box of one output pixel on one axis, and the first pixel that it touches.
struct Span {
    float start;
    int32_t first;
};

FASTFUNDUS_BOTH float stretch(float along_x, float along_y) {
    float length = sqrtf(along_x * along_x + along_y * along_y);
    return length < kLeastMinification ? 1.0f : length;
}

// `geometry`: float32 [2, 3], maps output positions to source positions.
FASTFUNDUS_BOTH Footprint footprint(const float *geometry) {
    float width = stretch(geometry[0], geometry[1]), height = stretch(geometry[3], geometry[4]);
    return {width, height, static_cast<int32_t>(ceilf(width)) + 1, static_cast<int32_t>(ceilf(height)) + 1};
}

FASTFUNDUS_BOTH Span span(float centre, float width) {
    float start = centre - 0.5f * width;
    return {start, static_cast<int32_t>(floorf(start))};
}

#ifdef __CUDACC__
FASTFUNDUS_BOTH float greater(float a, float b) { return fmaxf(a, b); }
FASTFUNDUS_BOTH float lesser(float a, float b) { return fminf(a, b); }
#else
// The NaN rule of fmaxf would make it a call into the C library; there are no NaNs here.
inline float greater(float a, float b) { return a > b ? a : b; }
inline float lesser(float a, float b) { return a < b ? a : b; }
#endif

// Length of pixel `at` that is inside the box, on one axis; 0 if they do not intersect.
FASTFUNDUS_BOTH float overlap(Span box, float width, int32_t at) {
    float low = greater(box.start, static_cast<float>(at));
    float high = lesser(box.start + width, static_cast<float>(at) + 1.0f);
    return greater(high - low, 0.0f);
}

// Load three bytes as floats.
FASTFUNDUS_BOTH Rgb load(const uint8_t *pixel) {
    return make_rgb(static_cast<float>(pixel[0]), static_cast<float>(pixel[1]), static_cast<float>(pixel[2]));
}

// Like `load`, for pixels followed by a readable fourth byte: a single load on the host, whose fourth lane is unused.
FASTFUNDUS_BOTH Rgb load_wide(const uint8_t *pixel) {
#ifdef __CUDACC__
    return load(pixel);
#else
    int32_t bytes;
    std::memcpy(&bytes, pixel, 4);
#ifdef __SSE4_1__
    // g++ 12 emits twenty instructions for the generic form.
    return (Rgb)_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(4)));
    return __builtin_convertvector((Bytes)bytes, Rgb);
#endif
#endif
}

// Offsets fit in int32: the caller checks that 3 * height * width < 2^31.
FASTFUNDUS_BOTH const uint8_t *address(const Source &source, int32_t row, int32_t column) {
    return source.pixels + 3 * (row * source.width + column);
}

FASTFUNDUS_BOTH bool inside(const Source &source, int32_t row, int32_t column) {
    return row >= 0 && row < source.height && column >= 0 && column < source.width;
}

FASTFUNDUS_BOTH Rgb fetch_or_black(const Source &source, int32_t row, int32_t column) {
    return inside(source, row, column) ? load(address(source, row, column)) : make_rgb(0.0f, 0.0f, 0.0f);
}

// Blend the four pixels around a position; `right` and `lower` are the weights of the right and the lower pixels.
FASTFUNDUS_BOTH Rgb blend(Rgb upper_left, Rgb upper_right, Rgb lower_left, Rgb lower_right, float right, float lower) {
    Rgb above = (1.0f - right) * upper_left + right * upper_right;
    Rgb below = (1.0f - right) * lower_left + right * lower_right;
    return (1.0f - lower) * above + lower * below;
}

// Sample a box of one pixel: bilinear interpolation between the four pixels that it touches.
FASTFUNDUS_BOTH Rgb interpolate(const Source &source, float x, float y) {
    Span across = span(x, 1.0f), down = span(y, 1.0f);
    float right = across.start - static_cast<float>(across.first), lower = down.start - static_cast<float>(down.first);
    int32_t row = down.first, column = across.first;
    Rgb corners[4];
    // One more pixel is required on the right, for `load_wide`.
    if (row >= 0 && row < source.height - 1 && column >= 0 && column < source.width - 2) {
        const uint8_t *first = address(source, row, column), *second = first + 3 * source.width;
        corners[0] = load_wide(first);
        corners[1] = load_wide(first + 3);
        corners[2] = load_wide(second);
        corners[3] = load_wide(second + 3);
    } else {
        corners[0] = fetch_or_black(source, row, column);
        corners[1] = fetch_or_black(source, row, column + 1);
        corners[2] = fetch_or_black(source, row + 1, column);
        corners[3] = fetch_or_black(source, row + 1, column + 1);
    }
    return blend(corners[0], corners[1], corners[2], corners[3], right, lower);
}

// Average a larger box: every pixel that it touches is weighted by the shared area. Pixels outside are black.
FASTFUNDUS_BOTH Rgb integrate(const Source &source, const Footprint &box, float x, float y) {
    Span across = span(x, box.width), down = span(y, box.height);
    int32_t left = across.first > 0 ? across.first : 0;
    int32_t right = across.first + box.columns < source.width ? across.first + box.columns : source.width;
    int32_t top = down.first > 0 ? down.first : 0;
    int32_t bottom = down.first + box.rows < source.height ? down.first + box.rows : source.height;
    Rgb sum = make_rgb(0.0f, 0.0f, 0.0f);
    for (int32_t row = top; row < bottom; ++row) {
        Rgb line = make_rgb(0.0f, 0.0f, 0.0f);
        const uint8_t *pixel = address(source, row, left);
        for (int32_t column = left; column < right; ++column, pixel += 3)
            line = line + overlap(across, box.width, column) * load(pixel);
        sum = sum + overlap(down, box.height, row) * line;
    }
    return 1.0f / (box.width * box.height) * sum;
}

// Return the pixel that covers the position; black outside.
FASTFUNDUS_BOTH Rgb nearest(const Source &source, float x, float y) {
    return fetch_or_black(source, static_cast<int32_t>(floorf(y)), static_cast<int32_t>(floorf(x)));
}

enum Mode : int32_t { kInterpolate = 0, kIntegrate = 1, kNearest = 2 };

struct Position {
    float x, y;
};

// Position in the source of the centre of output pixel (row, column).
FASTFUNDUS_BOTH Position position(const float *geometry, int32_t row, int32_t column) {
    float along_x = static_cast<float>(column) + 0.5f, along_y = static_cast<float>(row) + 0.5f;
    return {geometry[0] * along_x + geometry[1] * along_y + geometry[2],
            geometry[3] * along_x + geometry[4] * along_y + geometry[5]};
}

// RGB in grey levels for output pixel (row, column).
template <Mode mode>
FASTFUNDUS_BOTH Rgb sample_pixel(const Source &source, const float *geometry, const Footprint &box, int32_t row,
                                 int32_t column) {
    Position at = position(geometry, row, column);
    if (mode == kNearest) return nearest(source, at.x, at.y);
    if (mode == kIntegrate) return integrate(source, box, at.x, at.y);
    return interpolate(source, at.x, at.y);
}

// Apply the colour matrix, float32 [3, 4]. Nothing is clamped.
FASTFUNDUS_BOTH Rgb recolour(const float *colour, Rgb pixel) {
    Rgb result = make_rgb(colour[3], colour[7], colour[11]);
    result = result + red(pixel) * make_rgb(colour[0], colour[4], colour[8]);
    result = result + green(pixel) * make_rgb(colour[1], colour[5], colour[9]);
    return result + blue(pixel) * make_rgb(colour[2], colour[6], colour[10]);
}

}  // namespace fastfundus
