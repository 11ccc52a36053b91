// Forward pass of the quadratic relation: never more than a block of pairs at a time, all of it in L1.
#include "quadratic.h"

namespace causalrn {
namespace CAUSALRN_ISA {

constexpr int kQueryBlock = 8;
constexpr int kKeyBlock = 32;

// total += sum over `count` keys of weight * act(scale * (q + k)), for kVectors vectors of channels.
template <class Act, bool kWeighted, int kVectors>
CAUSALRN_INLINE void add_channels(const float* q, const float* k, const float* scale, const float* weight, int count,
                                  int64_t stride, float* total) {
    vec query[kVectors], partial[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) query[v] = load(q + v * kWidth);
#pragma GCC unroll 2
    for (int p = 0; p < count; ++p) {
        const vec factor = broadcast(scale[p]);
        for (int v = 0; v < kVectors; ++v) {
            vec value = Act::value(query[v] + load(k + p * stride + v * kWidth), factor);
            if (kWeighted) value *= broadcast(weight[p]);
            partial[v] += value;
        }
    }
    // A sum of its own per block: long rows would lose digits in one running sum.
    for (int v = 0; v < kVectors; ++v) store(total + v * kWidth, load(total + v * kWidth) + partial[v]);
}

// The same for all channels.
template <class Act, bool kWeighted>
static void add_pairs(const float* q, const float* k, const float* scale, const float* weight, int count, int64_t stride,
                      float* total) {
    int64_t d = 0;
    for (; d + 2 * kWidth <= stride; d += 2 * kWidth)
        add_channels<Act, kWeighted, 2>(q + d, k + d, scale, weight, count, stride, total + d);
    if (d < stride) add_channels<Act, kWeighted, 1>(q + d, k + d, scale, weight, count, stride, total + d);
}

// As add_pairs for a shifted row: total = sum of exp(scale * (q + k) + offset - top), top the largest exponent so far.
static void add_shifted(const float* q, const float* k, const float* scale, const float* offset, int count, int64_t stride,
                        float* total, float* top) {
    for (int64_t d = 0; d < stride; d += kWidth) {
        const vec query = load(q + d), before = load(top + d);
        vec largest = before, partial = {};
        auto exponent = [&](int p) { return (query + load(k + p * stride + d)) * broadcast(scale[p]) + broadcast(offset[p]); };
        for (int p = 0; p < count; ++p) largest = max(largest, exponent(p));
        for (int p = 0; p < count; ++p) partial += exp(exponent(p) - largest);
        store(total + d, load(total + d) * exp(before - largest) + partial);
        store(top + d, largest);
    }
}

// One block of queries of a batch entry and head, first query `first`.
template <class Act, bool kWeighted>
static void forward_block(const QuadraticArguments& a, const Keys& keys, int64_t first, float* scratch) {
    const int64_t stride = keys.stride;
    float* const q = scratch;
    float* const totals = q + kQueryBlock * stride;
    float* const exact = totals + kQueryBlock * stride;
    float* const zero = exact + stride;
    float* const tops = zero + stride;
    memset(totals, 0, sizeof(float) * kQueryBlock * stride);
    memset(zero, 0, sizeof(float) * stride);

    const int rows = int(min(int64_t(kQueryBlock), a.queries - first));
    Query query[kQueryBlock];
    Reach reach[kQueryBlock];
    int64_t begin = a.keys, end = 0;
    for (int n = 0; n < rows; ++n) {
        query[n] = pack_query(a, keys.batch, keys.head, first + n, q + n * stride);
        reach[n] = reach_of(a, keys.head, query[n].position);
        begin = min(begin, reach[n].begin);
        end = max(end, reach[n].end);
        // Far below every exponent, but with a finite difference from it.
        for (int64_t d = 0; Act::kShifts && d < stride; d += kWidth) store(tops + n * stride + d, broadcast(-1e30f));
    }
    alignas(64) float products[kQueryBlock][kKeyBlock] = {};
    Pairs<kKeyBlock> pairs = {};
    for (int64_t block = begin; block < end; block += kKeyBlock) {
        const float* const k = keys.values + block * stride;
        if (a.norm != kNone)
            inner_products<kQueryBlock, kKeyBlock>(q, rows, k, stride, int(min(int64_t(kKeyBlock), end - block)), products);
        for (int n = 0; n < rows; ++n) {
            const int from = int(max(int64_t(0), reach[n].begin - block));
            const int to = int(min(int64_t(kKeyBlock), reach[n].end - block));
            if (from >= to) continue;
            const bool shifted = Act::kShifts && reach[n].shifted;
            form_pairs<kKeyBlock>(a, query[n], keys, products[n], block, from, to, shifted, pairs);
            float* const total = totals + n * stride;
            const float factor = (shifted ? 1.0f : Act::kScale) * query[n].gain;
            alignas(64) float scale[kKeyBlock];
            for (int p = 0; p < kKeyBlock; ++p) scale[p] = factor * pairs.inverse[p];
            auto add = [&](const float* row, const float* key, const float* scales, int p, int pairs_here) {
                if (Act::kShifts && shifted)
                    add_shifted(row, key, scales, pairs.weight + p, pairs_here, stride, total, tops + n * stride);
                else
                    add_pairs<Act, kWeighted>(row, key, scales, pairs.weight + p, pairs_here, stride, total);
            };
            for (int p = from; p < to;) {
                // As far as the next pair that cancels.
                const uint32_t ahead = pairs.cancelled >> p;
                const int run = ahead ? min(to - p, __builtin_ctz(ahead)) : to - p;
                if (run) {
                    add(q + n * stride, k + p * stride, scale + p, p, run);
                    p += run;
                    continue;
                }
                exact_pair(a, query[n], keys, block + p, exact, pairs.std + p, pairs.inverse + p);
                const float exact_scale = factor * pairs.inverse[p];
                add(zero, exact, &exact_scale, p, 1);
                ++p;
            }
        }
    }
    for (int n = 0; n < rows; ++n) {
        const int64_t offset = query_offset(a, keys.batch, keys.head, first + n);
        store_row(a.out, offset, totals + n * stride, a.channels, 1.0f / float(reach[n].count), 0, a.bf16);
        if (Act::kShifts && reach[n].shifted) store_row(a.shift, offset, tops + n * stride, a.channels, 1, 0, false);
    }
}

template <class Act, bool kWeighted>
static int forward(const QuadraticArguments& a) {
    const int64_t stride = padded(a.channels), rows = ((Act::kShifts ? 3 : 2) * kQueryBlock + 2) * stride;
    const int64_t per_thread = rows + padded(PackedKeys::floats(a));
    float* const scratch = allocate_floats(a.threads * per_thread);
    Share* const shares = static_cast<Share*>(malloc(sizeof(Share) * a.threads));
    const bool complete = scratch && shares;
    if (complete) {
        cut_shares(a, kQueryBlock, shares);
#pragma omp parallel for num_threads(a.threads) schedule(static, 1)
        for (int thread = 0; thread < a.threads; ++thread) {
            float* const memory = scratch + thread * per_thread;
            each_group(a, shares[thread], kQueryBlock, memory + rows,
                       [&](const Keys& keys, int64_t, int64_t begin, int64_t end) {
                           for (int64_t first = begin; first < end; first += kQueryBlock)
                               forward_block<Act, kWeighted>(a, keys, first, memory);
                       });
        }
    }
    free(scratch);
    free(shares);
    return complete ? kDone : kOutOfMemory;
}

CAUSALRN_KERNEL(quadratic_forward, QuadraticArguments) {
    const QuadraticArguments& a = *arguments;
    return with_activation(
        a, [&](auto act) { return a.slope ? forward<decltype(act), true>(a) : forward<decltype(act), false>(a); });
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
