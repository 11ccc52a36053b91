// Rows of tensors in either dtype, and their float32 copies in scratch memory, padded to whole vectors.
#pragma once

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

// A function that not every source calls.
#define CAUSALRN_STATIC [[maybe_unused]] static

namespace causalrn {
namespace CAUSALRN_ISA {

CAUSALRN_INLINE int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

enum Status { kDone = 0, kOutOfMemory = 1 };

// The channels of a row, padded with zeros to whole vectors.
CAUSALRN_INLINE int64_t padded(int64_t channels) { return (channels + kWidth - 1) / kWidth * kWidth; }

CAUSALRN_INLINE vec load_row(const void* tensor, int64_t offset, int count, bool bf16) {
    alignas(64) float lanes[kWidth];
    if (bf16) {
        const uint16_t* p = static_cast<const uint16_t*>(tensor) + offset;
        if (count == kWidth) return loadu_bf16(p);
        for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane < count ? float_from_bf16(p[lane]) : 0;
        return load(lanes);
    }
    const float* p = static_cast<const float*>(tensor) + offset;
    return count == kWidth ? loadu(p) : load_part(p, count);
}

// Stores the first `count` lanes.
CAUSALRN_INLINE void store_lanes(void* tensor, int64_t offset, vec value, int count, bool bf16) {
    if (bf16) {
        uint16_t* p = static_cast<uint16_t*>(tensor) + offset;
        if (count == kWidth) return storeu_bf16(p, value);
        for (int lane = 0; lane < count; ++lane) p[lane] = bf16_from_float(value[lane]);
        return;
    }
    float* p = static_cast<float*>(tensor) + offset;
    if (count == kWidth) return storeu(p, value);
    store_part(p, value, count);
}

// tensor[offset ...] = factor * (row - shift).
CAUSALRN_STATIC void store_row(void* tensor, int64_t offset, const float* row, int64_t channels, float factor, float shift,
                      bool bf16) {
    for (int64_t d = 0; d < channels; d += kWidth) {
        vec value = factor * (load(row + d) - shift);
        store_lanes(tensor, offset + d, value, int(min(int64_t(kWidth), channels - d)), bf16);
    }
}

// Sum of a row of scratch memory without its padding, which may hold anything.
CAUSALRN_INLINE float row_sum(const float* row, int64_t channels) {
    vec total = {};
    for (int64_t d = 0; d < channels; d += kWidth) total += load_part(row + d, int(min(int64_t(kWidth), channels - d)));
    return sum(total);
}

// Half as many doubles as floats fit into a vector.
typedef double dvec __attribute__((vector_size(4 * kWidth)));
typedef float half_vec __attribute__((vector_size(2 * kWidth)));

CAUSALRN_INLINE dvec widen(const float* p) {
    half_vec x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, dvec);
}
CAUSALRN_INLINE void narrow(float* p, dvec x) {
    half_vec rounded = __builtin_convertvector(x, half_vec);
    memcpy(p, &rounded, sizeof rounded);
}

// Statistics of a row in scratch memory.
struct Row {
    // The mean, which was taken off.
    double mean;
    // The sum of the squares of the rest.
    float squares;
};

// Copies a row into scratch memory, less its mean if it is to be centred.
CAUSALRN_STATIC Row pack_row(const void* tensor, int64_t offset, int64_t channels, bool bf16, bool centre, float* values) {
    const int64_t stride = padded(channels);
    double mean = 0;
    // Sums of their own: one running sum would wait for itself.
    dvec lower = {}, upper = {};
    for (int64_t d = 0; d < stride; d += kWidth) {
        store(values + d, load_row(tensor, offset + d, int(min(int64_t(kWidth), channels - d)), bf16));
        if (!centre) continue;
        lower += widen(values + d);
        upper += widen(values + d + kWidth / 2);
    }
    if (centre) {
        lower += upper;
        for (int lane = 0; lane < kWidth / 2; ++lane) mean += lower[lane];
        mean /= double(channels);
    }
    // The mean as a sum of two floats: what is left of x is as precise as if taken in double.
    const float rounded = float(mean);
    const vec high = broadcast(rounded), low = broadcast(float(mean - double(rounded)));
    vec squares[2] = {};
    for (int64_t d = 0; d < stride; d += kWidth) {
        vec value = load(values + d) - high - low;
        if (d + kWidth > channels) value = select_first(value, int(channels - d));
        store(values + d, value);
        squares[d / kWidth % 2] += value * value;
    }
    return {mean, sum(squares[0] + squares[1])};
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
