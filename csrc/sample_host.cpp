// `sample` on the CPU: the arithmetic of sample.cuh behind a C ABI. Compiled on first use by kernels/host.py.
//
// The caller has validated all sizes, offsets and matrices.
#include "sample.cuh"

#include <algorithm>
#include <cmath>
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
// Round to nearest, ties to even. Matrices and sums are finite; an overflow to infinity remains infinity.
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

// Grey levels, rounded to nearest, ties to even, as on the device.
template <>
inline uint8_t narrow<uint8_t>(float value) {
    return static_cast<uint8_t>(std::nearbyint(lesser(greater(value, 0.0f), 255.0f)));
}

inline float to_float(uint8_t value) { return static_cast<float>(value); }

// A row of the output before conversion to the output type. Four lanes are stored per pixel; the next pixel overwrites
// the fourth.
class Line {
  public:
    explicit Line(int32_t out_size) : values_(3 * static_cast<size_t>(out_size) + 1) {}

    void store(int32_t column, Rgb pixel) { std::memcpy(&values_[3 * column], &pixel, sizeof pixel); }

    template <class T>
    T *narrow_to(T *out) const {
        size_t count = values_.size() - 1;
        for (size_t index = 0; index < count; ++index) out[index] = narrow<T>(values_[index]);
        return out + count;
    }

  private:
    std::vector<float> values_;
};

// Nearest-pixel sampling, pixel by pixel, as on the device.
template <class T>
void nearest_rows(const Source &source, const Job &job, T *out, int32_t out_size) {
    Footprint box = footprint(job.geometry);
    Line line(out_size);
    for (int32_t row = 0; row < out_size; ++row) {
        for (int32_t column = 0; column < out_size; ++column)
            line.store(column, recolour(job.colour, sample_pixel<kNearest>(source, job.geometry, box, row, column)));
        out = line.narrow_to(out);
    }
}

// Interpolation. The positions of a whole row are computed first, so that everything except the loads is vectorised.
template <class T>
void interpolate_rows(const Source &source, const Job &job, T *out, int32_t out_size) {
    Line line(out_size);
    std::vector<float> xs(out_size), ys(out_size), rights(out_size), lowers(out_size);
    std::vector<int32_t> offsets(out_size);
    const int32_t last_row = source.height - 1, last_column = source.width - 2, width = source.width;
    for (int32_t row = 0; row < out_size; ++row) {
        for (int32_t column = 0; column < out_size; ++column) {
            auto [x, y] = position(job.geometry, row, column);
            float left = floorf(x - 0.5f), top = floorf(y - 0.5f);
            int32_t at_column = static_cast<int32_t>(left), at_row = static_cast<int32_t>(top);
            xs[column] = x;
            ys[column] = y;
            rights[column] = x - 0.5f - left;
            lowers[column] = y - 0.5f - top;
            bool whole = (at_row >= 0) & (at_row < last_row) & (at_column >= 0) & (at_column < last_column);
            offsets[column] = whole ? 3 * (at_row * width + at_column) : -1;
        }
        for (int32_t column = 0; column < out_size; ++column) {
            Rgb pixel;
            if (offsets[column] >= 0) {
                const uint8_t *first = source.pixels + offsets[column], *second = first + 3 * width;
                pixel = blend(load_wide(first), load_wide(first + 3), load_wide(second), load_wide(second + 3),
                              rights[column], lowers[column]);
            } else {
                pixel = interpolate(source, xs[column], ys[column]);
            }
            line.store(column, recolour(job.colour, pixel));
        }
        out = line.narrow_to(out);
    }
}

// Integration for geometries without rotation: whole rows of the source are summed first, then columns of their sum.
// Every source byte is read about once, rather than once for each box that contains it.
template <class T>
void integrate_upright(const Source &source, const Job &job, T *out, int32_t out_size) {
    Footprint box = footprint(job.geometry);
    Line line(out_size);
    std::vector<int32_t> lefts(out_size), rights(out_size);
    std::vector<float> shares(static_cast<size_t>(out_size) * box.columns);
    int32_t least = source.width, most = 0;
    for (int32_t column = 0; column < out_size; ++column) {
        Span across = span(job.geometry[0] * (static_cast<float>(column) + 0.5f) + job.geometry[2], box.width);
        int32_t left = std::max(across.first, 0), right = std::min(across.first + box.columns, source.width);
        lefts[column] = left;
        rights[column] = right;
        for (int32_t at = left; at < right; ++at)
            shares[static_cast<size_t>(column) * box.columns + (at - left)] = overlap(across, box.width, at);
        if (left < right) {
            least = std::min(least, left);
            most = std::max(most, right);
        }
    }
    const size_t count = most > least ? 3 * static_cast<size_t>(most - least) : 0;
    // One extra element, because four floats are loaded where three are needed.
    std::vector<float> sums(count + 1);
    const float area = 1.0f / (box.width * box.height);
    for (int32_t row = 0; row < out_size; ++row) {
        Span down = span(job.geometry[4] * (static_cast<float>(row) + 0.5f) + job.geometry[5], box.height);
        std::fill(sums.begin(), sums.end(), 0.0f);
        const int32_t top = std::max(down.first, 0), bottom = std::min(down.first + box.rows, source.height);
        // Four rows at a time, so that the sums are loaded and stored once. Weights beyond the last row are zero.
        for (int32_t at = top; at < bottom; at += 4) {
            const uint8_t *rows[4];
            float parts[4];
            for (int32_t next = 0; next < 4; ++next) {
                rows[next] = address(source, std::min(at + next, bottom - 1), least);
                parts[next] = at + next < bottom ? area * overlap(down, box.height, at + next) : 0.0f;
            }
            float *into = sums.data();
            for (size_t index = 0; index < count; ++index)
                into[index] += parts[0] * to_float(rows[0][index]) + parts[1] * to_float(rows[1][index]) +
                               parts[2] * to_float(rows[2][index]) + parts[3] * to_float(rows[3][index]);
        }
        for (int32_t column = 0; column < out_size; ++column) {
            const float *share = &shares[static_cast<size_t>(column) * box.columns];
            Rgb pixel = make_rgb(0.0f, 0.0f, 0.0f);
            for (int32_t at = lefts[column]; at < rights[column]; ++at, ++share) {
                Rgb sum;
                std::memcpy(&sum, &sums[3 * static_cast<size_t>(at - least)], sizeof sum);
                pixel = pixel + *share * sum;
            }
            line.store(column, recolour(job.colour, pixel));
        }
        out = line.narrow_to(out);
    }
}

// Integration for geometries with rotation or shear: the column weights of a box are computed once, not for each row.
// Boxes that extend beyond the photo are integrated pixel by pixel. Loops over `known` columns are unrolled; 0 accepts
// any number of columns.
template <class T, int32_t known>
void integrate_turned(const Source &source, const Job &job, T *out, int32_t out_size) {
    Footprint box = footprint(job.geometry);
    Line line(out_size);
    const int32_t columns = known > 0 ? known : box.columns;
    std::vector<float> shares(columns);
    const float area = 1.0f / (box.width * box.height);
    // One more pixel is required on the right, for `load_wide`.
    const int32_t last_column = source.width - columns - 1, last_row = source.height - box.rows;
    for (int32_t row = 0; row < out_size; ++row) {
        for (int32_t column = 0; column < out_size; ++column) {
            auto [x, y] = position(job.geometry, row, column);
            Span across = span(x, box.width), down = span(y, box.height);
            if (across.first < 0 || across.first > last_column || down.first < 0 || down.first > last_row) {
                line.store(column, recolour(job.colour, integrate(source, box, x, y)));
                continue;
            }
            for (int32_t next = 0; next < columns; ++next)
                shares[next] = overlap(across, box.width, across.first + next);
            Rgb pixel = make_rgb(0.0f, 0.0f, 0.0f);
            const uint8_t *first = address(source, down.first, across.first);
            for (int32_t next = 0; next < box.rows; ++next, first += 3 * source.width) {
                Rgb sum = make_rgb(0.0f, 0.0f, 0.0f);
                for (int32_t tap = 0; tap < columns; ++tap) sum = sum + shares[tap] * load_wide(first + 3 * tap);
                pixel = pixel + area * overlap(down, box.height, down.first + next) * sum;
            }
            line.store(column, recolour(job.colour, pixel));
        }
        out = line.narrow_to(out);
    }
}

template <class T>
void sample_as(const uint8_t *pixels, const Job &job, void *out, int32_t out_size, int32_t mode) {
    Source source{pixels + job.offset, job.height, job.width};
    T *typed = static_cast<T *>(out);
    if (mode == kNearest) return nearest_rows<T>(source, job, typed, out_size);
    // The mode covers the whole batch: it may be set to integrate because of another photo.
    const Footprint box = footprint(job.geometry);
    if (mode == kInterpolate || (box.width == 1.0f && box.height == 1.0f))
        return interpolate_rows<T>(source, job, typed, out_size);
    if (job.geometry[1] == 0.0f && job.geometry[3] == 0.0f) return integrate_upright<T>(source, job, typed, out_size);
    // Minification by at most two (3 columns) and by at most three (4 columns), the common cases in training.
    if (box.columns == 3) return integrate_turned<T, 3>(source, job, typed, out_size);
    if (box.columns == 4) return integrate_turned<T, 4>(source, job, typed, out_size);
    return integrate_turned<T, 0>(source, job, typed, out_size);
}

}  // namespace

extern "C" {

// Sample one photo. `out` is [out_size, out_size, 3] of out_type (0 float32, 1 float16, 2 bfloat16, 3 uint8).
void fastfundus_sample_photo(const uint8_t *pixels, const Job *job, void *out, int32_t out_size, int32_t out_type,
                             int32_t mode) {
    if (out_type == 0) return sample_as<float>(pixels, *job, out, out_size, mode);
    if (out_type == 1) return sample_as<Half>(pixels, *job, out, out_size, mode);
    if (out_type == 2) return sample_as<Brain>(pixels, *job, out, out_size, mode);
    return sample_as<uint8_t>(pixels, *job, out, out_size, mode);
}

}  // extern "C"
