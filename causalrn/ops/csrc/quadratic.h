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
[[maybe_unused]] static void store_row(void* tensor, int64_t offset, const float* row, int64_t channels, float factor, float shift,
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

// A row in scratch memory, less its mean where the norm centres.
struct Row {
    const float* values;
    // Of `values`.
    float squares;
    double mean;
    // Where the row begins in its tensor.
    int64_t offset;
};

static Row pack_row(const void* tensor, int64_t offset, int64_t channels, bool bf16, bool centre, float* values) {
    const int64_t stride = padded(channels), whole = channels / kWidth * kWidth;
    for (int64_t d = 0; d < whole; d += kWidth) store(values + d, load_row(tensor, offset + d, kWidth, bf16));
    if (whole < channels) store(values + whole, load_row(tensor, offset + whole, int(channels - whole), bf16));
    double mean = 0;
    if (centre) {
        dvec total = {};
        for (int64_t d = 0; d < stride; d += kWidth / 2) total += widen(values + d);
        for (int lane = 0; lane < kWidth / 2; ++lane) mean += total[lane];
        mean /= double(channels);
        for (int64_t d = 0; d < stride; d += kWidth / 2) narrow(values + d, widen(values + d) - mean);
        for (int64_t d = channels; d < stride; ++d) values[d] = 0;
    }
    vec squares = {};
    for (int64_t d = 0; d < stride; d += kWidth) squares += load(values + d) * load(values + d);
    return {values, sum(squares), mean, offset};
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

// The keys of one batch entry and head, packed: row j is `values + j * stride`, and `rows[j]` tells of it.
struct Keys {
    const float* values;
    const Row* rows;
    int64_t stride;
};

// All keys in scratch memory: filled by every thread of a team together.
struct PackedKeys {
    // A block of keys may be read beyond the last key; what is read there is not used.
    static constexpr int kReadAhead = 16;
    const int64_t stride, keys, count;
    float* const values;
    Row* const rows;

    explicit PackedKeys(const QuadraticArguments& a)
        : stride(padded(a.channels)),
          keys(a.keys),
          count(a.batch * a.heads * a.keys),
          values(allocate_floats((count + kReadAhead) * padded(a.channels))),
          rows(static_cast<Row*>(malloc(sizeof(Row) * count))) {}
    ~PackedKeys() {
        free(values);
        free(rows);
    }
    PackedKeys(const PackedKeys&) = delete;

    bool complete() const { return values && rows; }

    void fill(const QuadraticArguments& a) const {
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < count; ++row) {
            int64_t group = row / a.keys, j = row % a.keys;
            int64_t offset = ((group / a.heads * a.keys + j) * a.heads + group % a.heads) * a.channels;
            rows[row] = pack_row(a.k, offset, a.channels, a.bf16, a.norm == kLayer, values + row * stride);
        }
    }

    // The keys of one batch entry and head.
    Keys group(int64_t index) const {
        return {values + index * keys * stride, rows + index * keys, stride};
    }
};

struct Query {
    Row row;
    float gain;
    int64_t position;
};

CAUSALRN_INLINE int64_t query_offset(const QuadraticArguments& a, int64_t b, int64_t h, int64_t i) {
    return ((b * a.queries + i) * a.heads + h) * a.channels;
}

CAUSALRN_INLINE Query pack_query(const QuadraticArguments& a, int64_t b, int64_t h, int64_t i, float* values) {
    Row row = pack_row(a.q, query_offset(a, b, h, i), a.channels, a.bf16, a.norm == kLayer, values);
    return {row, a.gain ? a.gain[i * a.heads + h] : 1.0f, i + a.keys - a.queries};
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

// squares[n][p] = |q_n + k_p|^2 for the queries of a block and the keys [begin, end), rounded outwards to groups of 4
// keys and 2 queries: each loaded row then serves several pairs. Both blocks are readable to their full size.
template <int kQueries, int kBlock>
static void sums_of_squares(const float* q, int queries, const float* k, int64_t stride, int begin, int end,
                            float (*squares)[kBlock]) {
    for (int p = begin / 4 * 4; p < end; p += 4) {
        const float* row = k + p * stride;
        for (int n = 0; n < queries; n += 2) {
            vec total[2][4] = {};
            for (int64_t d = 0; d < stride; d += kWidth) {
                vec first = load(q + n * stride + d), second = load(q + (n + 1) * stride + d);
                for (int key = 0; key < 4; ++key) {
                    vec value = load(row + key * stride + d);
                    total[0][key] += (first + value) * (first + value);
                    total[1][key] += (second + value) * (second + value);
                }
            }
            sum_four(total[0], squares[n] + p);
            sum_four(total[1], squares[n + 1] + p);
        }
    }
}

// Where q + k is this much shorter than q and k themselves (squared), the rounding of the packed rows shows.
constexpr float kCancelled = 0.25f;

CAUSALRN_INLINE bool cancels(const Query& query, const Keys& keys, int64_t key, float squares) {
    return !(squares >= kCancelled * (query.row.squares + keys.rows[key].squares));
}

// Moves the pairs that nearly cancel from `pairs` to `cancelled`, whose x is formed to full precision in `exact`.
template <int kBlock>
static void split_cancelled(const QuadraticArguments& a, const Query& query, const Keys& keys, Pairs<kBlock>& pairs, float* squares,
                            Pairs<kBlock>& cancelled, float* cancelled_squares, float* exact) {
    int kept = 0;
    for (int p = 0; p < pairs.count; ++p) {
        const int64_t key = pairs.key[p];
        const bool moved = cancels(query, keys, key, squares[p]);
        Pairs<kBlock>& to = moved ? cancelled : pairs;
        const int place = moved ? cancelled.count++ : kept++;
        to.row[place] = pairs.row[p];
        to.key[place] = pairs.key[p];
        to.weight[place] = pairs.weight[p];
        (moved ? cancelled_squares : squares)[place] = squares[p];
        if (!moved) continue;
        float* x = exact + place * keys.stride;
        const Row other = keys.rows[key];
        vec total = {};
        for (int64_t d = 0; d < keys.stride; d += kWidth) {
            const int count = int(min(int64_t(kWidth), a.channels - d));
            alignas(64) float first[kWidth], second[kWidth];
            store(first, load_row(a.q, query.row.offset + d, count, a.bf16));
            store(second, load_row(a.k, other.offset + d, count, a.bf16));
            const double mean = query.row.mean + other.mean;
            for (int lane = 0; lane < kWidth; lane += kWidth / 2)
                narrow(x + d + lane, widen(first + lane) + widen(second + lane) - mean);
            vec value = load_part(x + d, count);
            store(x + d, value);
            total += value * value;
        }
        cancelled.row[place] = x;
        cancelled_squares[place] = sum(total);
    }
    pairs.count = kept;
}

// Fills `pairs` with the keys [begin, begin + count) of a query, whose sums of squares are given, and `cancelled` with
// those of them where q and k nearly cancel; `exact` has kBlock rows.
template <int kBlock>
static void form_pairs(const QuadraticArguments& a, int64_t head, const Query& query, const Keys& keys,
                       const float* given_squares, int64_t begin, int count, Pairs<kBlock>& pairs,
                       Pairs<kBlock>& cancelled, float* exact) {
    pairs.count = count;
    cancelled.count = 0;
    const float* row = keys.values + begin * keys.stride;
    for (int p = 0; p < kBlock; ++p, row += keys.stride) {
        pairs.row[p] = row;
        pairs.key[p] = int(begin) + p;
    }
    if (a.slope) {
        for (int p = 0; p < kBlock; ++p) {
            int64_t distance = query.position - pairs.key[p];
            pairs.weight[p] = -a.slope[head] * float(distance < 0 ? -distance : distance);
        }
        for (int p = 0; p < kBlock; p += kWidth) {
            const int part = min(kWidth, kBlock - p);
            store_part(pairs.weight + p, exp(load_part(pairs.weight + p, part)), part);
        }
    }
    if (a.norm == kNone) {
        for (int p = 0; p < kBlock; ++p) {
            pairs.inverse[p] = 1;
            pairs.std[p] = 0;
        }
        return;
    }
    alignas(64) float squares[kBlock] = {}, cancelled_squares[kBlock] = {};
    int any = 0;
    for (int p = 0; p < count; ++p) {
        squares[p] = given_squares[p];
        any |= cancels(query, keys, begin + p, squares[p]);
    }
    auto normalise = [&](Pairs<kBlock>& of, const float* sums) __attribute__((always_inline)) {
        const float per_channel = 1.0f / float(a.channels), eps = a.eps;
        for (int p = 0; p < kBlock; ++p) of.std[p] = __builtin_sqrtf(sums[p] * per_channel);
        for (int p = 0; p < kBlock; ++p) of.inverse[p] = 1.0f / (of.std[p] + eps);
    };
    // Without centring, q + k has been rounded once only.
    if (any && a.norm == kLayer) {
        split_cancelled<kBlock>(a, query, keys, pairs, squares, cancelled, cancelled_squares, exact);
        normalise(cancelled, cancelled_squares);
    }
    normalise(pairs, squares);
}

// Whether every argument of exp is known to stay where exp_steps holds: |norm(x)| <= sqrt(D).
static bool exp_is_bounded(const QuadraticArguments& a) {
    if (a.norm == kNone) return false;
    const float reach = __builtin_sqrtf(float(a.channels)), largest = 86.0f;
    bool bounded = reach < largest;
    for (int64_t n = 0; a.gain && n < a.queries * a.heads; ++n)
        bounded = bounded && a.gain[n] * reach < largest && a.gain[n] * reach > -largest;
    return bounded;
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
