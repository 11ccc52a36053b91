// Backward pass of the quadratic relation: one activation per pair and channel, its row kept in L1 while it is reduced.
//
// With g = grad_i / n_i and w = weight_ij g act'(gain_i z), z = r x:
//     dx_ij = gain_i (r w - c x),  c = r mean_d(w z) / std;   dgain_i = sum_jd w z
//     dq_i = sum_j dx_ij, dk_j = sum_i dx_ij, both centred at the end for "layer".
#include "quadratic.h"

namespace causalrn {
namespace CAUSALRN_ISA {

constexpr int kQueryBlock = 8;
constexpr int kKeyBlock = 16;
// A tile of pairs that share their loaded rows: two queries with four keys.
constexpr int kTileQueries = 2;
constexpr int kTileKeys = 4;

// Scratch memory of one thread.
struct Workspace {
    float *q, *grad, *dq, *dk, *exact, *zero, *w;

    static int64_t size(int64_t stride) {
        return (3 * kQueryBlock + kKeyBlock + 2 + kTileQueries * kTileKeys) * stride;
    }
    Workspace(float* memory, int64_t stride)
        : q(memory),
          grad(q + kQueryBlock * stride),
          dq(grad + kQueryBlock * stride),
          dk(dq + kQueryBlock * stride),
          exact(dk + kKeyBlock * stride),
          zero(exact + stride),
          w(zero + stride) {}
};

// Rows of one query of a tile, and statistics of its pairs.
struct TileQuery {
    const float *q, *grad;
    float* dq;
    float gain;
    const float *std, *inverse, *weight;
};

// Adds the gradients of kQueries x kKeys pairs to dq and dk, and to dgain per query.
template <class Act, bool kWeighted, int kQueries, int kKeys>
CAUSALRN_INLINE void add_tile(float per_channel, int64_t stride, const TileQuery* query, const float* k,
                              float* dk, float* w, double* dgain) {
    vec products[kQueries][kTileKeys] = {}, scale[kQueries][kKeys], weight[kQueries][kKeys];
    for (int n = 0; n < kQueries; ++n) {
        for (int p = 0; p < kKeys; ++p) {
            scale[n][p] = broadcast(Act::kScale * query[n].gain * query[n].inverse[p]);
            weight[n][p] = broadcast(query[n].weight[p]);
        }
    }
    for (int64_t d = 0; d < stride; d += kWidth) {
        for (int p = 0; p < kKeys; ++p) {
            vec row = load(k + p * stride + d);
            for (int n = 0; n < kQueries; ++n) {
                vec x = load(query[n].q + d) + row;
                vec value = load(query[n].grad + d) * Act::derivative(x, scale[n][p]);
                if (kWeighted) value *= weight[n][p];
                store(w + (n * kKeys + p) * stride + d, value);
                products[n][p] += value * x;
            }
        }
    }
    vec along[kQueries][kKeys], radial[kQueries][kKeys];
    for (int n = 0; n < kQueries; ++n) {
        float sums[4];
        sum_four(products[n], sums);
        for (int p = 0; p < kKeys; ++p) {
            const float product = query[n].inverse[p] * sums[p], factor = query[n].gain * query[n].inverse[p];
            dgain[n] += product;
            along[n][p] = broadcast(factor);
            // Where x = 0 the norm is x / eps, without a second term.
            radial[n][p] = broadcast(query[n].std[p] > 0 ? factor * product * per_channel / query[n].std[p] : 0);
        }
    }
    for (int64_t d = 0; d < stride; d += kWidth) {
        vec q[kQueries], dq[kQueries];
        for (int n = 0; n < kQueries; ++n) {
            q[n] = load(query[n].q + d);
            dq[n] = vec{};
        }
        for (int p = 0; p < kKeys; ++p) {
            vec row = load(k + p * stride + d), total = load(dk + p * stride + d);
            for (int n = 0; n < kQueries; ++n) {
                vec dx = along[n][p] * load(w + (n * kKeys + p) * stride + d) - radial[n][p] * (q[n] + row);
                dq[n] += dx;
                total += dx;
            }
            store(dk + p * stride + d, total);
        }
        for (int n = 0; n < kQueries; ++n) store(query[n].dq + d, load(query[n].dq + d) + dq[n]);
    }
}

// One block of queries of a batch entry and head, first query `first`; adds to dk of that entry and head.
template <class Act, bool kWeighted>
static void backward_block(const QuadraticArguments& a, const Keys& keys, int64_t first, const Workspace& work, float* dk) {
    const int64_t stride = keys.stride;
    const int rows = int(min(int64_t(kQueryBlock), a.queries - first));
    const float per_channel = 1.0f / float(a.channels);
    memset(work.dq, 0, sizeof(float) * kQueryBlock * stride);
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
    }
    alignas(64) float squares[kQueryBlock][kKeyBlock] = {};
    Pairs<kKeyBlock> pairs[kQueryBlock] = {};
    int from[kQueryBlock], to[kQueryBlock];
    for (int64_t block = begin; block < end; block += kKeyBlock) {
        const int count = int(min(int64_t(kKeyBlock), end - block));
        const float* const k = keys.values + block * stride;
        if (a.norm != kNone) sums_of_squares<kQueryBlock, kKeyBlock>(work.q, rows, k, stride, count, squares);
        for (int n = 0; n < rows; ++n) {
            from[n] = int(min(int64_t(count), max(int64_t(0), reach[n].begin - block)));
            to[n] = int(max(int64_t(0), min(int64_t(count), reach[n].end - block)));
            form_pairs<kKeyBlock>(a, query[n], keys, squares[n], block, from[n], to[n], pairs[n]);
        }
        memset(work.dk, 0, sizeof(float) * kKeyBlock * stride);

        auto tile_query = [&](int n, int p) {
            return TileQuery{work.q + n * stride, work.grad + n * stride, work.dq + n * stride, query[n].gain,
                             pairs[n].std + p, pairs[n].inverse + p, pairs[n].weight + p};
        };
        auto fills_tile = [&](int n, int p) {
            return n < rows && from[n] <= p && p + kTileKeys <= to[n] && !(pairs[n].cancelled >> p & ((1u << kTileKeys) - 1));
        };
        auto add_one = [&](int n, int p) {
            TileQuery tile = tile_query(n, p);
            const float* row = k + p * stride;
            if (pairs[n].cancelled >> p & 1u) {
                exact_pair(a, query[n], keys, block + p, work.exact, pairs[n].std + p, pairs[n].inverse + p);
                tile.q = work.zero;
                row = work.exact;
            }
            add_tile<Act, kWeighted, 1, 1>(per_channel, stride, &tile, row, work.dk + p * stride, work.w, dgain + n);
        };
        for (int n = 0; n < rows; n += kTileQueries) {
            for (int p = 0; p < count; p += kTileKeys) {
                const TileQuery tile[kTileQueries] = {tile_query(n, p), tile_query(n + 1, p)};
                if (fills_tile(n, p) && fills_tile(n + 1, p)) {
                    add_tile<Act, kWeighted, kTileQueries, kTileKeys>(per_channel, stride, tile, k + p * stride,
                                                                      work.dk + p * stride, work.w, dgain + n);
                    continue;
                }
                for (int m = n; m < min(n + kTileQueries, rows); ++m)
                    for (int one = max(p, from[m]); one < min(p + kTileKeys, to[m]); ++one) add_one(m, one);
            }
        }
        for (int64_t n = 0; n < count * stride; n += kWidth)
            store(dk + block * stride + n, load(dk + block * stride + n) + load(work.dk + n));
    }
    for (int n = 0; n < rows; ++n) {
        const float* dq = work.dq + n * stride;
        store_row(a.dq, query_offset(a, keys.batch, keys.head, first + n), dq, a.channels, 1, mean_to_remove(a, dq), a.bf16);
        if (a.dgain) a.dgain[(keys.batch * a.heads + keys.head) * a.queries + first + n] = float(dgain[n]);
    }
}

// The work is cut into one contiguous share per thread, by the number of pairs. A group (batch entry and head) that a
// share begins within is summed into a buffer of that thread's own, all others straight into dk: the sums are the
// same in every run with this number of threads.
struct Share {
    int64_t begin, end;
};

static void cut_shares(const QuadraticArguments& a, int64_t blocks, Share* shares) {
    const int64_t items = a.batch * a.heads * blocks;
    auto cost = [&](int64_t item) {
        int64_t middle = min((item % blocks) * kQueryBlock + kQueryBlock / 2, a.queries - 1);
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

template <class Act, bool kWeighted>
static int backward(const QuadraticArguments& a) {
    PackedKeys packed(a);
    const int64_t stride = packed.stride, groups = a.batch * a.heads, group_size = a.keys * stride;
    const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
    float* const scratch = allocate_floats(a.threads * Workspace::size(stride));
    float* const dk = allocate_floats(groups * group_size);
    float* const own_dk = allocate_floats((a.threads - 1) * group_size);
    Share* const shares = static_cast<Share*>(malloc(sizeof(Share) * a.threads));
    const bool complete = packed.complete() && scratch && dk && own_dk && shares;
    if (complete) {
        cut_shares(a, blocks, shares);
#pragma omp parallel num_threads(a.threads)
        {
            packed.fill(a);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < groups * a.keys; ++row) memset(dk + row * stride, 0, sizeof(float) * stride);
#pragma omp for schedule(static, 1)
            for (int thread = 0; thread < a.threads; ++thread) {
                const Workspace work(scratch + thread * Workspace::size(stride), stride);
                const Share share = shares[thread];
                const int64_t split = share.begin % blocks ? share.begin / blocks : -1;
                float* const own = own_dk + (thread - 1) * group_size;
                if (split >= 0 && share.begin < share.end) memset(own, 0, sizeof(float) * group_size);
                for (int64_t item = share.begin; item < share.end; ++item) {
                    int64_t group = item / blocks;
                    backward_block<Act, kWeighted>(a, packed.group(a, group), item % blocks * kQueryBlock, work,
                                                   group == split ? own : dk + group * group_size);
                }
            }
#pragma omp for schedule(static)
            for (int64_t row = 0; row < groups * a.keys; ++row) {
                int64_t group = row / a.keys, j = row % a.keys;
                float* total = dk + row * stride;
                for (int thread = 1; thread < a.threads; ++thread) {
                    const Share share = shares[thread];
                    if (share.begin >= share.end || share.begin % blocks == 0 || share.begin / blocks != group) continue;
                    const float* part = own_dk + (thread - 1) * group_size + j * stride;
                    for (int64_t d = 0; d < stride; d += kWidth) store(total + d, load(total + d) + load(part + d));
                }
                store_row(a.dk, key_offset(a, group / a.heads, group % a.heads, j), total, a.channels, 1, mean_to_remove(a, total), a.bf16);
            }
        }
    }
    free(scratch);
    free(dk);
    free(own_dk);
    free(shares);
    return complete ? kDone : kOutOfMemory;
}

CAUSALRN_EXPORT(int, quadratic_backward)(const QuadraticArguments* arguments) {
    const QuadraticArguments& a = *arguments;
    return with_activation(
        a, [&](auto act) { return a.slope ? backward<decltype(act), true>(a) : backward<decltype(act), false>(a); });
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
