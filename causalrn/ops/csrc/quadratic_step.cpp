// One decoding step of the quadratic relation: one query per batch entry and head against a cache of keys, which is
// read from memory once. See csrc/quadratic.h for the equation.
#include "quadratic_step.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Adds `count` positions, with a weight each, to the row `total`. `next` rows further on are fetched meanwhile.
template <class Act, bool kBf16, bool kWeighted, int count>
CAUSALRN_INLINE void add_rows(const StepQuery& query, const void* const* rows, const float* weights, int64_t next,
                              float* total) {
    float mean[count], inverse[count];
    pair_moments<kBf16, count>(query, rows, mean, inverse);
    vec shift[count], scale[count], weight[count];
    for (int n = 0; n < count; ++n) {
        shift[n] = broadcast(mean[n]);
        scale[n] = broadcast(Act::kScale * query.gain * inverse[n]);
        weight[n] = broadcast(weights[n]);
    }
    for (int64_t d = 0; d < query.whole; d += kWidth) {
        const vec q = loadu(query.q + d);
        vec partial = {};
        for (int n = 0; n < count; ++n) {
            vec value = Act::value(q + load_key<kBf16>(rows[n], d) - shift[n], scale[n]);
            // Without a weight the last product of exp and this sum are one instruction.
            partial += kWeighted ? weight[n] * value : value;
            __builtin_prefetch(static_cast<const char*>(rows[n]) + next + d * (kBf16 ? 2 : 4), 0, 2);
        }
        storeu(total + d, loadu(total + d) + partial);
    }
    if (query.rest) {
        vec partial = load_part(total + query.whole, query.rest);
        for (int n = 0; n < count; ++n) {
            vec x = pair_tail<kBf16>(query.q, rows[n], query.whole, query.rest) - shift[n];
            partial += weight[n] * Act::value(x, scale[n]);
        }
        store_part(total + query.whole, partial, query.rest);
    }
}

// As add_rows for a shifted row, whose weights are their logarithms: `top` holds the largest exponent of each channel.
template <bool kBf16, int count>
CAUSALRN_INLINE void add_shifted_rows(const StepQuery& query, const void* const* rows, const float* weights, float* total,
                                      float* top) {
    float mean[count], inverse[count];
    pair_moments<kBf16, count>(query, rows, mean, inverse);
    for (int64_t d = 0; d < query.channels; d += kWidth) {
        const int lanes = int(min(int64_t(kWidth), query.channels - d));
        const vec before = load_part(top + d, lanes);
        vec exponent[count], largest = before;
        for (int n = 0; n < count; ++n) {
            vec x = pair_tail<kBf16>(query.q, rows[n], d, lanes) - broadcast(mean[n]);
            exponent[n] = x * broadcast(query.gain * inverse[n]) + broadcast(weights[n]);
            largest = max(largest, exponent[n]);
        }
        vec sums = load_part(total + d, lanes) * exp(before - largest);
        for (int n = 0; n < count; ++n) sums += exp(exponent[n] - largest);
        store_part(total + d, sums, lanes);
        store_part(top + d, largest, lanes);
    }
}

// Sets `total` (D floats) to the sum over the positions [begin, end) of one query, relative to `top` if that is not null.
template <class Act, bool kBf16, bool kWeighted>
static void add_positions(const StepArguments& a, int64_t b, int64_t h, int64_t begin, int64_t end, float* total, float* top) {
    const int64_t whole = a.channels / kWidth * kWidth;
    const StepQuery query = {a.q + (b * a.heads + h) * a.channels, a.channels, whole, int(a.channels - whole), a.norm,
                             a.eps, step_gain(a, b, h)};
    const int64_t width = kBf16 ? 2 : 4, row_bytes = a.position_stride * width;
    const char* cache = static_cast<const char*>(a.cache) + (b * a.batch_stride + h * a.head_stride) * width;
    memset(total, 0, sizeof(float) * size_t(a.channels));
    // Far below every exponent, but with a finite difference from it.
    for (int64_t d = 0; Act::kShifts && top && d < a.channels; ++d) top[d] = -1e30f;
    const void* rows[kRows];
    alignas(64) float weights[kRows];
    for (int64_t j = begin; j < end; j += kRows) {
        const int count = int(min(int64_t(kRows), end - j));
        for (int n = 0; n < count; ++n) {
            rows[n] = cache + (j + n) * row_bytes;
            const float log_weight = kWeighted ? -a.slope[h] * float(a.lengths[b] - 1 - j - n) : 0.0f;
            weights[n] = Act::kShifts && top ? log_weight : kWeighted ? exp(broadcast(log_weight))[0] : 1.0f;
        }
        if (Act::kShifts && top) {
            if (count == kRows)
                add_shifted_rows<kBf16, kRows>(query, rows, weights, total, top);
            else
                for (int n = 0; n < count; ++n) add_shifted_rows<kBf16, 1>(query, rows + n, weights + n, total, top);
            continue;
        }
        if (count == kRows) {
            add_rows<Act, kBf16, kWeighted, kRows>(query, rows, weights, kRows * row_bytes, total);
        } else {
            for (int n = 0; n < count; ++n) add_rows<Act, kBf16, kWeighted, 1>(query, rows + n, weights + n, 0, total);
        }
    }
}

// Adds up the parts of a shifted row, each relative to its own `tops`; gives what they are relative to together.
CAUSALRN_STATIC void join_shifted(const float* rows, const float* tops, int64_t parts, int64_t channels, float share, float* out,
                                  float* shift) {
    for (int64_t d = 0; d < channels; d += kWidth) {
        const int lanes = int(min(int64_t(kWidth), channels - d));
        vec largest = load_part(tops + d, lanes), total = {};
        for (int64_t part = 1; part < parts; ++part) largest = max(largest, load_part(tops + part * channels + d, lanes));
        for (int64_t part = 0; part < parts; ++part)
            total += load_part(rows + part * channels + d, lanes) * exp(load_part(tops + part * channels + d, lanes) - largest);
        store_part(out + d, total * share, lanes);
        store_part(shift + d, largest, lanes);
    }
}

// The parts are of a fixed length and are added up in order, so that the result does not depend on the threads.
template <class Act, bool kBf16, bool kWeighted>
static int run_step(const StepArguments& a) {
    const int64_t parts = (a.positions + a.part - 1) / a.part, queries = a.batch * a.heads;
    float* const tops = a.scratch + queries * parts * a.channels;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < queries * parts; ++item) {
            const int64_t query = item / parts, b = query / a.heads, h = query % a.heads;
            const StepReach reach = step_reach(a, b, h);
            const int64_t begin = max(reach.begin, item % parts * a.part);
            const int64_t end = min(reach.end, item % parts * a.part + a.part);
            const bool shifted = Act::kShifts && step_is_shifted(a, b, h);
            float* const top = shifted ? tops + item * a.channels : nullptr;
            add_positions<Act, kBf16, kWeighted>(a, b, h, begin, end, a.scratch + item * a.channels, top);
        }
#pragma omp for schedule(static)
        for (int64_t query = 0; query < queries; ++query) {
            const StepReach reach = step_reach(a, query / a.heads, query % a.heads);
            float* out = a.out + query * a.channels;
            const float* rows = a.scratch + query * parts * a.channels;
            if (Act::kShifts && step_is_shifted(a, query / a.heads, query % a.heads)) {
                const float share = 1.0f / float(reach.end - reach.begin);
                join_shifted(rows, tops + query * parts * a.channels, parts, a.channels, share, out, a.shift + query * a.channels);
                continue;
            }
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

static bool any_step_shifted(const StepArguments& a) {
    for (int64_t n = 0; a.shift && n < a.batch * a.heads; ++n)
        if (step_is_shifted(a, n / a.heads, n % a.heads)) return true;
    return false;
}

template <bool kBf16, bool kWeighted>
static int with_activation(const StepArguments& a) {
    switch (a.activation) {
        case kStepExp:
            if (any_step_shifted(a)) return run_step<ShiftedExp, kBf16, kWeighted>(a);
            return step_exp_is_bounded(a) ? run_step<BoundedExp, kBf16, kWeighted>(a) : run_step<Exp, kBf16, kWeighted>(a);
        case kStepRelu: return run_step<Relu, kBf16, kWeighted>(a);
        case kStepElu: return run_step<Elu, kBf16, kWeighted>(a);
        default: return run_step<Gelu, kBf16, kWeighted>(a);
    }
}

template <bool kBf16>
static int with_weights(const StepArguments& a) {
    return a.slope ? with_activation<kBf16, true>(a) : with_activation<kBf16, false>(a);
}

CAUSALRN_KERNEL(quadratic_step, StepArguments) {
    return arguments->bf16 ? with_weights<true>(*arguments) : with_weights<false>(*arguments);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
