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

// The sum of the gradient of norm(x) over one head, and its sum times the centred x.
struct Sums {
    float grad, product;
};

// The gradient of x of one head: `grad`, the body of a loop over its vectors, gives that of norm(x).
template <class Element, class Grad>
CAUSALRN_INLINE void store_norm_gradient(const Layout& l, const LinearArguments& a, const Element* x, const Stats& s,
                                         Sums sums, Element* out, Grad grad) {
    const float size = float(l.channels);
    const float mean = a.rms ? 0 : sums.grad / size, slope = slope_of(sums.product, size, s.std, s.inverse);
    each_vector(l, CAUSALRN_EACH {
        const vec centred = load_lanes(x + d, count) - s.mean;
        store_lanes(out + d, (grad(d, count, lanes, slot) - mean) * s.inverse - centred * slope, count);
    });
}

// The gradient dl of one row of l from dy: to `grad`, with its sums per head.
template <class Element>
static void gate_gradient(const Layout& l, const LinearArguments& a, Gate gate, const Stats* stats, const Element* q,
                          const Element* dy, const float* __restrict value, float* __restrict grad, Sums* head_sums) {
    const float size = float(l.heads * l.channels);
    vec squares[4] = {}, grads[4] = {}, products[4] = {};
    for (int64_t h = 0; h < l.heads; ++h)
        each_vector(l, CAUSALRN_EACH {
            vec deviation = select(lanes, load(value + h * l.head_stride + d) * gate.unit - gate.mean, vec{});
            vec g = load_lanes(dy + h * l.channels + d, count);
            squares[slot] += deviation * deviation;
            grads[slot] += g;
            products[slot] += g * deviation;
        });
    gate.set_deviation(a, sum_slots(squares), size);
    const float mean = a.rms ? 0 : sum_slots(grads) / size;
    const float slope = slope_of(sum_slots(products), size, gate.std, gate.inverse);
    vec ties[4] = {};
    float total = 0;
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride, channel = h * l.channels;
        vec sums[4] = {}, centred[4] = {};
        each_vector(l, CAUSALRN_EACH {
            const vec v = load(value + start + d), scaled = v * gate.unit;
            vec dl = (load_lanes(dy + channel + d, count) - mean) * gate.inverse - (scaled - gate.mean) * slope;
            dl *= scaled;
            store(grad + start + d, dl);
            sums[slot] += dl;
            centred[slot] += dl * (load_lanes(q + channel + d, count) - stats[h].mean);
            ties[slot] += select(v == gate.highest, broadcast(1), vec{});
        });
        head_sums[h] = {sum_slots(sums), sum_slots(centred)};
        total += head_sums[h].grad;
    }
    // y does not change when all l rise by the same amount (eps is relative to the greatest element), so dl sums to 0:
    // the greatest elements, equally great ones in equal parts, take up the rest.
    const float rest = -total / sum_slots(ties);
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride;
        each_vector(l, CAUSALRN_EACH {
            const ivec highest = load(value + start + d) == gate.highest;
            if (__builtin_expect(!any_of(highest), 1)) return;
            const vec share = select(highest, broadcast(rest), vec{});
            store(grad + start + d, load(grad + start + d) + share);
            head_sums[h].grad += sum(share);
            head_sums[h].product += sum(share * (load_lanes(q + h * l.channels + d, count) - stats[h].mean));
        });
    }
}

// The gradients of the queries of a block, and dl / S of its rows in `ratios`, from the sum before the block.
template <Keys kKeys, class Element>
static void query_gradients(const Layout& l, const LinearArguments& a, Block block, RowSums from, Stats* k_stats,
                            float* ratios, float* value, float* grad, Stats* stats, Sums* head_sums) {
    fill(l, from.running, 0);
    for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t i = block.first + row;
        const Element *q = q_row<Element>(a, block.b, i), *k = k_row<Element>(a, block.b, i);
        const Element* dy = dy_row<Element>(a, block.b, i);
        Element* dq = out_row<Element>(a, a.dq, block.b, i);
        const Gate gate = gate_row<kKeys>(l, a, q, k, from, {q + a.q_stride, dy, k + a.k_stride, dq}, stats,
                                          k_stats + row * l.heads, value);
        if (kKeys == kKept) from.exp_k += l.stride;
        gate_gradient(l, a, gate, stats, q, dy, value, grad, head_sums);
        for (int64_t h = 0; h < l.heads; ++h) {
            const int64_t start = h * l.head_stride;
            float* ratio = ratios + row * l.stride + start;
            auto dl_and_ratio = CAUSALRN_EACH {
                const vec dl = load(grad + start + d);
                vec sum = load(from.start + start + d);
                if (kKeys != kSummed) sum += load(from.running + start + d);
                store(ratio + d, select(lanes, dl / sum, vec{}));
                return dl;
            };
            store_norm_gradient(l, a, q + h * l.channels, stats[h], head_sums[h], dq + h * l.channels, dl_and_ratio);
        }
    }
}

// The sums of the rows of a block.
static void column_sums(const Layout& l, const float* rows, int64_t count, float* out) {
    for (int64_t d = 0; d < l.stride; d += kWidth) {
        vec sums[2] = {};
        for (int64_t row = 0; row < count; ++row) sums[row % 2] += load(rows + row * l.stride + d);
        store(out + d, sums[0] + sums[1]);
    }
}

// The gradients of the keys of a block, whose exponentials and statistics are at hand; `behind` is the gradient of the
// sums that comes from behind the block. With ratios (one row each) that of the block's own rows is added to it.
template <class Element>
static void key_gradients(const Layout& l, const LinearArguments& a, Block block, const float* exp_k,
                          const Stats* stats, const float* ratios, float* __restrict behind) {
    for (int64_t row = block.rows - 1; row >= 0; --row) {
        const Element* k = k_row<Element>(a, block.b, block.first + row);
        Element* dk = out_row<Element>(a, a.dk, block.b, block.first + row);
        for (int64_t h = 0; h < l.heads; ++h) {
            const int64_t start = h * l.head_stride, channel = h * l.channels;
            const Stats& s = stats[row * l.heads + h];
            const float* exponentials = exp_k + row * l.stride + start;
            vec grads[4] = {}, products[4] = {};
            each_vector(l, CAUSALRN_EACH {
                __builtin_prefetch(dk - a.heads * a.channels + channel + d, 1);
                vec sum = load(behind + start + d);
                if (ratios) {
                    sum += load(ratios + row * l.stride + start + d);
                    store(behind + start + d, sum);
                }
                const vec g = load(exponentials + d) * sum;
                grads[slot] += g;
                products[slot] += g * (load_lanes(k + channel + d, count) - s.mean);
            });
            auto grad = CAUSALRN_EACH { return load(exponentials + d) * load(behind + start + d); };
            store_norm_gradient(l, a, k + channel, s, {sum_slots(grads), sum_slots(products)}, dk + channel, grad);
        }
    }
}

// The gradients of all keys when every row had the same sums: `after(b)` is the gradient of those.
template <class Element, class After>
static void all_key_gradients(const Layout& l, const LinearArguments& a, float* exp_k, float* unused, Stats* stats,
                              After after) {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.batch * l.blocks; ++item) {
        const Block block = block_at(l, a, item / l.blocks, item % l.blocks);
        exp_rows<Element>(l, a, block, exp_k, unused, stats);
        key_gradients<Element>(l, a, block, exp_k, stats, nullptr, after(block.b));
    }
}

template <class Element>
static int backward(const LinearArguments& a) {
    const Layout l(a);
    const int64_t per_thread = (3 * l.rows + 8) * l.stride;
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
        float *running = ratios + 2 * l.rows * l.stride, *value = running + l.stride, *grad = value + l.stride;
        float *ratio_sum = grad + l.stride, *behind = ratio_sum + l.stride;
        Stats* stats = reinterpret_cast<Stats*>(behind + l.stride);
        Sums* head_sums = reinterpret_cast<Sums*>(behind + 2 * l.stride);
        starts.fill<Element>(a);
        for (Turn turn = chain.before(); chain.advance(turn);) {
            const int64_t index = l.blocks - 1 - turn.index;
            const Block block = block_at(l, a, turn.b, index);
            const RowSums from{starts.row(block.b, index), running, exp_k};
            if (a.causal) {
                query_gradients<kKept, Element>(l, a, block, from, k_stats, ratios, value, grad, stats, head_sums);
            } else {
                query_gradients<kSummed, Element>(l, a, block, from, k_stats, ratios, value, grad, stats, head_sums);
            }
            column_sums(l, ratios, block.rows, ratio_sum);
            chain.take(turn, behind);
            chain.pass_on(turn, ratio_sum);
            if (a.causal) key_gradients<Element>(l, a, block, exp_k, k_stats, ratios, behind);
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

CAUSALRN_KERNEL(linear_backward, LinearArguments) {
    return arguments->bf16 ? backward<uint16_t>(*arguments) : backward<float>(*arguments);
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

CAUSALRN_KERNEL(linear_pool_backward, LinearArguments) {
    return arguments->bf16 ? pool_backward<uint16_t>(*arguments) : pool_backward<float>(*arguments);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
