// Backward pass of the quadratic relation: one activation per pair and channel, its row kept in L1 while it is reduced.
//
// With g = grad_i / n_i and w = weight_ij g act'(gain_i z), z = r x:
//     dx_ij = gain_i (r w - c x),  c = r mean_d(w z) / std;   dgain_i = sum_jd w z
//     dq_i = sum_j dx_ij, dk_j = sum_i dx_ij, both centred at the end for "layer".
#include "quadratic.h"

namespace causalrn {
namespace CAUSALRN_ISA {

constexpr int kQueryBlock = 8;
constexpr int kKeyBlock = 8;
constexpr int kKeyLanes = kKeyBlock > kWidth ? kKeyBlock : kWidth;

// Scratch memory of one thread.
struct Workspace {
    float *q, *grad, *dq, *exact, *zero, *w;

    static int64_t size(int64_t stride) { return (3 * kQueryBlock + 2 * kKeyBlock + 1) * stride; }
    Workspace(float* memory, int64_t stride)
        : q(memory),
          grad(q + kQueryBlock * stride),
          dq(grad + kQueryBlock * stride),
          exact(dq + kQueryBlock * stride),
          zero(exact + kKeyBlock * stride),
          w(zero + stride) {}
};

// Adds the gradients of the pairs to dq and to the rows of dk; returns their part of dgain.
template <class Act, bool kWeighted>
static float add_pairs(const QuadraticArguments& a, const float* q, const float* grad,
                       const Pairs<kKeyLanes>& pairs, float gain, int64_t stride, float* w, float* dq, float* dk) {
    alignas(64) float products[kKeyLanes] = {}, along[kKeyLanes], radial[kKeyLanes];
    for (int p = 0; p < pairs.count; p += 4) {
        const float* row[4];
        float* out[4];
        vec scale[4], weight[4], total[4] = {};
        for (int n = 0; n < 4; ++n) {
            int pair = min(p + n, pairs.count - 1);
            row[n] = pairs.row[pair];
            out[n] = w + pair * stride;
            scale[n] = broadcast(Act::kScale * gain * pairs.inverse[pair]);
            weight[n] = broadcast(pairs.weight[pair]);
        }
        for (int64_t d = 0; d < stride; d += kWidth) {
            vec query = load(q + d), upstream = load(grad + d);
            for (int n = 0; n < 4; ++n) {
                vec x = query + load(row[n] + d);
                vec value = upstream * Act::derivative(x, scale[n]);
                if (kWeighted) value *= weight[n];
                store(out[n] + d, value);
                total[n] += value * x;
            }
        }
        sum_four(total, products + p);
    }
    float dgain = 0;
    for (int p = 0; p < pairs.count; ++p) {
        float product = pairs.inverse[p] * products[p];
        dgain += product;
        along[p] = gain * pairs.inverse[p];
        // Where x = 0 the norm is x / eps, without a second term.
        radial[p] = pairs.std[p] > 0 ? along[p] * product / (pairs.std[p] * float(a.channels)) : 0;
    }
    for (int64_t d = 0; d < stride; d += kWidth) {
        vec query = load(q + d), partial = {};
        for (int p = 0; p < pairs.count; ++p) {
            vec x = query + load(pairs.row[p] + d);
            vec dx = broadcast(along[p]) * load(w + p * stride + d) - broadcast(radial[p]) * x;
            partial += dx;
            float* out = dk + pairs.key[p] * stride + d;
            store(out, load(out) + dx);
        }
        store(dq + d, load(dq + d) + partial);
    }
    return dgain;
}

template <class Act, bool kWeighted>
static void backward_block(const QuadraticArguments& a, const Keys& keys, int64_t b, int64_t h, int64_t first,
                           const Workspace& work, float* dk) {
    const int64_t stride = keys.stride;
    const int rows = int(min(int64_t(kQueryBlock), a.queries - first));
    memset(work.dq, 0, sizeof(float) * kQueryBlock * stride);
    memset(work.zero, 0, sizeof(float) * stride);
    Query query[kQueryBlock];
    Reach reach[kQueryBlock];
    float dgain[kQueryBlock] = {};
    int64_t begin = a.keys, end = 0;
    for (int n = 0; n < rows; ++n) {
        query[n] = pack_query(a, b, h, first + n, work.q + n * stride);
        reach[n] = reach_of(a, h, query[n].position);
        begin = min(begin, reach[n].begin);
        end = max(end, reach[n].end);
        float* grad = work.grad + n * stride;
        const float factor = 1.0f / float(reach[n].count);
        pack_row(a.grad, query_offset(a, b, h, first + n), a.channels, a.bf16, false, grad);
        for (int64_t d = 0; d < stride; ++d) grad[d] *= factor;
    }
    Pairs<kKeyLanes> pairs = {}, cancelled = {};
    for (int64_t block = begin; block < end; block += kKeyBlock) {
        float squares[kQueryBlock][kKeyLanes];
        if (a.norm != kNone)
            sums_of_squares<kQueryBlock, kKeyLanes>(work.q, rows, keys.values + block * stride, stride, 0,
                                                    int(min(int64_t(kKeyBlock), end - block)), squares);
        for (int n = 0; n < rows; ++n) {
            int64_t from = max(block, reach[n].begin), to = min(block + kKeyBlock, reach[n].end);
            if (from >= to) continue;
            form_pairs<kKeyLanes>(a, h, query[n], keys, squares[n] + (from - block), from, int(to - from), pairs, cancelled, work.exact);
            float *grad = work.grad + n * stride, *dq = work.dq + n * stride;
            dgain[n] += add_pairs<Act, kWeighted>(a, query[n].row.values, grad, pairs, query[n].gain, stride, work.w, dq, dk);
            if (cancelled.count)
                dgain[n] += add_pairs<Act, kWeighted>(a, work.zero, grad, cancelled, query[n].gain, stride, work.w, dq, dk);
        }
    }
    for (int n = 0; n < rows; ++n) {
        const float* dq = work.dq + n * stride;
        store_row(a.dq, query_offset(a, b, h, first + n), dq, a.channels, 1, mean_to_remove(a, dq), a.bf16);
        if (a.dgain) a.dgain[(b * a.heads + h) * a.queries + first + n] = dgain[n];
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
                    backward_block<Act, kWeighted>(a, packed.group(group), group / a.heads, group % a.heads,
                                                   item % blocks * kQueryBlock, work,
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
                store_row(a.dk, ((group / a.heads * a.keys + j) * a.heads + group % a.heads) * a.channels, total,
                          a.channels, 1, mean_to_remove(a, total), a.bf16);
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
