// One decoding step of the quadratic relation: one query per batch entry and head against a pool of keys, which is
// read from memory once. See csrc/quadratic.h for the equation.
#include "activations.h"
#include "simd.h"

namespace causalrn {
namespace CAUSALRN_ISA {

enum StepNorm { kStepLayer, kStepRms, kStepNone };
enum StepActivation { kStepExp, kStepRelu, kStepElu };

// Mirrored by causalrn/ops/quadratic_step_native.py. q and out (B, H, D) and gain (B, H) are contiguous floats; the
// pool (B, S, H, D) holds floats or bfloat16 with `pool_stride` elements from one batch entry to the next, of which the
// first lengths[b] positions count; gain, window and slope (H) may be null; scratch has room for one row per item.
struct StepArguments {
    const float* q;
    const void* pool;
    const int64_t* lengths;
    float *out, *scratch;
    const float* gain;
    const int32_t* window;
    const float* slope;
    int64_t batch, positions, heads, channels, pool_stride, part;
    float eps;
    int32_t norm, activation, bf16, threads;
};

// Positions of a pool that one query reaches.
struct StepReach {
    int64_t begin, end;
};

static StepReach step_reach(const StepArguments& a, int64_t b, int64_t h) {
    int64_t end = a.lengths[b], begin = 0;
    if (a.window) begin = max(begin, end - int64_t(a.window[h]));
    return {min(begin, end), end};
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

// Mean and 1 / (std + eps) of x = q + k over the channels. The sums are taken of x itself, in which q and k have
// cancelled already, and the row of k stays in L1 from pass to pass.
template <bool kBf16>
CAUSALRN_INLINE void pair_moments(const StepArguments& a, const float* q, const void* row, float* mean, float* inverse) {
    const int64_t whole = a.channels / kWidth * kWidth;
    const int rest = int(a.channels - whole);
    *mean = 0;
    *inverse = 1;
    if (a.norm == kStepNone) return;
    if (a.norm == kStepLayer) {
        vec total[4] = {};
        int64_t d = 0;
        for (; d + 4 * kWidth <= whole; d += 4 * kWidth)
            for (int n = 0; n < 4; ++n) total[n] += loadu(q + d + n * kWidth) + load_key<kBf16>(row, d + n * kWidth);
        for (; d < whole; d += kWidth) total[0] += loadu(q + d) + load_key<kBf16>(row, d);
        if (rest) total[1] += pair_tail<kBf16>(q, row, whole, rest);
        *mean = sum((total[0] + total[1]) + (total[2] + total[3])) / float(a.channels);
    }
    const vec shift = broadcast(*mean);
    vec squares[4] = {};
    int64_t d = 0;
    for (; d + 4 * kWidth <= whole; d += 4 * kWidth)
        for (int n = 0; n < 4; ++n) {
            vec x = loadu(q + d + n * kWidth) + load_key<kBf16>(row, d + n * kWidth) - shift;
            squares[n] += x * x;
        }
    for (; d < whole; d += kWidth) {
        vec x = loadu(q + d) + load_key<kBf16>(row, d) - shift;
        squares[0] += x * x;
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (d = whole; d < a.channels; ++d) {
        float x = q[d] + key_at<kBf16>(row, d) - *mean;
        total += x * x;
    }
    *inverse = 1.0f / (__builtin_sqrtf(total / float(a.channels)) + a.eps);
}

// Adds the positions [begin, end) of one query to its row `total`, D floats.
template <class Act, bool kBf16>
static void add_positions(const StepArguments& a, int64_t b, int64_t h, int64_t begin, int64_t end, float* total) {
    const int64_t whole = a.channels / kWidth * kWidth;
    const int rest = int(a.channels - whole);
    const float* q = a.q + (b * a.heads + h) * a.channels;
    const float gain = a.gain ? a.gain[b * a.heads + h] : 1.0f;
    const int64_t row_stride = a.heads * a.channels, width = kBf16 ? 2 : 4;
    const char* pool = static_cast<const char*>(a.pool) + (b * a.pool_stride + h * a.channels) * width;
    memset(total, 0, sizeof(float) * size_t(a.channels));
    for (int64_t j = begin; j < end; ++j) {
        const void* row = pool + j * row_stride * width;
        float mean, inverse;
        pair_moments<kBf16>(a, q, row, &mean, &inverse);
        const vec shift = broadcast(mean), scale = broadcast(Act::kScale * gain * inverse);
        vec weight = broadcast(1);
        if (a.slope) weight = exp(broadcast(-a.slope[h] * float(a.lengths[b] - 1 - j)));
        for (int64_t d = 0; d < whole; d += kWidth) {
            vec value = Act::value(loadu(q + d) + load_key<kBf16>(row, d) - shift, scale);
            storeu(total + d, loadu(total + d) + value * weight);
        }
        if (rest) {
            vec value = Act::value(pair_tail<kBf16>(q, row, whole, rest) - shift, scale);
            store_part(total + whole, load_part(total + whole, rest) + value * weight, rest);
        }
    }
}

// The parts are of a fixed length and are added up in order, so that the result does not depend on the threads.
template <class Act, bool kBf16>
static int run_step(const StepArguments& a) {
    const int64_t parts = (a.positions + a.part - 1) / a.part, queries = a.batch * a.heads;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < queries * parts; ++item) {
            const int64_t query = item / parts, b = query / a.heads, h = query % a.heads;
            const StepReach reach = step_reach(a, b, h);
            const int64_t begin = max(reach.begin, item % parts * a.part);
            const int64_t end = min(reach.end, item % parts * a.part + a.part);
            add_positions<Act, kBf16>(a, b, h, begin, end, a.scratch + item * a.channels);
        }
#pragma omp for schedule(static)
        for (int64_t query = 0; query < queries; ++query) {
            const StepReach reach = step_reach(a, query / a.heads, query % a.heads);
            float* out = a.out + query * a.channels;
            const float* rows = a.scratch + query * parts * a.channels;
            for (int64_t d = 0; d < a.channels; ++d) {
                float total = 0;
                for (int64_t part = 0; part < parts; ++part) total += rows[part * a.channels + d];
                out[d] = total / float(reach.end - reach.begin);
            }
        }
    }
    return 0;
}

// Whether every argument of exp is known to stay where exp_steps holds: |norm(x)| <= sqrt(D).
static bool step_exp_is_bounded(const StepArguments& a) {
    if (a.norm == kStepNone) return false;
    float largest = a.gain ? 0 : 1;
    for (int64_t n = 0; a.gain && n < a.batch * a.heads; ++n) {
        float size = a.gain[n] < 0 ? -a.gain[n] : a.gain[n];
        // Not `>`: a NaN must end up in `largest`.
        largest = size <= largest ? largest : size;
    }
    return largest * __builtin_sqrtf(float(a.channels)) < 86.0f;
}

template <bool kBf16>
static int with_step_activation(const StepArguments& a) {
    switch (a.activation) {
        case kStepExp: return step_exp_is_bounded(a) ? run_step<BoundedExp, kBf16>(a) : run_step<Exp, kBf16>(a);
        case kStepRelu: return run_step<Relu, kBf16>(a);
        case kStepElu: return run_step<Elu, kBf16>(a);
        default: return run_step<Gelu, kBf16>(a);
    }
}

CAUSALRN_EXPORT(int, quadratic_step)(const StepArguments* arguments) {
    return arguments->bf16 ? with_step_activation<true>(*arguments) : with_step_activation<false>(*arguments);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
