// Backward pass of the quadratic relation: one activation per pair and channel, in one pass; what points along x follows
// for a block of pairs as two small matrix products.
//
// With g = grad_i / n_i and w = weight_ij g act'(gain_i z), z = r x:
//     dx_ij = gain_i (r w - c x),  c = r mean_d(w z) / std;   dgain_i = sum_jd w z
//     dq_i = sum_j dx_ij, dk_j = sum_i dx_ij, both centred at the end for "layer".
// The shift of a row counts as a constant.
#include "quadratic_tiles.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Queries or keys after which a running sum is added to the whole one: in one sum long rows would lose digits.
constexpr int kSpan = 256;

// Scratch memory of one thread.
struct Workspace {
    float *q, *grad, *dq, *recent_dq, *exact, *zero, *shift;

    static int64_t size(int64_t stride, bool shifts) { return ((shifts ? 5 : 4) * kQueryBlock + 2) * stride; }
    Workspace(float* memory, int64_t stride)
        : q(memory),
          grad(q + kQueryBlock * stride),
          dq(grad + kQueryBlock * stride),
          recent_dq(dq + kQueryBlock * stride),
          exact(recent_dq + kQueryBlock * stride),
          zero(exact + stride),
          shift(zero + stride) {}
};

// One block of queries of a batch entry and head, first query `first`; adds to dk of that entry and head.
template <class Act, bool kGained>
static void backward_block(const QuadraticArguments& a, const Keys& keys, int64_t first, const Workspace& work, float* dk) {
    const int64_t stride = keys.stride;
    const int rows = int(min(int64_t(kQueryBlock), a.queries - first));
    const float per_channel = 1.0f / float(a.channels);
    memset(work.dq, 0, sizeof(float) * kQueryBlock * stride);
    memset(work.recent_dq, 0, sizeof(float) * kQueryBlock * stride);
    memset(work.zero, 0, sizeof(float) * stride);
    Query query[kQueryBlock];
    Reach reach[kQueryBlock];
    double dgain[kQueryBlock] = {};
    int64_t begin = a.keys, end = 0;
    for (int n = 0; n < rows; ++n) {
        query[n] = pack_query(a, keys.batch, keys.head, first + n, work.q + n * stride);
        reach[n] = reach_of(a, keys.head, query[n].position);
        begin = min(begin, reach[n].begin);
        end = max(end, reach[n].end);
        float* const grad = work.grad + n * stride;
        const vec factor = broadcast(1.0f / float(reach[n].count));
        pack_row(a.grad, query_offset(a, keys.batch, keys.head, first + n), a.channels, a.bf16, false, grad);
        for (int64_t d = 0; d < stride; d += kWidth) store(grad + d, load(grad + d) * factor);
        if (Act::kShifts && reach[n].shifted)
            pack_row(a.shift, query_offset(a, keys.batch, keys.head, first + n), a.channels, false, false, work.shift + n * stride);
    }
    alignas(64) float products[kQueryBlock][kKeyBlock] = {}, radial[kQueryBlock][kKeyBlock];
    Pairs<kKeyBlock> pairs[kQueryBlock] = {};
    int from[kQueryBlock], to[kQueryBlock];
    for (int64_t block = begin; block < end; block += kKeyBlock) {
        const int count = int(min(int64_t(kKeyBlock), end - block));
        const float* const k = keys.values + block * stride;
        float* const block_dk = dk + block * stride;
        if (a.norm != kNone) inner_products<kQueryBlock, kKeyBlock>(work.q, rows, k, stride, count, products);
        for (int n = 0; n < rows; ++n) {
            from[n] = int(min(int64_t(count), max(int64_t(0), reach[n].begin - block)));
            to[n] = int(max(int64_t(0), min(int64_t(count), reach[n].end - block)));
            form_pairs<kKeyBlock>(a, query[n], keys, products[n], block, from[n], to[n], Act::kShifts && reach[n].shifted, pairs[n]);
        }
        memset(radial, 0, sizeof radial);

        auto tile_query = [&](int n, int p) {
            return TileQuery{work.q + n * stride, work.grad + n * stride, work.recent_dq + n * stride, query[n].gain,
                             pairs[n].std + p, pairs[n].inverse + p, pairs[n].weight + p, radial[n] + p, dgain + n,
                             work.shift + n * stride};
        };
        auto fills_tile = [&](int n, int p) {
            return n < rows && from[n] <= p && p + kTileKeys <= to[n] && !(pairs[n].cancelled >> p & ((1u << kTileKeys) - 1));
        };
        auto add_one = [&](int n, int p) {
            TileQuery tile = tile_query(n, p);
            float* const one_dk = block_dk + p * stride;
            if (!(pairs[n].cancelled >> p & 1u)) {
                add_query<Act, kGained, 1>(reach[n].shifted, per_channel, stride, &tile, k + p * stride, one_dk);
                return;
            }
            // q and k nearly cancel, and so would their parts of radial x.
            exact_pair(a, query[n], keys, block + p, work.exact, pairs[n].std + p, pairs[n].inverse + p);
            tile.q = work.zero;
            add_query<Act, kGained, 1>(reach[n].shifted, per_channel, stride, &tile, work.exact, one_dk);
            subtract_row(radial[n][p], work.exact, stride, tile.dq);
            subtract_row(radial[n][p], work.exact, stride, one_dk);
            radial[n][p] = 0;
        };
        for (int n = 0; n < rows; n += kTileQueries) {
            for (int p = 0; p < count; p += kTileKeys) {
                const TileQuery tile[kTileQueries] = {tile_query(n, p), tile_query(n + 1, p)};
                const bool alone = Act::kShifts && (reach[n].shifted || (n + 1 < rows && reach[n + 1].shifted));
                if (!alone && fills_tile(n, p) && fills_tile(n + 1, p)) {
                    add_tile<Act, kGained, kTileQueries, kTileKeys>(per_channel, stride, tile, k + p * stride,
                                                                    block_dk + p * stride);
                    continue;
                }
                for (int m = n; m < min(n + kTileQueries, rows); ++m) {
                    if (fills_tile(m, p)) {
                        add_query<Act, kGained, kTileKeys>(reach[m].shifted, per_channel, stride, tile + (m - n), k + p * stride,
                                                           block_dk + p * stride);
                        continue;
                    }
                    for (int one = max(p, from[m]); one < min(p + kTileKeys, to[m]); ++one) add_one(m, one);
                }
            }
        }
        if (a.norm != kNone) subtract_radial(radial, rows, count, work.q, k, stride, work.recent_dq, block_dk);
        if ((block - begin) / kKeyBlock % (kSpan / kKeyBlock) == kSpan / kKeyBlock - 1)
            flush(work.recent_dq, rows * stride, work.dq);
    }
    flush(work.recent_dq, rows * stride, work.dq);
    for (int n = 0; n < rows; ++n) {
        const float* dq = work.dq + n * stride;
        store_row(a.dq, query_offset(a, keys.batch, keys.head, first + n), dq, a.channels, 1, mean_to_remove(a, dq), a.bf16);
        if (a.dgain) a.dgain[(keys.batch * a.heads + keys.head) * a.queries + first + n] = float(dgain[n]);
    }
}

// Writes row j of dk.
CAUSALRN_INLINE void store_key(const QuadraticArguments& a, int64_t group, int64_t j, const float* row) {
    const int64_t offset = key_offset(a, group / a.heads, group % a.heads, j);
    store_row(a.dk, offset, row, a.channels, 1, mean_to_remove(a, row), a.bf16);
}

// A thread's share of the work and its sums: dk of the first group of the share, and of each other one in turn; `recent` is
// the running sum of a span of queries where there are several. A group that is whole in a share is written at once. The
// parts of one that is split are added up at the end in the order of the threads, so that the sums are the same in every run
// with this number of threads.
struct Part {
    Share share;
    float *sums[2], *recent;

    bool has(int64_t group, int64_t blocks) const {
        return share.begin < min(share.end, (group + 1) * blocks) && group * blocks < share.end;
    }
    float* of(int64_t group, int64_t blocks) const { return sums[group != share.begin / blocks]; }
};

template <class Act, bool kGained>
static int backward(const QuadraticArguments& a) {
    const int64_t stride = padded(a.channels), group_size = a.keys * stride;
    const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
    const int64_t rows = Workspace::size(stride, Act::kShifts), per_thread = rows + padded(PackedKeys::floats(a));
    Share* const shares = static_cast<Share*>(malloc(sizeof(Share) * a.threads));
    Part* const parts = static_cast<Part*>(malloc(sizeof(Part) * a.threads));
    float* const scratch = allocate_floats(a.threads * (per_thread + 3 * group_size));
    const bool complete = shares && parts && scratch;
    if (complete) {
        cut_shares(a, kQueryBlock, shares);
        for (int thread = 0; thread < a.threads; ++thread) {
            float* const memory = scratch + a.threads * per_thread + 3 * thread * group_size;
            parts[thread] = {shares[thread], {memory, memory + group_size}, memory + 2 * group_size};
        }
#pragma omp parallel num_threads(a.threads)
        {
#pragma omp for schedule(static, 1)
            for (int thread = 0; thread < a.threads; ++thread) {
                float* const memory = scratch + thread * per_thread;
                const Workspace work(memory, stride);
                auto run = [&](const Keys& keys, int64_t group, int64_t begin, int64_t end) {
                    float* const dk = parts[thread].of(group, blocks);
                    float* const recent = end - begin > kSpan ? parts[thread].recent : dk;
                    memset(dk, 0, sizeof(float) * group_size);
                    if (recent != dk) memset(recent, 0, sizeof(float) * group_size);
                    for (int64_t first = begin; first < end; first += kQueryBlock) {
                        backward_block<Act, kGained>(a, keys, first, work, recent);
                        const bool last = first + kQueryBlock >= end;
                        const bool span_ends = (first - begin) % kSpan == kSpan - kQueryBlock;
                        if (recent != dk && (last || span_ends)) flush(recent, group_size, dk);
                    }
                    if (begin == 0 && end == a.queries)
                        for (int64_t j = 0; j < a.keys; ++j) store_key(a, group, j, dk + j * stride);
                };
                each_group(a, parts[thread].share, kQueryBlock, memory + rows, run);
            }
            for (int64_t group = -1, thread = 1; thread < a.threads; ++thread) {
                const Share share = parts[thread].share;
                // Once for each group that a share begins within.
                if (share.begin == share.end || share.begin % blocks == 0 || share.begin / blocks == group) continue;
                group = share.begin / blocks;
                int64_t first = thread - 1;
                while (!parts[first].has(group, blocks)) --first;
#pragma omp for schedule(static)
                for (int64_t j = 0; j < a.keys; ++j) {
                    float* const total = parts[first].of(group, blocks) + j * stride;
                    for (int64_t other = thread; other < a.threads; ++other) {
                        if (!parts[other].has(group, blocks)) continue;
                        const float* const part = parts[other].of(group, blocks) + j * stride;
                        for (int64_t d = 0; d < stride; d += kWidth) store(total + d, load(total + d) + load(part + d));
                    }
                    store_key(a, group, j, total);
                }
            }
        }
    }
    free(shares);
    free(parts);
    free(scratch);
    return complete ? kDone : kOutOfMemory;
}

CAUSALRN_KERNEL(quadratic_backward, QuadraticArguments) {
    const QuadraticArguments& a = *arguments;
    return with_activation(
        a, [&](auto act) { return a.gain ? backward<decltype(act), true>(a) : backward<decltype(act), false>(a); });
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
