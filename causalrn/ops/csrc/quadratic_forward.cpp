// Forward pass of the quadratic relation: never more than a block of pairs at a time, all of it in L1.
#include "quadratic.h"

namespace causalrn {
namespace CAUSALRN_ISA {

constexpr int kQueryBlock = 8;
constexpr int kKeyBlock = 16;

// total += sum over the pairs of weight * act(scale * (q + row)).
template <class Act, bool kWeighted>
static void add_pairs(const float* q, const Pairs<kKeyBlock>& pairs, float gain, int64_t stride, float* total) {
    alignas(64) float scale[kKeyBlock];
    for (int p = 0; p < kKeyBlock; ++p) scale[p] = Act::kScale * gain * pairs.inverse[p];
    for (int64_t d = 0; d < stride; d += kWidth) {
        vec query = load(q + d);
        // A sum of its own per block: long rows would lose digits in one running sum.
        vec partial = {};
        auto add = [&](int p) __attribute__((always_inline)) {
            vec value = Act::value(query + load(pairs.row[p] + d), broadcast(scale[p]));
            if (kWeighted) value *= broadcast(pairs.weight[p]);
            partial += value;
        };
        if (pairs.count == kKeyBlock) {
#pragma GCC unroll 4
            for (int p = 0; p < kKeyBlock; ++p) add(p);
        } else {
            for (int p = 0; p < pairs.count; ++p) add(p);
        }
        store(total + d, load(total + d) + partial);
    }
}

// One block of queries of batch entry `b` and head `h`, first query `first`.
template <class Act, bool kWeighted>
static void forward_block(const QuadraticArguments& a, const Keys& keys, int64_t b, int64_t h, int64_t first,
                          float* scratch) {
    const int64_t stride = keys.stride;
    float* const q = scratch;
    float* const total = q + kQueryBlock * stride;
    float* const exact = total + kQueryBlock * stride;
    float* const zero = exact + kKeyBlock * stride;
    memset(total, 0, sizeof(float) * kQueryBlock * stride);
    memset(zero, 0, sizeof(float) * stride);

    const int rows = int(min(int64_t(kQueryBlock), a.queries - first));
    Query query[kQueryBlock];
    Reach reach[kQueryBlock];
    int64_t begin = a.keys, end = 0;
    for (int n = 0; n < rows; ++n) {
        query[n] = pack_query(a, b, h, first + n, q + n * stride);
        reach[n] = reach_of(a, h, query[n].position);
        begin = min(begin, reach[n].begin);
        end = max(end, reach[n].end);
    }
    Pairs<kKeyBlock> pairs = {}, cancelled = {};
    for (int64_t block = begin; block < end; block += kKeyBlock) {
        float squares[kQueryBlock][kKeyBlock];
        if (a.norm != kNone)
            sums_of_squares<kQueryBlock, kKeyBlock>(q, rows, keys.values + block * stride, stride, 0,
                                                    int(min(int64_t(kKeyBlock), end - block)), squares);
        for (int n = 0; n < rows; ++n) {
            int64_t from = max(block, reach[n].begin), to = min(block + kKeyBlock, reach[n].end);
            if (from >= to) continue;
            form_pairs<kKeyBlock>(a, h, query[n], keys, squares[n] + (from - block), from, int(to - from), pairs, cancelled, exact);
            add_pairs<Act, kWeighted>(query[n].row.values, pairs, query[n].gain, stride, total + n * stride);
            if (cancelled.count) add_pairs<Act, kWeighted>(zero, cancelled, query[n].gain, stride, total + n * stride);
        }
    }
    for (int n = 0; n < rows; ++n)
        store_row(a.out, query_offset(a, b, h, first + n), total + n * stride, a.channels, 1.0f / float(reach[n].count), 0,
                  a.bf16);
}

template <class Act, bool kWeighted>
static int forward(const QuadraticArguments& a) {
    PackedKeys packed(a);
    const int64_t stride = packed.stride, per_thread = (2 * kQueryBlock + kKeyBlock + 1) * stride;
    float* scratch = allocate_floats(a.threads * per_thread);
    if (!scratch || !packed.complete()) {
        free(scratch);
        return kOutOfMemory;
    }
    const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock, groups = a.batch * a.heads;
#pragma omp parallel num_threads(a.threads)
    {
        packed.fill(a);
#pragma omp barrier
        // The longest rows first, so that no thread is left with one at the end.
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < groups * blocks; ++item) {
            int64_t group = item % groups, first = (blocks - 1 - item / groups) * kQueryBlock;
            forward_block<Act, kWeighted>(a, packed.group(group), group / a.heads, group % a.heads, first,
                                          scratch + thread_index() * per_thread);
        }
    }
    free(scratch);
    return kDone;
}

CAUSALRN_EXPORT(int, quadratic_forward)(const QuadraticArguments* arguments) {
    const QuadraticArguments& a = *arguments;
    return with_activation(
        a, [&](auto act) { return a.slope ? forward<decltype(act), true>(a) : forward<decltype(act), false>(a); });
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
