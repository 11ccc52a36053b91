// Shared by the forward and the backward pass of the quadratic relation: arguments, packed rows, pairs.
//
//     out_i = 1/n_i sum_j weight_ij act(gain_i r_ij x_ij),   x_ij = q_i + k_j (centred for "layer"),
//     r_ij = 1 / (std_ij + eps),  std_ij^2 = mean_d x_ijd^2
//
// A shifted row sums exp(gain_i r_ij x_ij - slope |i - j| - shift_i) instead, shift_i the largest exponent of each channel.
#pragma once

#include "activations.h"
#include "rows.h"

namespace causalrn {
namespace CAUSALRN_ISA {

enum Norm { kLayer, kRms, kNone };
enum Activation { kExp, kRelu, kElu, kGelu };

// Mirrored by causalrn/ops/quadratic/cpu.py. Tensors are contiguous: q, out, grad, dq (B, Tq, H, D), k, dk
// (B, Tk, H, D), all of one type; gain (Tq, H), dgain (B, H, Tq), window and slope (H) may be null. shift (B, Tq, H, D),
// which may be null, asks to shift the rows that go beyond `range`: the forward pass writes those, the backward reads them.
struct QuadraticArguments {
    const void *q, *k, *grad;
    void *out, *dq, *dk;
    const float* gain;
    float* dgain;
    const int32_t* window;
    const float* slope;
    float* shift;
    int64_t batch, queries, keys, heads, channels;
    float eps, range;
    int32_t causal, norm, activation, bf16, threads;
};

// Which keys a query at `position` reaches, and how many of them carry a weight that is not 0 in float.
struct Reach {
    int64_t begin, end, count;
    bool shifted;
};

// Bound of |gain_i norm(x_ij)|: |norm(x)| <= sqrt(D).
CAUSALRN_INLINE float largest_exponent(const QuadraticArguments& a, int64_t head, int64_t position) {
    const float gain = a.gain ? a.gain[(position - (a.keys - a.queries)) * a.heads + head] : 1.0f;
    return __builtin_fabsf(gain) * __builtin_sqrtf(float(a.channels));
}

CAUSALRN_INLINE Reach reach_of(const QuadraticArguments& a, int64_t head, int64_t position) {
    int64_t begin = 0, end = a.causal ? position + 1 : a.keys;
    auto cut = [&](int64_t distance) {
        begin = max(begin, position - distance + 1);
        end = min(end, position + distance);
    };
    if (a.window) cut(max(int64_t(0), int64_t(a.window[head])));
    int64_t count = max(int64_t(0), end - begin);
    const float exponent = a.shift ? largest_exponent(a, head, position) : 0;
    const bool shifted = a.shift && exponent + __builtin_logf(float(count)) > a.range;
    // exp(-104) is below the smallest float; between the least and the largest pair of a shifted row lie twice its exponent.
    const double smallest = shifted ? 104.0 + 2 * exponent : 104.0;
    if (a.slope && a.slope[head] > 0 && smallest / a.slope[head] < double(a.keys)) cut(int64_t(smallest / a.slope[head]) + 1);
    return {begin, end, count, shifted};
}

CAUSALRN_INLINE int64_t key_offset(const QuadraticArguments& a, int64_t b, int64_t h, int64_t j) {
    return ((b * a.keys + j) * a.heads + h) * a.channels;
}

// The keys of one batch entry and head, packed: row j is `values + j * stride`.
struct Keys {
    const float *values, *squares;
    const double* means;
    int64_t stride, batch, head;
};

// One thread's packed copy of the keys of the batch entry and head that it works on: small enough to stay in its cache.
struct PackedKeys {
    // A block of keys may be read beyond the last key; what is read there is not used.
    static constexpr int kReadAhead = 32;
    float *values, *squares;
    double* means;
    int64_t stride;

    static int64_t floats(const QuadraticArguments& a) {
        return (a.keys + kReadAhead) * padded(a.channels) + padded(a.keys + kReadAhead) + 2 * padded(a.keys);
    }
    PackedKeys(const QuadraticArguments& a, float* memory)
        : values(memory),
          squares(values + (a.keys + kReadAhead) * padded(a.channels)),
          means(reinterpret_cast<double*>(squares + padded(a.keys + kReadAhead))),
          stride(padded(a.channels)) {}

    // Packs the keys [begin, end) of a group, which is a batch entry and head.
    Keys pack(const QuadraticArguments& a, int64_t group, int64_t begin, int64_t end) const {
        const int64_t batch = group / a.heads, head = group % a.heads;
        for (int64_t j = begin; j < end; ++j) {
            Row row = pack_row(a.k, key_offset(a, batch, head, j), a.channels, a.bf16, a.norm == kLayer, values + j * stride);
            squares[j] = row.squares;
            means[j] = row.mean;
        }
        return {values, squares, means, stride, batch, head};
    }
};

// The work is cut into one contiguous share per thread, by the number of pairs. An item is a block of `size` queries of
// a group, the blocks of a group in order: the same items go to the same thread in every run with this number of threads.
struct Share {
    int64_t begin, end;
};

CAUSALRN_STATIC void cut_shares(const QuadraticArguments& a, int64_t size, Share* shares) {
    const int64_t blocks = (a.queries + size - 1) / size, items = a.batch * a.heads * blocks;
    auto cost = [&](int64_t item) {
        int64_t middle = min((item % blocks) * size + size / 2, a.queries - 1);
        Reach reach = reach_of(a, item / blocks % a.heads, middle + a.keys - a.queries);
        return double(max(int64_t(1), reach.end - reach.begin));
    };
    double total = 0, sum = 0;
    for (int64_t item = 0; item < items; ++item) total += cost(item);
    int64_t item = 0;
    for (int thread = 0; thread < a.threads; ++thread) {
        shares[thread].begin = item;
        while (item < items && sum + 0.5 * cost(item) < total * (thread + 1) / a.threads) sum += cost(item++);
        if (thread == a.threads - 1) item = items;
        shares[thread].end = item;
    }
}

// Calls run(keys, group, begin, end) with the queries of each group of a share, the group's keys packed.
template <class Run>
CAUSALRN_INLINE void each_group(const QuadraticArguments& a, const Share& share, int64_t size, float* memory, Run run) {
    const PackedKeys packed(a, memory);
    const int64_t blocks = (a.queries + size - 1) / size;
    for (int64_t item = share.begin; item < share.end;) {
        const int64_t group = item / blocks, next = min(share.end, (group + 1) * blocks);
        const int64_t begin = item % blocks * size, end = min(a.queries, (next - group * blocks) * size);
        int64_t first = a.keys, last = 0;
        for (int64_t query = begin; query < end; ++query) {
            const Reach reach = reach_of(a, group % a.heads, query + a.keys - a.queries);
            first = min(first, reach.begin);
            last = max(last, reach.end);
        }
        run(packed.pack(a, group, first, last), group, begin, end);
        item = next;
    }
}

struct Query {
    const float* values;
    Row row;
    float gain;
    int64_t index, position;
};

CAUSALRN_INLINE int64_t query_offset(const QuadraticArguments& a, int64_t b, int64_t h, int64_t i) {
    return ((b * a.queries + i) * a.heads + h) * a.channels;
}

CAUSALRN_INLINE Query pack_query(const QuadraticArguments& a, int64_t b, int64_t h, int64_t i, float* values) {
    Row row = pack_row(a.q, query_offset(a, b, h, i), a.channels, a.bf16, a.norm == kLayer, values);
    return {values, row, a.gain ? a.gain[i * a.heads + h] : 1.0f, i, i + a.keys - a.queries};
}

// Through the centring of "layer" no gradient of a row has a mean.
CAUSALRN_INLINE float mean_to_remove(const QuadraticArguments& a, const float* row) {
    return a.norm == kLayer ? row_sum(row, a.channels) / float(a.channels) : 0.0f;
}

// The pairs of one query with a block of keys: standard deviation, its inverse, weight; where q and k nearly cancel,
// bit p of `cancelled` is set and the pair must be formed by exact_pair. Of a shifted row, the weight is its logarithm.
template <int kBlock>
struct Pairs {
    alignas(64) float std[kBlock], inverse[kBlock], weight[kBlock];
    uint32_t cancelled;
};

// products[n][p] = q_n . k_p for the queries of a block and `keys` keys, rounded up to groups of 4: each loaded row then
// serves several pairs. Both blocks are readable to their full size.
template <int kQueries, int kBlock>
static void inner_products(const float* q, int queries, const float* k, int64_t stride, int keys,
                           float (*products)[kBlock]) {
    for (int p = 0; p < keys; p += 4) {
        for (int n = 0; n < queries; n += 4) {
            vec total[4][4] = {};
            for (int64_t d = 0; d < stride; d += kWidth) {
                vec row[4];
                for (int key = 0; key < 4; ++key) row[key] = load(k + (p + key) * stride + d);
                for (int query = 0; query < 4; ++query) {
                    vec value = load(q + (n + query) * stride + d);
                    for (int key = 0; key < 4; ++key) total[query][key] += value * row[key];
                }
            }
            for (int query = 0; query < 4; ++query) sum_four(total[query], products[n + query] + p);
        }
    }
}

// Where q + k is this much shorter than q and k themselves (squared), the rounding of what it is formed from shows.
constexpr float kCancelled = 0.25f;

template <class Number>
CAUSALRN_INLINE void normalise(const QuadraticArguments& a, Number squares, Number* std, Number* inverse) {
    *std = square_root(squares * (1.0f / float(a.channels)));
    *inverse = 1.0f / (*std + a.eps);
}

// Statistics of a query's pairs with the keys from `begin` on, of which [from, to) are in reach, given q . k.
template <int kBlock>
static void form_pairs(const QuadraticArguments& a, const Query& query, const Keys& keys, const float* products,
                       int64_t begin, int from, int to, bool shifted, Pairs<kBlock>& pairs) {
    pairs.cancelled = 0;
    if (a.slope) {
        for (int p = 0; p < kBlock; ++p) {
            int64_t distance = query.position - (begin + p);
            pairs.weight[p] = -a.slope[keys.head] * float(distance < 0 ? -distance : distance);
        }
        for (int p = 0; p < kBlock && !shifted; p += kWidth) store(pairs.weight + p, exp(load(pairs.weight + p)));
    } else {
        for (int p = 0; p < kBlock; ++p) pairs.weight[p] = shifted ? 0 : 1;
    }
    if (a.norm == kNone) {
        for (int p = 0; p < kBlock; ++p) {
            pairs.inverse[p] = 1;
            pairs.std[p] = 0;
        }
        return;
    }
    const vec limit = broadcast(kCancelled), own = broadcast(query.row.squares);
    alignas(64) int32_t cancelled[kBlock];
    int any = 0;
    for (int p = 0; p < kBlock; p += kWidth) {
        vec longest = own + loadu(keys.squares + begin + p);
        vec squares = longest + 2.0f * load(products + p), std, inverse;
        normalise(a, max(squares, vec{}), &std, &inverse);
        store(pairs.std + p, std);
        store(pairs.inverse + p, inverse);
        // A NaN counts as cancelled.
        ivec mask = ~(squares >= limit * longest);
        any |= any_of(mask);
        memcpy(cancelled + p, &mask, sizeof mask);
    }
    if (!any) return;
    for (int p = from; p < to; ++p) pairs.cancelled |= uint32_t(cancelled[p] != 0) << p;
}

// Forms x of one pair to full precision, from the tensors and the means in double, with its statistics.
CAUSALRN_STATIC void exact_pair(const QuadraticArguments& a, const Query& query, const Keys& keys, int64_t key, float* x,
                       float* std, float* inverse) {
    const int64_t first = query_offset(a, keys.batch, keys.head, query.index);
    const int64_t second = key_offset(a, keys.batch, keys.head, key);
    const double mean = query.row.mean + keys.means[key];
    vec total = {};
    for (int64_t d = 0; d < keys.stride; d += kWidth) {
        const int count = int(min(int64_t(kWidth), a.channels - d));
        alignas(64) float q[kWidth], k[kWidth];
        store(q, load_row(a.q, first + d, count, a.bf16));
        store(k, load_row(a.k, second + d, count, a.bf16));
        for (int lane = 0; lane < kWidth; lane += kWidth / 2) narrow(x + d + lane, widen(q + lane) + widen(k + lane) - mean);
        vec value = load_part(x + d, count);
        store(x + d, value);
        total += value * value;
    }
    normalise(a, sum(total), std, inverse);
}

// Whether every argument of exp is known to stay where exp_steps holds: |norm(x)| <= sqrt(D).
CAUSALRN_STATIC bool exp_is_bounded(const QuadraticArguments& a) {
    if (a.norm == kNone) return false;
    const float reach = __builtin_sqrtf(float(a.channels)), largest = 86.0f;
    bool bounded = reach < largest;
    for (int64_t n = 0; a.gain && n < a.queries * a.heads; ++n)
        bounded = bounded && a.gain[n] * reach < largest && a.gain[n] * reach > -largest;
    return bounded;
}

CAUSALRN_STATIC bool any_shifted(const QuadraticArguments& a) {
    for (int64_t n = 0; a.shift && n < a.queries * a.heads; ++n)
        if (reach_of(a, n % a.heads, n / a.heads + a.keys - a.queries).shifted) return true;
    return false;
}

// Calls run(activation) with the activation of the arguments.
template <class Run>
CAUSALRN_INLINE int with_activation(const QuadraticArguments& a, Run run) {
    switch (a.activation) {
        case kExp:
            if (any_shifted(a)) return run(ShiftedExp{});
            return exp_is_bounded(a) ? run(BoundedExp{}) : run(Exp{});
        case kRelu: return run(Relu{});
        case kElu: return run(Elu{});
        default: return run(Gelu{});
    }
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
