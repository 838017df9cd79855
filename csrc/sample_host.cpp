// `sample` on the CPU: sample.cuh's arithmetic behind a C ABI. Compiled on first use by kernels/host.py.
//
// Everything has been checked by the caller: sizes, offsets, matrices.
#include "sample.cuh"

#include <vector>

using namespace fastfundus;

namespace {

struct Half {
    uint16_t bits;
};
struct Brain {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

template <class T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
    return value;
}
// To nearest, ties to even. Matrices are finite and so are sums; an overflow to infinity stays one.
template <>
inline Brain narrow<Brain>(float value) {
    uint32_t bits = bits_of(value);
    return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Half narrow<Half>(float value) {
    _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return {bits};
}

template <class T, Mode mode>
void sample_photo(const uint8_t *pixels, const Job &job, T *out, int32_t out_size) {
    Source source{pixels + job.offset, job.height, job.width};
    Footprint box = footprint(job.geometry);
    // A row of floats first, then narrowed as a whole: both loops are vector code. Four lanes are stored a pixel, and
    // the next pixel overwrites the fourth.
    std::vector<float> line(3 * static_cast<size_t>(out_size) + 1);
    for (int32_t row = 0; row < out_size; ++row, out += 3 * static_cast<size_t>(out_size)) {
        for (int32_t column = 0; column < out_size; ++column) {
            Rgb pixel = recolour(job.colour, sample_pixel<mode>(source, job.geometry, box, row, column));
            std::memcpy(&line[3 * column], &pixel, sizeof pixel);
        }
        for (int32_t index = 0; index < 3 * out_size; ++index) out[index] = narrow<T>(line[index]);
    }
}

template <class T>
void sample_as(const uint8_t *pixels, const Job &job, void *out, int32_t out_size, int32_t mode) {
    T *typed = static_cast<T *>(out);
    if (mode == kNearest) return sample_photo<T, kNearest>(pixels, job, typed, out_size);
    if (mode == kIntegrate) return sample_photo<T, kIntegrate>(pixels, job, typed, out_size);
    return sample_photo<T, kInterpolate>(pixels, job, typed, out_size);
}

// Cell k of an axis covers pixels [k * size / bins, (k + 1) * size / bins).
inline int64_t cell_edge(int32_t size, int32_t bins, int32_t index) {
    return static_cast<int64_t>(index) * size / bins;
}

inline int64_t brightest(const uint8_t *pixel) {
    uint8_t most = pixel[0] > pixel[1] ? pixel[0] : pixel[1];
    return most > pixel[2] ? most : pixel[2];
}

}  // namespace

extern "C" {

// One photo. `out` is [out_size, out_size, 3] of out_type (0 float32, 1 float16, 2 bfloat16).
void fastfundus_sample_photo(const uint8_t *pixels, const Job *job, void *out, int32_t out_size, int32_t out_type,
                             int32_t mode) {
    if (out_type == 0) return sample_as<float>(pixels, *job, out, out_size, mode);
    if (out_type == 1) return sample_as<Half>(pixels, *job, out, out_size, mode);
    return sample_as<Brain>(pixels, *job, out, out_size, mode);
}

// Sums of the brightest channel over bins x bins cells of one photo: [bins, bins].
void fastfundus_cell_sums(const uint8_t *pixels, int32_t height, int32_t width, int32_t bins, int64_t *sums) {
    for (int32_t index = 0; index < bins * bins; ++index) {
        int64_t top = cell_edge(height, bins, index / bins), bottom = cell_edge(height, bins, index / bins + 1);
        int64_t left = cell_edge(width, bins, index % bins), right = cell_edge(width, bins, index % bins + 1);
        int64_t sum = 0;
        for (int64_t row = top; row < bottom; ++row) {
            const uint8_t *pixel = pixels + 3 * (row * width + left);
            for (int64_t column = left; column < right; ++column, pixel += 3) sum += brightest(pixel);
        }
        sums[index] = sum;
    }
}

}  // extern "C"
