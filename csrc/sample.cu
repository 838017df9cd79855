// `sample` on CUDA without torch: twelve kernels, one per output type and mode, and a launcher. The arithmetic is in
// sample.cuh.
//
// The kernels are looked up by name in the fatbin (engines/cuda_sample.py); the launcher is for programs that link
// against the library. The caller has validated all arguments (kernels/jobs.py).
//
// A block computes kPixels output pixels of one photo in row-major order, gathers them in shared memory and writes them
// together: 16 bytes per thread if the output of a photo is a multiple of 16 bytes (out_size a multiple of 4, or of 2
// for float32), otherwise value by value. uint8 output contains grey levels, rounded and clamped, as engines expect.
#include "sample.cuh"

namespace fastfundus {

constexpr int32_t kPixels = 256;

template <class T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ uint8_t narrow<uint8_t>(float value) {
    return static_cast<uint8_t>(__float2int_rn(fminf(fmaxf(value, 0.0f), 255.0f)));
}

template <class T, Mode mode>
__device__ __forceinline__ void sample_block(const uint8_t *pixels, const Job *jobs, T *out, int32_t out_size) {
    __shared__ alignas(16) T line[3 * kPixels];
    int32_t area = out_size * out_size, blocks = (area + kPixels - 1) / kPixels;
    int64_t photo = blockIdx.x / blocks;
    int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * kPixels;
    int32_t count = area - first < kPixels ? area - first : kPixels;
    int32_t thread = static_cast<int32_t>(threadIdx.x);

    if (thread < count) {
        const Job &job = jobs[photo];
        Source source{pixels + job.offset, job.height, job.width};
        int32_t index = first + thread;
        Rgb pixel = sample_pixel<mode>(source, job.geometry, footprint(job.geometry), index / out_size,
                                       index % out_size);
        pixel = recolour(job.colour, pixel);
        line[3 * thread] = narrow<T>(red(pixel));
        line[3 * thread + 1] = narrow<T>(green(pixel));
        line[3 * thread + 2] = narrow<T>(blue(pixel));
    }
    __syncthreads();

    T *begin = out + 3 * (photo * area + first);
    // int64, because 3 * area * 4 exceeds int32 from 13377 pixels per side.
    if (3 * static_cast<int64_t>(area) * sizeof(T) % 16 == 0) {
        int32_t vectors = 3 * count * static_cast<int32_t>(sizeof(T)) / 16;
        if (thread < vectors) reinterpret_cast<uint4 *>(begin)[thread] = reinterpret_cast<const uint4 *>(line)[thread];
    } else {
        for (int32_t index = thread; index < 3 * count; index += kPixels) begin[index] = line[index];
    }
}

}  // namespace fastfundus

using namespace fastfundus;

#define FASTFUNDUS_KERNEL(type, suffix, mode, name)                                                                \
    extern "C" __global__ void __launch_bounds__(kPixels)                                                          \
        fastfundus_sample_##suffix##_##name(const uint8_t *pixels, const Job *jobs, type *out, int32_t out_size) { \
        sample_block<type, mode>(pixels, jobs, out, out_size);                                                     \
    }
#define FASTFUNDUS_KERNELS(type, suffix)                               \
    FASTFUNDUS_KERNEL(type, suffix, kInterpolate, interpolate)         \
    FASTFUNDUS_KERNEL(type, suffix, kIntegrate, integrate)             \
    FASTFUNDUS_KERNEL(type, suffix, kNearest, nearest)

FASTFUNDUS_KERNELS(float, f32)
FASTFUNDUS_KERNELS(__half, f16)
FASTFUNDUS_KERNELS(__nv_bfloat16, bf16)
FASTFUNDUS_KERNELS(uint8_t, u8)

namespace {

template <class T>
using Kernel = void (*)(const uint8_t *, const Job *, T *, int32_t);

template <class T>
int32_t launch(Kernel<T> kernel, const uint8_t *pixels, const Job *jobs, int64_t count, void *out, int32_t out_size,
               cudaStream_t stream) {
    int64_t blocks = (static_cast<int64_t>(out_size) * out_size + kPixels - 1) / kPixels * count;
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), kPixels, 0, stream>>>(pixels, jobs, static_cast<T *>(out), out_size);
    return cudaGetLastError();
}

}  // namespace

// All pointers are device pointers; `out` must be aligned to 16 bytes. Output types: 0 float32, 1 float16, 2 bfloat16,
// 3 uint8; modes: 0 interpolate, 1 integrate, 2 nearest. Returns a cudaError_t, 0 for success; the kernel runs
// asynchronously in `stream`.
extern "C" int32_t fastfundus_launch_sample(const uint8_t *pixels, const Job *jobs, int64_t count, void *out,
                                            int32_t out_size, int32_t out_type, int32_t mode, void *stream) {
    static const Kernel<float> f32[] = {fastfundus_sample_f32_interpolate, fastfundus_sample_f32_integrate,
                                        fastfundus_sample_f32_nearest};
    static const Kernel<__half> f16[] = {fastfundus_sample_f16_interpolate, fastfundus_sample_f16_integrate,
                                         fastfundus_sample_f16_nearest};
    static const Kernel<__nv_bfloat16> bf16[] = {fastfundus_sample_bf16_interpolate, fastfundus_sample_bf16_integrate,
                                                 fastfundus_sample_bf16_nearest};
    static const Kernel<uint8_t> u8[] = {fastfundus_sample_u8_interpolate, fastfundus_sample_u8_integrate,
                                         fastfundus_sample_u8_nearest};
    if (out_type < 0 || out_type > 3 || mode < 0 || mode > 2) return cudaErrorInvalidValue;
    cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (out_type == 0) return launch(f32[mode], pixels, jobs, count, out, out_size, queue);
    if (out_type == 1) return launch(f16[mode], pixels, jobs, count, out, out_size, queue);
    if (out_type == 2) return launch(bf16[mode], pixels, jobs, count, out, out_size, queue);
    return launch(u8[mode], pixels, jobs, count, out, out_size, queue);
}
