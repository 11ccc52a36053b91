// What the forward and the backward pass of the quadratic relation share: arguments, packed rows, pairs.
//
//     out_i = 1/n_i sum_j weight_ij act(gain_i r_ij x_ij),   x_ij = q_i + k_j (centred for "layer"),
//     r_ij = 1 / (std_ij + eps),  std_ij^2 = mean_d x_ijd^2
#pragma once

#include "activations.h"
#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace causalrn {
namespace CAUSALRN_ISA {

enum Norm { kLayer, kRms, kNone };
enum Activation { kExp, kRelu, kElu, kGelu };

// Mirrored by causalrn/ops/quadratic_native.py. Tensors are contiguous: q, out, grad, dq (B, Tq, H, D), k, dk
// (B, Tk, H, D), all of one type; gain (Tq, H), dgain (B, H, Tq), window and slope (H) may be null.
struct QuadraticArguments {
    const void *q, *k, *grad;
    void *out, *dq, *dk;
    const float* gain;
    float* dgain;
    const int32_t* window;
    const float* slope;
    int64_t batch, queries, keys, heads, channels;
    float eps;
    int32_t causal, norm, activation, bf16, threads;
};

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

// tensor[offset ...] = factor * (row - shift).
static void store_row(void* tensor, int64_t offset, const float* row, int64_t channels, float factor, float shift,
                      bool bf16) {
    for (int64_t d = 0; d < channels; d += kWidth) {
        vec value = factor * (load(row + d) - shift);
        int count = int(min(int64_t(kWidth), channels - d));
        if (bf16) {
            uint16_t* p = static_cast<uint16_t*>(tensor) + offset + d;
            if (count == kWidth) {
                storeu_bf16(p, value);
            } else {
                for (int lane = 0; lane < count; ++lane) p[lane] = bf16_from_float(value[lane]);
            }
        } else {
            float* p = static_cast<float*>(tensor) + offset + d;
            if (count == kWidth) {
                storeu(p, value);
            } else {
                store_part(p, value, count);
            }
        }
    }
}

// Sum of a row of scratch memory without its padding, which may hold anything.
CAUSALRN_INLINE float row_sum(const float* row, int64_t channels) {
    vec total = {};
    for (int64_t d = 0; d < channels; d += kWidth) total += load_part(row + d, int(min(int64_t(kWidth), channels - d)));
    return sum(total);
}

// Copies a row into scratch: `high` + `low` is the row less its mean (with centre) to twice the digits of a float, so
// that high_i + high_j, where these cancel, can be corrected by low_i + low_j. Returns the sum of squares of `high`.
static float pack_row(const void* tensor, int64_t offset, int64_t channels, bool bf16, bool centre, float* high,
                      float* low) {
    const int64_t stride = padded(channels);
    for (int64_t d = 0; d < channels; d += kWidth)
        store(high + d, load_row(tensor, offset + d, int(min(int64_t(kWidth), channels - d)), bf16));
    if (centre) {
        double totals[kWidth] = {};
        for (int64_t d = 0; d < stride; d += kWidth)
            for (int lane = 0; lane < kWidth; ++lane) totals[lane] += double(high[d + lane]);
        double mean = 0;
        for (int lane = 0; lane < kWidth; ++lane) mean += totals[lane];
        mean /= double(channels);
        for (int64_t d = 0; d < stride; ++d) {
            double exact = double(high[d]) - mean;
            high[d] = float(exact);
            low[d] = float(exact - double(high[d]));
        }
        for (int64_t d = channels; d < stride; ++d) high[d] = low[d] = 0;
    }
    vec squares = {};
    for (int64_t d = 0; d < stride; d += kWidth) squares += load(high + d) * load(high + d);
    return sum(squares);
}

// Which keys a query at `position` reaches, and how many of them carry a weight that is not 0 in float.
struct Reach {
    int64_t begin, end, count;
};

CAUSALRN_INLINE Reach reach_of(const QuadraticArguments& a, int64_t head, int64_t position) {
    int64_t begin = 0, end = a.causal ? position + 1 : a.keys;
    auto cut = [&](int64_t distance) {
        begin = max(begin, position - distance + 1);
        end = min(end, position + distance);
    };
    if (a.window) cut(max(int64_t(0), int64_t(a.window[head])));
    int64_t count = max(int64_t(0), end - begin);
    // exp(-104) is below the smallest float.
    if (a.slope && a.slope[head] > 0 && 104.0 / a.slope[head] < double(a.keys)) cut(int64_t(104.0 / a.slope[head]) + 1);
    return {begin, end, count};
}

// The keys of one batch entry and head, packed.
struct Keys {
    const float *high, *low, *squares;
    int64_t stride;
};

// All keys in scratch memory: filled by every thread of a team together.
struct PackedKeys {
    const int64_t stride, keys, rows;
    float* const memory;

    explicit PackedKeys(const QuadraticArguments& a)
        : stride(padded(a.channels)),
          keys(a.keys),
          rows(a.batch * a.heads * a.keys),
          memory(allocate_floats(rows * (2 * padded(a.channels) + 1))) {}
    ~PackedKeys() { free(memory); }
    PackedKeys(const PackedKeys&) = delete;

    float* high() const { return memory; }
    float* low() const { return memory + rows * stride; }
    float* squares() const { return memory + 2 * rows * stride; }

    void fill(const QuadraticArguments& a) const {
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows; ++row) {
            int64_t group = row / a.keys, j = row % a.keys;
            int64_t offset = ((group / a.heads * a.keys + j) * a.heads + group % a.heads) * a.channels;
            squares()[row] = pack_row(a.k, offset, a.channels, a.bf16, a.norm == kLayer, high() + row * stride,
                                      low() + row * stride);
        }
    }

    // The keys of one batch entry and head.
    Keys group(int64_t index) const {
        int64_t first = index * keys;
        return {high() + first * stride, low() + first * stride, squares() + first, stride};
    }
};

struct Query {
    const float *high, *low;
    float squares, gain;
    int64_t position;
};

CAUSALRN_INLINE int64_t query_offset(const QuadraticArguments& a, int64_t b, int64_t h, int64_t i) {
    return ((b * a.queries + i) * a.heads + h) * a.channels;
}

CAUSALRN_INLINE Query pack_query(const QuadraticArguments& a, int64_t b, int64_t h, int64_t i, float* high, float* low) {
    float squares = pack_row(a.q, query_offset(a, b, h, i), a.channels, a.bf16, a.norm == kLayer, high, low);
    return {high, low, squares, a.gain ? a.gain[i * a.heads + h] : 1.0f, i + a.keys - a.queries};
}

// Through the centring of "layer" no gradient of a row has a mean.
CAUSALRN_INLINE float mean_to_remove(const QuadraticArguments& a, const float* row) {
    return a.norm == kLayer ? row_sum(row, a.channels) / float(a.channels) : 0.0f;
}

// Up to kBlock pairs of one query: pair p has x = q + row[p], where q is the query's row, or zero when the rows hold x.
template <int kBlock>
struct Pairs {
    int count;
    const float* row[kBlock];
    int key[kBlock];
    alignas(64) float inverse[kBlock], std[kBlock], weight[kBlock];
};

// Sums of squares of q + k for `count` consecutive keys.
template <int kBlock>
CAUSALRN_INLINE void sums_of_squares(const float* q, const float* k, int64_t stride, int count, float* squares) {
    for (int p = 0; p < count; p += 4) {
        const float* row[4];
        for (int n = 0; n < 4; ++n) row[n] = k + min(p + n, count - 1) * stride;
        vec total[4] = {};
        for (int64_t d = 0; d < stride; d += kWidth) {
            vec query = load(q + d);
            for (int n = 0; n < 4; ++n) {
                vec x = query + load(row[n] + d);
                total[n] += x * x;
            }
        }
        sum_four(total, squares + p);
    }
}

// Where q + k is this much shorter than q and k themselves (squared), the rounding of the packed rows shows.
constexpr float kCancelled = 0.25f;

// Fills `pairs` with the keys [begin, begin + count) of a query, and `cancelled` with those of them where q and k nearly
// cancel, whose x is then formed to full precision in `exact` (kBlock rows).
template <int kBlock>
static void form_pairs(const QuadraticArguments& a, int64_t head, const Query& query, const Keys& keys, int64_t begin,
                       int count, Pairs<kBlock>& pairs, Pairs<kBlock>& cancelled, float* exact) {
    const float* k = keys.high + begin * keys.stride;
    pairs.count = count;
    cancelled.count = 0;
    for (int p = 0; p < kBlock; ++p) {
        pairs.row[p] = k + p * keys.stride;
        pairs.key[p] = int(begin) + p;
        pairs.inverse[p] = pairs.weight[p] = 1;
        pairs.std[p] = 0;
    }
    if (a.slope) {
        for (int p = 0; p < kBlock; ++p) {
            int64_t distance = query.position - pairs.key[p];
            pairs.weight[p] = -a.slope[head] * float(distance < 0 ? -distance : distance);
        }
        for (int p = 0; p < kBlock; p += kWidth) store(pairs.weight + p, exp(load(pairs.weight + p)));
    }
    if (a.norm == kNone) return;

    const float per_channel = 1.0f / float(a.channels);
    alignas(64) float squares[kBlock] = {};
    sums_of_squares<kBlock>(query.high, k, keys.stride, count, squares);
    if (a.norm == kLayer) {
        int kept = 0;
        for (int p = 0; p < count; ++p) {
            if (squares[p] >= kCancelled * (query.squares + keys.squares[begin + p])) {
                pairs.row[kept] = pairs.row[p];
                pairs.key[kept] = pairs.key[p];
                pairs.weight[kept] = pairs.weight[p];
                squares[kept++] = squares[p];
                continue;
            }
            float* x = exact + cancelled.count * keys.stride;
            const float* low = keys.low + (begin + p) * keys.stride;
            vec total = {};
            for (int64_t d = 0; d < keys.stride; d += kWidth) {
                vec value = (load(query.high + d) + load(pairs.row[p] + d)) + (load(query.low + d) + load(low + d));
                store(x + d, value);
                total += value * value;
            }
            cancelled.row[cancelled.count] = x;
            cancelled.key[cancelled.count] = pairs.key[p];
            cancelled.weight[cancelled.count] = pairs.weight[p];
            cancelled.std[cancelled.count] = __builtin_sqrtf(sum(total) * per_channel);
            cancelled.inverse[cancelled.count] = 1.0f / (cancelled.std[cancelled.count] + a.eps);
            ++cancelled.count;
        }
        pairs.count = kept;
    }
    for (int p = 0; p < kBlock; ++p) pairs.std[p] = __builtin_sqrtf(squares[p] * per_channel);
    for (int p = 0; p < kBlock; ++p) pairs.inverse[p] = 1.0f / (pairs.std[p] + a.eps);
}

// Whether every argument of exp is known to stay where exp_steps holds: |norm(x)| <= sqrt(D).
static bool exp_is_bounded(const QuadraticArguments& a) {
    float largest = 1;
    if (a.norm == kNone) return false;
    if (a.gain) {
        largest = 0;
        for (int64_t n = 0; n < a.queries * a.heads; ++n) {
            float size = a.gain[n] < 0 ? -a.gain[n] : a.gain[n];
            // Not `>`: a NaN must end up in `largest`.
            largest = size <= largest ? largest : size;
        }
    }
    return largest * __builtin_sqrtf(float(a.channels)) < 86.0f;
}

// Calls run(activation) with the activation of the arguments.
template <class Run>
CAUSALRN_INLINE int with_activation(const QuadraticArguments& a, Run run) {
    switch (a.activation) {
        case kExp: return exp_is_bounded(a) ? run(BoundedExp{}) : run(Exp{});
        case kRelu: return run(Relu{});
        case kElu: return run(Elu{});
        default: return run(Gelu{});
    }
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
