// A linear layer for a few rows of input, whose weights are held in float, bfloat16 or int8: each weight is read from
// memory once and widened in registers, so that a decoding step takes the time of reading them.
#include "simd.h"

namespace causalrn {
namespace CAUSALRN_ISA {

enum WeightType { kFloat, kBfloat16, kInt8 };

// Mirrored by causalrn/ops/weight_only.py. x (rows, inputs) and y (rows, outputs) are contiguous floats, weight is
// (outputs, inputs); scale (outputs) multiplies an int8 weight's rows, bias (outputs) may be null.
struct StoredLinearArguments {
    const float* x;
    const void* weight;
    const float *scale, *bias;
    float* y;
    int64_t rows, inputs, outputs;
    int32_t type, threads;
};

// kWidth signed bytes as floats. GCC 12 takes a conversion of vectors apart into single bytes.
CAUSALRN_INLINE vec loadu_int8(const int8_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    vec x;
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = float(p[lane]);
    return x;
#endif
}

template <int kType>
CAUSALRN_INLINE vec load_weight(const void* weight, int64_t offset) {
    if (kType == kFloat) return loadu(static_cast<const float*>(weight) + offset);
    if (kType == kBfloat16) return loadu_bf16(static_cast<const uint16_t*>(weight) + offset);
    return loadu_int8(static_cast<const int8_t*>(weight) + offset);
}

template <int kType>
CAUSALRN_INLINE float weight_at(const void* weight, int64_t offset) {
    if (kType == kFloat) return static_cast<const float*>(weight)[offset];
    if (kType == kBfloat16) return float_from_bf16(static_cast<const uint16_t*>(weight)[offset]);
    return float(static_cast<const int8_t*>(weight)[offset]);
}

// Fetches two vectors of weights into the second-level cache.
template <int kType>
CAUSALRN_INLINE void prefetch(const void* weight, int64_t offset) {
    const int64_t width = kType == kFloat ? 4 : kType == kBfloat16 ? 2 : 1;
    const char* p = static_cast<const char*>(weight) + offset * width;
    for (int64_t line = 0; line < 2 * kWidth * width; line += 64) __builtin_prefetch(p + line, 0, 2);
}

// Outputs [first, first + kOutputs) of one row of x: as many streams of weights as the hardware follows.
template <int kType, int kOutputs>
CAUSALRN_INLINE void dot(const StoredLinearArguments& a, const float* x, int64_t first, float* y) {
    vec total[kOutputs] = {}, second[kOutputs] = {};
    int64_t d = 0;
    for (; d + 2 * kWidth <= a.inputs; d += 2 * kWidth) {
        const vec left = loadu(x + d), right = loadu(x + d + kWidth);
        for (int n = 0; n < kOutputs; ++n) {
            const int64_t row = (first + n) * a.inputs + d;
            total[n] += left * load_weight<kType>(a.weight, row);
            second[n] += right * load_weight<kType>(a.weight, row + kWidth);
            // Rows are short: the hardware's own prefetching would start anew with each.
            prefetch<kType>(a.weight, row + kOutputs * a.inputs);
        }
    }
    for (int n = 0; n < kOutputs; ++n) {
        const int64_t row = (first + n) * a.inputs;
        float result = sum(total[n] + second[n]);
        for (int64_t rest = d; rest < a.inputs; ++rest) result += x[rest] * weight_at<kType>(a.weight, row + rest);
        if (a.scale) result *= a.scale[first + n];
        y[first + n] = result + (a.bias ? a.bias[first + n] : 0.0f);
    }
}

constexpr int kBlock = 4;

template <int kType>
static int multiply(const StoredLinearArguments& a) {
    const int64_t blocks = (a.outputs + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kBlock;
        // The block's weights stay in the cache from row to row.
        for (int64_t row = 0; row < a.rows; ++row) {
            const float* x = a.x + row * a.inputs;
            float* y = a.y + row * a.outputs;
            if (first + kBlock <= a.outputs) {
                dot<kType, kBlock>(a, x, first, y);
            } else {
                for (int64_t output = first; output < a.outputs; ++output) dot<kType, 1>(a, x, output, y);
            }
        }
    }
    return 0;
}

CAUSALRN_KERNEL(stored_linear, StoredLinearArguments) {
    switch (arguments->type) {
        case kFloat: return multiply<kFloat>(*arguments);
        case kBfloat16: return multiply<kBfloat16>(*arguments);
        default: return multiply<kInt8>(*arguments);
    }
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
