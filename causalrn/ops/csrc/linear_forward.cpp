// The forward pass of the linear relation: each block of q and k is read once, each block of y written once.
#include "linear_sums.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// The rows of a block, from the sum before it; `from.running` ends as the block's own sum.
template <Keys kKeys, class Element>
static void forward_rows(const Layout& l, const LinearArguments& a, Block block, RowSums from, Stats* stats,
                         float* __restrict value) {
    const float size = float(l.heads * l.channels);
    fill(l, from.running, 0);
    for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t i = block.first + row;
        const Element *q = q_row<Element>(a, block.b, i), *k = k_row<Element>(a, block.b, i);
        Element* y = out_row<Element>(a, a.y, block.b, i);
        const Ahead<Element> ahead{q + a.q_stride, k + a.k_stride, nullptr, y};
        Gate gate = gate_row<kKeys>(l, a, q, k, from, ahead, stats, stats + l.heads, value);
        if (kKeys == kAtHand) from.exp_k += l.stride;
        vec squares[4] = {};
        for (int64_t h = 0; h < l.heads; ++h)
            each_vector(l, CAUSALRN_EACH {
                vec deviation = select(lanes, load(value + h * l.head_stride + d) * gate.unit - gate.mean, vec{});
                squares[slot] += deviation * deviation;
            });
        gate.set_deviation(a, sum_slots(squares), size);
        for (int64_t h = 0; h < l.heads; ++h)
            each_vector(l, CAUSALRN_EACH {
                vec deviation = load(value + h * l.head_stride + d) * gate.unit - gate.mean;
                store_lanes(y + h * l.channels + d, deviation * gate.inverse, count);
            });
    }
}

template <class Element>
static int forward(const LinearArguments& a) {
    const Layout l(a);
    const int64_t per_thread = (l.rows + 6) * l.stride;
    Chain chain(l, a, a.total);
    // A bidirectional row sees every block, so that their sums come first.
    BlockStarts starts(l, a.causal ? 0 : a.batch);
    Floats scratch(a.threads * per_thread);
    if (!chain.ready() || !starts.memory.p || !scratch.p) return kOutOfMemory;
#pragma omp parallel num_threads(a.threads)
    {
        float* const exp_k = scratch.p + thread_index() * per_thread;
        float *start = exp_k + l.rows * l.stride, *running = start + l.stride, *value = running + l.stride;
        float* block_sum = value + l.stride;
        // A head has at least as many padded channels as a Stats has floats.
        Stats* stats = reinterpret_cast<Stats*>(block_sum + l.stride);
        if (!a.causal) starts.fill<Element>(a);
        for (Turn turn = chain.before(); chain.advance(turn);) {
            const Block block = block_at(l, a, turn.b, turn.index);
            if (!a.causal) {
                const RowSums from{starts.row(turn.b, turn.index), running, nullptr};
                forward_rows<kSummed, Element>(l, a, block, from, stats, value);
            } else if (chain.shared(turn)) {
                // Others wait for this block's sum: it comes first.
                exp_rows<Element>(l, a, block, exp_k, block_sum, nullptr);
                chain.take(turn, start);
                chain.pass_on(turn, block_sum);
                forward_rows<kAtHand, Element>(l, a, block, {start, running, exp_k}, stats, value);
            } else {
                chain.take(turn, start);
                forward_rows<kMade, Element>(l, a, block, {start, running, nullptr}, stats, value);
                chain.pass_on(turn, running);
            }
        }
    }
    if (a.causal) {
        write_totals(l, a, chain.carry, l.stride);
    } else {
        write_totals(l, a, starts.row(0, 0), l.blocks * l.stride);
    }
    return kDone;
}

CAUSALRN_KERNEL(linear_forward, LinearArguments) {
    return arguments->bf16 ? forward<uint16_t>(*arguments) : forward<float>(*arguments);
}

// The sum of exp(norm(k)) alone.
template <class Element>
static int pool(const LinearArguments& a) {
    const Layout l(a);
    Chain chain(l, a, nullptr);
    Floats scratch(a.threads * 2 * l.stride);
    if (!chain.ready() || !scratch.p) return kOutOfMemory;
#pragma omp parallel num_threads(a.threads)
    {
        float* const block_sum = scratch.p + thread_index() * 2 * l.stride;
        for (Turn turn = chain.before(); chain.advance(turn);) {
            exp_rows<Element>(l, a, block_at(l, a, turn.b, turn.index), nullptr, block_sum, nullptr);
            chain.take(turn, block_sum + l.stride);
            chain.pass_on(turn, block_sum);
        }
    }
    write_totals(l, a, chain.carry, l.stride);
    return kDone;
}

CAUSALRN_KERNEL(linear_pool, LinearArguments) {
    return arguments->bf16 ? pool<uint16_t>(*arguments) : pool<float>(*arguments);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
