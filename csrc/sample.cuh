// The arithmetic of `sample`, for the device and for the host: one definition that nvcc and g++ both compile.
//
// What it means is written in kernels/reference.py: pixel centres at halves, black outside, and an output pixel that
// integrates a box of the source, at least one pixel wide on each axis. A box of one pixel is bilinear interpolation.
//
// Arithmetic is float32. `Rgb` is three floats on the device; on the host it is a vector of four, so that g++ emits
// vector instructions for the very same expressions.
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

// A stretch that exceeds one by less than this counts as one: a rotation's rounding must not add taps. 2^-12.
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

// One photo: uint8 [height, width, 3], rows without gaps.
struct Source {
    const uint8_t *pixels;
    int32_t height, width;
};

// What one photo of a batch needs, as kernels/jobs.py packs it.
struct Job {
    int64_t offset;  // of its first byte
    int32_t height, width;
    float geometry[6];  // [2, 3], output positions to source positions
    float colour[12];   // [3, 4], RGB in grey levels to output channels
};
static_assert(sizeof(Job) == 88, "kernels/jobs.py packs 88 bytes");

// How far one output step reaches: the box's width and height in source pixels, and how many pixels it may touch.
struct Footprint {
    float width, height;
    int32_t columns, rows;
};

// Where the box of one output pixel begins on one axis.
struct Span {
    float start;
    int32_t first;
};

FASTFUNDUS_BOTH float stretch(float along_x, float along_y) {
    float length = sqrtf(along_x * along_x + along_y * along_y);
    return length < kLeastMinification ? 1.0f : length;
}

// `geometry`: float32 [2, 3], output positions to source positions.
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
// fmaxf's rule for NaN, of which there are none here, makes it a call into the C library.
inline float greater(float a, float b) { return a > b ? a : b; }
inline float lesser(float a, float b) { return a < b ? a : b; }
#endif

// How much of pixel `at` lies in the box, on one axis; 0 where they do not meet.
FASTFUNDUS_BOTH float overlap(Span box, float width, int32_t at) {
    float low = greater(box.start, static_cast<float>(at));
    float high = lesser(box.start + width, static_cast<float>(at) + 1.0f);
    return greater(high - low, 0.0f);
}

// Three bytes as floats.
FASTFUNDUS_BOTH Rgb load(const uint8_t *pixel) {
    return make_rgb(static_cast<float>(pixel[0]), static_cast<float>(pixel[1]), static_cast<float>(pixel[2]));
}

// The same where a fourth byte may be read: one load on the host, whose fourth lane nobody looks at.
FASTFUNDUS_BOTH Rgb load_wide(const uint8_t *pixel) {
#ifdef __CUDACC__
    return load(pixel);
#else
    int32_t bytes;
    std::memcpy(&bytes, pixel, 4);
#ifdef __SSE4_1__
    // g++ 12 takes twenty instructions for the generic form.
    return (Rgb)_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(4)));
    return __builtin_convertvector((Bytes)bytes, Rgb);
#endif
#endif
}

// Offsets fit into int32: the caller checks 3 * height * width < 2^31.
FASTFUNDUS_BOTH const uint8_t *address(const Source &source, int32_t row, int32_t column) {
    return source.pixels + 3 * (row * source.width + column);
}

FASTFUNDUS_BOTH bool inside(const Source &source, int32_t row, int32_t column) {
    return row >= 0 && row < source.height && column >= 0 && column < source.width;
}

FASTFUNDUS_BOTH Rgb fetch_or_black(const Source &source, int32_t row, int32_t column) {
    return inside(source, row, column) ? load(address(source, row, column)) : make_rgb(0.0f, 0.0f, 0.0f);
}

// Four pixels around a position; `right` and `lower` are the shares of the right and the lower ones.
FASTFUNDUS_BOTH Rgb blend(Rgb upper_left, Rgb upper_right, Rgb lower_left, Rgb lower_right, float right, float lower) {
    Rgb above = (1.0f - right) * upper_left + right * upper_right;
    Rgb below = (1.0f - right) * lower_left + right * lower_right;
    return (1.0f - lower) * above + lower * below;
}

// A box of one pixel: bilinear interpolation between the four pixels that it touches.
FASTFUNDUS_BOTH Rgb interpolate(const Source &source, float x, float y) {
    Span across = span(x, 1.0f), down = span(y, 1.0f);
    float right = across.start - static_cast<float>(across.first), lower = down.start - static_cast<float>(down.first);
    int32_t row = down.first, column = across.first;
    Rgb corners[4];
    // A pixel to spare on the right, for `load_wide`.
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

// A larger box: every pixel that it touches, weighted by the area they share. Pixels outside are black.
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

// The pixel that covers the position; black outside.
FASTFUNDUS_BOTH Rgb nearest(const Source &source, float x, float y) {
    return fetch_or_black(source, static_cast<int32_t>(floorf(y)), static_cast<int32_t>(floorf(x)));
}

enum Mode : int32_t { kInterpolate = 0, kIntegrate = 1, kNearest = 2 };

struct Position {
    float x, y;
};

// Where in the source the centre of output pixel (row, column) lies.
FASTFUNDUS_BOTH Position position(const float *geometry, int32_t row, int32_t column) {
    float along_x = static_cast<float>(column) + 0.5f, along_y = static_cast<float>(row) + 0.5f;
    return {geometry[0] * along_x + geometry[1] * along_y + geometry[2],
            geometry[3] * along_x + geometry[4] * along_y + geometry[5]};
}

// RGB in grey levels at the centre of output pixel (row, column).
template <Mode mode>
FASTFUNDUS_BOTH Rgb sample_pixel(const Source &source, const float *geometry, const Footprint &box, int32_t row,
                                 int32_t column) {
    Position at = position(geometry, row, column);
    if (mode == kNearest) return nearest(source, at.x, at.y);
    if (mode == kIntegrate) return integrate(source, box, at.x, at.y);
    return interpolate(source, at.x, at.y);
}

// `colour`: float32 [3, 4]. Nothing is clamped.
FASTFUNDUS_BOTH Rgb recolour(const float *colour, Rgb pixel) {
    Rgb result = make_rgb(colour[3], colour[7], colour[11]);
    result = result + red(pixel) * make_rgb(colour[0], colour[4], colour[8]);
    result = result + green(pixel) * make_rgb(colour[1], colour[5], colour[9]);
    return result + blue(pixel) * make_rgb(colour[2], colour[6], colour[10]);
}

}  // namespace fastfundus
