// Arguments of the decoding step of the quadratic relation, and the moments of its pairs.
#pragma once

#include "activations.h"
#include "rows.h"

namespace causalrn {
namespace CAUSALRN_ISA {

enum StepNorm { kStepLayer, kStepRms, kStepNone };
enum StepActivation { kStepExp, kStepRelu, kStepElu };

// Mirrored by causalrn/ops/quadratic/cpu.py. q and out (B, H, D) and gain (B, H) are contiguous floats; the
// cache (B, S, H, D) holds floats or bfloat16 with strides in elements (that of D is 1), of which the first lengths[b]
// positions count; gain, window and slope (H) may be null; scratch has room for one row per item. shift (B, H, D), which
// may be null, asks to shift the rows that go beyond `range` (see quadratic.h) and is written for those; scratch then has
// room for two rows per item.
struct StepArguments {
    const float* q;
    const void* cache;
    const int64_t* lengths;
    float *out, *scratch, *shift;
    const float* gain;
    const int32_t* window;
    const float* slope;
    int64_t batch, positions, heads, channels, batch_stride, position_stride, head_stride, part;
    float eps, range;
    int32_t norm, activation, bf16, threads;
};

// Positions of a cache that one query reaches.
struct StepReach {
    int64_t begin, end;
};

static StepReach step_reach(const StepArguments& a, int64_t b, int64_t h) {
    int64_t end = a.lengths[b], begin = 0;
    if (a.window) begin = max(begin, end - int64_t(a.window[h]));
    return {min(begin, end), end};
}

static float step_gain(const StepArguments& a, int64_t b, int64_t h) { return a.gain ? a.gain[b * a.heads + h] : 1.0f; }

static bool step_is_shifted(const StepArguments& a, int64_t b, int64_t h) {
    const StepReach reach = step_reach(a, b, h);
    const float exponent = __builtin_fabsf(step_gain(a, b, h)) * __builtin_sqrtf(float(a.channels));
    return a.shift && exponent + __builtin_logf(float(reach.end - reach.begin)) > a.range;
}

template <bool kBf16>
CAUSALRN_INLINE vec load_key(const void* row, int64_t d) {
    if (kBf16) return loadu_bf16(static_cast<const uint16_t*>(row) + d);
    return loadu(static_cast<const float*>(row) + d);
}

template <bool kBf16>
CAUSALRN_INLINE float key_at(const void* row, int64_t d) {
    if (kBf16) return float_from_bf16(static_cast<const uint16_t*>(row)[d]);
    return static_cast<const float*>(row)[d];
}

// x = q + k, zero in the lanes beyond `count`.
template <bool kBf16>
CAUSALRN_INLINE vec pair_tail(const float* q, const void* row, int64_t d, int count) {
    alignas(64) float lanes[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane < count ? q[d + lane] + key_at<kBf16>(row, d + lane) : 0;
    return load(lanes);
}

// One query with its share of the arguments.
struct StepQuery {
    const float* q;
    int64_t channels, whole;
    int rest, norm;
    float eps, gain;
};

// Positions taken together: their sums stay in registers while q is loaded once.
constexpr int kRows = 4;

// Sum of squares of x - mean, in a pass of its own.
template <bool kBf16>
static float centred_squares(const StepQuery& query, const void* row, float mean) {
    const vec shift = broadcast(mean);
    vec squares = {};
    for (int64_t d = 0; d < query.whole; d += kWidth) {
        vec x = loadu(query.q + d) + load_key<kBf16>(row, d) - shift;
        squares += x * x;
    }
    float total = sum(squares);
    for (int64_t d = query.whole; d < query.channels; ++d) {
        float x = query.q[d] + key_at<kBf16>(row, d) - mean;
        total += x * x;
    }
    return total;
}

// Mean and 1 / (std + eps) over the channels of x = q + k for `count` rows. The sums are taken of x itself, in which q
// and k have cancelled already.
template <bool kBf16, int count>
CAUSALRN_INLINE void pair_moments(const StepQuery& query, const void* const* rows, float* mean, float* inverse) {
    vec total[count] = {}, squares[count] = {};
    for (int64_t d = 0; d < query.whole; d += kWidth) {
        const vec q = loadu(query.q + d);
        for (int n = 0; n < count; ++n) {
            vec x = q + load_key<kBf16>(rows[n], d);
            total[n] += x;
            squares[n] += x * x;
        }
    }
    if (query.rest) {
        for (int n = 0; n < count; ++n) {
            vec x = pair_tail<kBf16>(query.q, rows[n], query.whole, query.rest);
            total[n] += x;
            squares[n] += x * x;
        }
    }
    const float per_channel = 1.0f / float(query.channels);
    for (int n = 0; n < count; ++n) {
        mean[n] = query.norm == kStepLayer ? sum(total[n]) * per_channel : 0;
        float variance = sum(squares[n]) * per_channel - mean[n] * mean[n];
        // If the mean outweighs the deviation, the difference has lost its digits.
        if (mean[n] * mean[n] > variance) variance = centred_squares<kBf16>(query, rows[n], mean[n]) * per_channel;
        inverse[n] = query.norm == kStepNone ? 1.0f : 1.0f / (__builtin_sqrtf(variance) + query.eps);
    }
    if (query.norm == kStepNone)
        for (int n = 0; n < count; ++n) mean[n] = 0;
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
