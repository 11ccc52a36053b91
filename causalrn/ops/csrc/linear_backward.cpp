// The backward pass of the linear relation: blocks from the end of the sequence to its beginning.
//
//     dl = dv v,  dv from the post-norm;   dq from dl;   dk_j from exp(norm(k_j)) (dtotal + sum_{i>=j} dl_i / S_i)
//
// A block's rows are taken forwards for dq and dl / S, then backwards for dk, while all of it is in the cache.
#include "linear_sums.h"

namespace causalrn {
namespace CAUSALRN_ISA {

template <class Element>
CAUSALRN_INLINE const Element* dy_row(const LinearArguments& a, int64_t b, int64_t i) {
    return static_cast<const Element*>(a.dy) + b * a.dy_batch_stride + i * a.dy_stride;
}

// Factor of the centred x in the gradient of (x - mean) / (std + eps): `product` is the sum of gradient times centred x.
CAUSALRN_INLINE float slope_of(float product, float size, float std, float inverse) {
    return std > 0 ? inverse * inverse * product / (size * std) : 0;
}

// The gradient of the centred x of one head, with that of its normalisation in `grad`; the padding of `grad` is 0.
template <class Element>
CAUSALRN_INLINE void store_norm_gradient(const Layout& l, const LinearArguments& a, const Stats& s, const float* grad,
                                         float grad_sum, const float* centred, float product, Element* out) {
    const float size = float(l.channels);
    const float mean = a.rms ? 0 : grad_sum / size, slope = slope_of(product, size, s.std, s.inverse);
    each_vector(l, CAUSALRN_EACH {
        store_lanes(out + d, (load(grad + d) - mean) * s.inverse - load(centred + d) * slope, count);
    });
}

// One row: writes dq, and dl / S to `ratio`, which is added to `ratio_sum`; gate_row gave the other rows.
template <class Element>
static void query_gradient(const Layout& l, const LinearArguments& a, const Gate& gate, const Stats* stats,
                           const Element* dy, const float* __restrict value, const float* __restrict centred,
                           const float* __restrict sums, float* __restrict grad, float* __restrict ratio,
                           float* __restrict ratio_sum, Element* dq) {
    vec grads[4] = {}, products[4] = {}, ties[4] = {};
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride;
        each_vector(l, CAUSALRN_EACH {
            vec g = load_lanes(dy + h * l.channels + d, count), v = load(value + start + d);
            store(grad + start + d, g);
            grads[slot] += g;
            products[slot] += g * select(lanes, v - gate.mean, vec{});
            ties[slot] += select(v == gate.highest, broadcast(1), vec{});
        });
    }
    const float size = float(l.heads * l.channels), product = sum_slots(products);
    const float mean = a.rms ? 0 : sum_slots(grads) / size, slope = slope_of(product, size, gate.std, gate.inverse);
    vec dl_sums[4] = {};
    for (int64_t h = 0; h < l.heads; ++h)
        each_vector(l, CAUSALRN_EACH {
            const int64_t at = h * l.head_stride + d;
            vec v = load(value + at);
            vec dl = v * ((load(grad + at) - mean) * gate.inverse - (v - gate.mean) * slope);
            store(grad + at, dl);
            dl_sums[slot] += dl;
        });
    // y does not change when all l rise by the same amount (eps is relative to the greatest element), so the sum is 0:
    // the greatest elements, equally great ones in equal parts, take up the rest.
    const vec rest = broadcast(-sum_slots(dl_sums) / sum_slots(ties));
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride;
        vec sum_dl[4] = {}, dl_centred[4] = {};
        each_vector(l, CAUSALRN_EACH {
            vec dl = load(grad + start + d) + select(load(value + start + d) == gate.highest, rest, vec{});
            store(grad + start + d, dl);
            vec quotient = select(lanes, dl / load(sums + start + d), vec{});
            store(ratio + start + d, quotient);
            store(ratio_sum + start + d, load(ratio_sum + start + d) + quotient);
            sum_dl[slot] += dl;
            dl_centred[slot] += dl * load(centred + start + d);
        });
        store_norm_gradient(l, a, stats[h], grad + start, sum_slots(sum_dl), centred + start, sum_slots(dl_centred),
                            dq + h * l.channels);
    }
}

// The gradients of the keys of a block, whose exponentials and statistics are at hand; `after` is the gradient of the
// sums that comes from behind the block. With ratios (one row each) that of the block's own rows is added.
template <class Element>
static void key_gradients(const Layout& l, const LinearArguments& a, Block block, float* exp_k, const Stats* stats,
                          const float* after, const float* ratios, float* running, float* centred) {
    fill(l, running, 0);
    for (int64_t row = block.rows - 1; row >= 0; --row) {
        const Element* k = k_row<Element>(a, block.b, block.first + row);
        Element* dk = out_row<Element>(a, a.dk, block.b, block.first + row);
        for (int64_t h = 0; h < l.heads; ++h) {
            const int64_t start = h * l.head_stride;
            const Stats& s = stats[row * l.heads + h];
            const float* ratio = ratios ? ratios + row * l.stride + start : nullptr;
            float* grad = exp_k + row * l.stride + start;
            vec grads[4] = {}, products[4] = {};
            each_vector(l, CAUSALRN_EACH {
                vec sum = load(running + start + d);
                if (ratio) {
                    sum += load(ratio + d);
                    store(running + start + d, sum);
                }
                vec g = load(grad + d) * (load(after + start + d) + sum);
                vec c = select(lanes, load_lanes(k + h * l.channels + d, count) - s.mean, vec{});
                store(grad + d, g);
                store(centred + d, c);
                grads[slot] += g;
                products[slot] += g * c;
            });
            store_norm_gradient(l, a, s, grad, sum_slots(grads), centred, sum_slots(products), dk + h * l.channels);
        }
    }
}

// The gradients of all keys when every row had the same sums: `after(b)` is the gradient of those.
template <class Element, class After>
static void all_key_gradients(const Layout& l, const LinearArguments& a, float* exp_k, float* row_scratch, Stats* stats,
                              After after) {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * l.blocks; ++item) {
        const Block block = block_at(l, a, item / l.blocks, item % l.blocks);
        exp_rows<Element>(l, a, block, exp_k, l.stride, row_scratch, stats);
        key_gradients<Element>(l, a, block, exp_k, stats, after(block.b), nullptr, row_scratch, row_scratch + l.stride);
    }
}

template <class Element>
static int backward(const LinearArguments& a) {
    const Layout l(a);
    const int64_t per_thread = (3 * l.rows + 9) * l.stride;
    Chain chain(l, a, a.dtotal);
    BlockStarts starts(l, a.batch);
    Floats scratch(a.threads * per_thread), dtotal(a.causal ? 0 : a.batch * l.stride);
    if (!chain.ready() || !starts.memory.p || !scratch.p || !dtotal.p) return kOutOfMemory;
#pragma omp parallel num_threads(a.threads)
    {
        float* const exp_k = scratch.p + thread_index() * per_thread;
        float* const ratios = exp_k + l.rows * l.stride;
        // A head has at least as many padded channels as a Stats has floats.
        Stats* k_stats = reinterpret_cast<Stats*>(ratios + l.rows * l.stride);
        float *running = ratios + 2 * l.rows * l.stride, *sums = running + l.stride, *centred = sums + l.stride;
        float *value = centred + l.stride, *grad = value + l.stride, *ratio_sum = grad + l.stride;
        float *after = ratio_sum + l.stride, *unused = after + l.stride;
        Stats* q_stats = reinterpret_cast<Stats*>(unused + l.stride);
        starts.fill<Element>(a, exp_k);
        for (Turn turn = chain.before(); chain.advance(turn);) {
            const int64_t index = l.blocks - 1 - turn.index;
            const Block block = block_at(l, a, turn.b, index);
            if (a.causal) exp_rows<Element>(l, a, block, exp_k, l.stride, unused, k_stats);
            RowSums row_sums{starts.row(block.b, index), running, exp_k};
            fill(l, running, -0.0f);
            fill(l, ratio_sum, 0);
            for (int64_t row = 0; row < block.rows; ++row) {
                const int64_t i = block.first + row;
                const Element *q = q_row<Element>(a, block.b, i), *dy = dy_row<Element>(a, block.b, i);
                Element* dq = out_row<Element>(a, a.dq, block.b, i);
                const Gate gate =
                    gate_row(l, a, q, row_sums, {q + a.q_stride, dy, dq}, q_stats, centred, sums, value);
                query_gradient(l, a, gate, q_stats, dy, value, centred, sums, grad, ratios + row * l.stride,
                               ratio_sum, dq);
                row_sums.exp_k += l.stride;
            }
            chain.pass_on(turn, ratio_sum, after);
            if (a.causal) key_gradients<Element>(l, a, block, exp_k, k_stats, after, ratios, running, centred);
        }
        if (!a.causal) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t d = 0; d < a.batch * l.stride; ++d) dtotal.p[d] = float(chain.carry[d]);
            all_key_gradients<Element>(l, a, exp_k, running, k_stats,
                                       [&](int64_t b) { return dtotal.p + b * l.stride; });
        }
    }
    write_totals(l, a, chain.carry, l.stride);
    return kDone;
}

CAUSALRN_EXPORT(int, linear_backward)(const LinearArguments* a) {
    return a->bf16 ? backward<uint16_t>(*a) : backward<float>(*a);
}

// The gradient of the pool, given that of its sum in dtotal.
template <class Element>
static int pool_backward(const LinearArguments& a) {
    const Layout l(a);
    const int64_t per_thread = (2 * l.rows + 2) * l.stride;
    Floats scratch(a.threads * per_thread), dtotal(a.batch * l.stride);
    if (!scratch.p || !dtotal.p) return kOutOfMemory;
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t d = 0; d < l.stride; ++d) dtotal.p[b * l.stride + d] = float(initial(l, a.dtotal, b, d));
#pragma omp parallel num_threads(a.threads)
    {
        float *exp_k = scratch.p + thread_index() * per_thread, *row_scratch = exp_k + 2 * l.rows * l.stride;
        all_key_gradients<Element>(l, a, exp_k, row_scratch, reinterpret_cast<Stats*>(exp_k + l.rows * l.stride),
                                   [&](int64_t b) { return dtotal.p + b * l.stride; });
    }
    return kDone;
}

CAUSALRN_EXPORT(int, linear_pool_backward)(const LinearArguments* a) {
    return a->bf16 ? pool_backward<uint16_t>(*a) : pool_backward<float>(*a);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
